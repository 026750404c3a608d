"""The first table of section 5 of docs/ablations.md: the frozen stem's features alone, without an encoder and without training.

comtip shards build data_shards/samples --out runs/demo/shards --tile-um 224 --tile-px 128 --min-mpp 4
python bench/results/frozen_features.py runs/demo/shards

Each cell: mean PCC over the 50 most variable genes / the same with colour and depth regressed out, log1p CP10K, mean over the folds
of the column. Test sections of the demo are not read. The penalty is the best of each cell, which favours every row alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from comtip_shards import ShardSet, open_sets
from comtip_shards.slides.tiles import normalise_stain
from scipy import sparse
from scipy.special import ndtri
from scipy.stats import rankdata

from comtip_fast.config.io import load_config
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.expression.panel import rank_by_variance
from comtip_fast.evaluation.metrics import score
from comtip_fast.evaluation.train_reference import mean_colour
from comtip_fast.models.comtip import CoMTIP, ModelSizes
from comtip_fast.models.readout.features import (
    LAST_NAME,
    STAGES_NAME,
    ReadoutSettings,
    frozen_columns,
    penalty_scale,
    tile_features,
)
from comtip_fast.models.readout.section_statistics import ADJACENT, neighbour_means, standardise
from comtip_fast.models.stems import EfficientNetLite0Stem
from comtip_fast.training.readout.solve import DecomposedFeatures, ReadoutGrid, RidgePath, SectionTable

CONFIG = Path(__file__).parents[2] / "configs/demo_cpu.yaml"
BREAST = ("her2st_C2", "her2st_C3", "her2st_C4", "her2st_C5")
BULB = ("mob2k_1", "mob2k_2", "mob2k_3", "mob2k_4")
OTHER = "mob_Rep4"
Folds = Sequence[tuple[tuple[str, ...], str]]
COLUMNS: dict[str, Folds] = {
    "breast": [(tuple(s for s in BREAST if s != test), test) for test in BREAST],
    "bulb": [(tuple(s for s in (*BULB, OTHER) if s != test), test) for test in BULB],
    "bulb, another donor": [(BULB, OTHER), ((OTHER,), "mob2k_1"), ((OTHER,), "mob2k_3")],
}
"""Folds of each column of the table: the sections to train on, and the section to predict."""
N_GENES, N_SCORED, DETECTED, CHUNK = 300, 50, 0.1, 64


@dataclass(frozen=True)
class Row:
    """How one row of the table computes its features and its head."""

    name: str
    features: str = STAGES_NAME
    radii: tuple[float, ...] = (ADJACENT,)
    equal: bool = False
    """Whether stages have equal weight in the penalty."""
    deviations: bool = True
    """Whether the standard deviations over patches are used."""
    ranks: bool = False
    """Whether values are replaced by normal scores of their ranks within the section."""
    programmes: int = 10


ROWS = (
    Row("ridge per gene, stages of stride 16 and 32, no neighbours", LAST_NAME, (), programmes=0),
    Row("the former default: the same stages, adjacent spots", LAST_NAME),
    Row("seven stages, means of the feature maps"),
    Row("seven stages of equal weight", equal=True),
    Row("ranks instead of values (stages by width)", ranks=True),
    Row("equal weight, and the mean within 2.4 spacings", radii=(ADJACENT, 2.4), equal=True),
    Row("equal weight, and the mean within 3.4 spacings", radii=(ADJACENT, 3.4), equal=True),
    Row("equal weight, and the means within 2.4 and 3.4 spacings", radii=(ADJACENT, 2.4, 3.4), equal=True),
    Row("equal weight, and the means within 2.4 and 4.5 spacings", radii=(ADJACENT, 2.4, 4.5), equal=True),
    Row(
        "as the chosen one, without standard deviations over patches",
        radii=(ADJACENT, 3.4),
        equal=True,
        deviations=False,
    ),
)


class Lab:
    """The sections of a shard set, and the frozen features of their spots."""

    def __init__(self, shards: ShardSet) -> None:
        config = load_config(CONFIG)
        if shards.manifest.tile.px != config.data.tile_px:
            raise SystemExit(
                f"tiles of {shards.manifest.tile.px} px, expected {config.data.tile_px}; build the shard set as above"
            )
        sizes = ModelSizes(tile_px=shards.manifest.tile.px, n_levels=2, vocab_size=8, n_identities=1, longest=3)
        self.model = CoMTIP(config, sizes).eval()  # only its frozen stem is used
        assert isinstance(self.model.vision.stem, EfficientNetLite0Stem)
        self.model.vision.stem.load_pretrained()
        self.settings = ReadoutSettings(views=config.readout.views, radii=(), vector_dim=config.align.dim)
        self.shards = shards
        self.number = {s.section_id: i for i, s in enumerate(shards.manifest.sections)}

    @cache  # noqa: B019
    def frozen(self, section: str) -> np.ndarray:
        """Return the stem's features of all spots, averaged over views, after the vector of the untrained encoder."""
        number = self.number[section]
        tiles = normalise_stain(self.shards.tiles(self._spots(section)), self.shards.stain(number))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(tiles), CHUNK):
                chunk = torch.from_numpy(np.ascontiguousarray(tiles[start : start + CHUNK].transpose(0, 3, 1, 2)))
                parts.append(tile_features(self.model, chunk, self.settings)[1].numpy())
        return np.concatenate(parts).astype(np.float64)

    @cache  # noqa: B019
    def expression(self, section: str) -> tuple[np.ndarray, np.ndarray]:
        """Return log1p CP10K (N, all genes), and the covariates: mean colour and log total count."""
        spots = self._spots(section)
        counts = self.shards.counts(spots)
        depth = np.log1p(np.asarray(counts.sum(axis=1)).ravel())
        return log1p_cp10k(counts).toarray(), np.column_stack([mean_colour(self.shards.tiles(spots)), depth])

    @cache  # noqa: B019
    def genes(self, train: tuple[str, ...], test: str) -> np.ndarray:
        """Return the most variable genes of the training sections that the test section measured."""
        measured = [self.shards.measured(self.number[s]) for s in train]
        rows, _ = rank_by_variance([log1p_cp10k(self._counts(s)) for s in train], measured, DETECTED)
        return np.array([r for r in rows if self.shards.measured(self.number[test])[r]][:N_GENES])

    @lru_cache(maxsize=len(BREAST) + len(BULB) + 1)  # noqa: B019
    def features(self, row: Row, section: str) -> np.ndarray:
        """Return the features of a row of the table for one section, standardised within it and scaled for the penalty."""
        columns = frozen_columns(self.model, self.settings)[row.features]
        factor = penalty_scale(self.model, self.settings)[columns] if row.equal else np.ones(columns.size)
        if not row.deviations:
            columns, factor = columns[: columns.size // 2], factor[: columns.size // 2]
        own = self.frozen(section)[:, columns]
        xy = self.shards.spots.loc[self._spots(section), ["x_px", "y_px"]].to_numpy(float)
        change: Callable[[np.ndarray], np.ndarray] = _normal_scores if row.ranks else _standardised
        return np.concatenate([factor * change(x) for x in (own, *neighbour_means(own, xy, row.radii))], axis=1)

    def scores(self, row: Row, train: tuple[str, ...], test: str) -> np.ndarray:
        """Return mean PCC and mean partial PCC on a section, for every penalty: (penalties, 2)."""
        genes = self.genes(train, test)
        tables = [self._table(row, s, genes) for s in (*train, test)]
        path = RidgePath(tables[:-1], "cp10k", DecomposedFeatures.of(tables[:-1]))
        measured, covariates = tables[-1].y["cp10k"][:, :N_SCORED], self.expression(test)[1]
        out = []
        for alpha in ReadoutGrid().alphas:
            head = path.fit(row.programmes, alpha)
            predicted = tables[-1].x_NF @ head.weight_FK @ head.loading_KG[:, :N_SCORED]
            found = score(measured, predicted, covariates, np.arange(measured.shape[1]))
            out.append((found.mean_pcc_50_hvg, found.partial_pcc_50_hvg))
        return np.array(out)

    def _table(self, row: Row, section: str, genes: np.ndarray) -> SectionTable:
        measured = self.shards.measured(self.number[section])[genes]
        values = np.where(measured, self.expression(section)[0][:, genes], 0.0).astype(np.float64)
        return SectionTable(self.features(row, section), {"cp10k": values}, measured)

    def _spots(self, section: str) -> np.ndarray:
        return self.shards.select(sections=[self.number[section]])

    @cache  # noqa: B019
    def _counts(self, section: str) -> sparse.csr_matrix:
        return self.shards.counts(self._spots(section))


def _standardised(x: np.ndarray) -> np.ndarray:
    return standardise(x, x.mean(0), x.std(0))


def _normal_scores(x: np.ndarray) -> np.ndarray:
    return ndtri((rankdata(x, axis=0) - 0.5) / len(x))


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="shard set of the demo, built as above")
    lab = Lab(open_sets(str(parser.parse_args().shards)))
    print(f"| features | {' | '.join(COLUMNS)} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for row in ROWS:
        cells = []
        for folds in COLUMNS.values():
            by_penalty = np.mean([lab.scores(row, train, test) for train, test in folds], axis=0)
            cells.append("{:.3f} / {:.3f}".format(*by_penalty[by_penalty[:, 0].argmax()]))
        print(f"| {row.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
