"""The tables of docs/ablations.md: ways to predict expression from image features, and genes that no image measured.

comtip shards build data_shards/samples --out runs/demo/shards --tile-um 224 --tile-px 128 --min-mpp 4
comtip pretrain --config configs/demo_cpu.yaml --out runs/demo
python bench/results/readout.py runs/demo --split val             # the sections on which choices are based
python bench/results/readout.py runs/demo --split test            # once per candidate

Unseen genes (vectors from comtip genes vectors; --only trains on the images of these sections alone):

python bench/results/readout.py runs/demo --split test --cohort human_breast --vectors breast.safetensors
python bench/results/readout.py runs/demo --split test --cohort mouse_main_olfactory_bulb --vectors bulb.safetensors \
    --only mob2k_1,mob2k_2,mob2k_3

Heads are by kernel ridge regression unless a row says otherwise. Each line: mean PCC over the 50 most variable genes / the same with
colour and depth regressed out, log1p CP10K, then raw. With several runs, the last table has the mean over them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards import open_sets

from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.expression.panel import rank_by_variance
from comtip_fast.evaluation.baselines import fit_ridge
from comtip_fast.evaluation.folds import ridge_folds
from comtip_fast.evaluation.metrics import score
from comtip_fast.evaluation.train_reference import mean_colour
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.models.readout.features import LAST_NAME, RADII, STAGES_NAME, frozen_columns, penalty_scale
from comtip_fast.models.readout.heads import NORMS, Readout
from comtip_fast.models.readout.section_statistics import neighbour_mean, standardise
from comtip_fast.training.readout.solve import KINDS, CohortData, ReadoutGrid, SectionTable, fit_cohort

Values = dict[str, np.ndarray]
UNSEEN_GRID = ReadoutGrid(programmes=(10, 20))


class Lab:
    """Sections of a shard set with the features of one model, read once."""

    def __init__(self, run: Path) -> None:
        self.predictor = Predictor.load(run)
        if self.predictor.bundle.readout is None:
            raise ValueError(f"{run}: the model has no readout; train with readout.kind=auto")
        self.readout: Readout = self.predictor.bundle.readout
        self.shards = open_sets(self.predictor.config.data.shards)
        self.keys = [g.key for g in self.shards.genes]
        self.row = {k: i for i, k in enumerate(self.keys)}
        self.scores: dict[tuple[str, str], list[float]] = {}
        """What :meth:`show` printed, by section and method."""

    def sections(self, cohort: str, split: str) -> list[int]:
        """Return the numbers of a cohort's sections in one split."""
        entries = enumerate(self.shards.manifest.sections)
        return [i for i, s in entries if s.split == split and self.shards.cohort_of_section(i) == cohort]

    @cache  # noqa: B019
    def features(self, section: int) -> ImageFeatures:
        """Return the model's features of all spots of a section."""
        tiles = self.shards.tiles(self.shards.select(sections=[section]))
        return self.predictor.image_features(tiles.transpose(0, 3, 1, 2), self.shards.stain(section), self.xy(section))

    def xy(self, section: int) -> np.ndarray:
        """Return the positions of all spots of a section, in px of its source image, (N, 2)."""
        spots = self.shards.select(sections=[section])
        return self.shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)

    @cache  # noqa: B019
    def counts(self, section: int) -> tuple[Any, np.ndarray]:
        """Return the counts of a section and its covariates: mean colour and log total count."""
        spots = self.shards.select(sections=[section])
        counts = self.shards.counts(spots)
        colour = mean_colour(self.shards.tiles(spots))
        return counts, np.column_stack([colour, np.log1p(np.asarray(counts.sum(axis=1)).ravel())])

    def values(self, section: int, keys: list[str]) -> Values:
        """Return the measured expression of genes in both normalisations."""
        counts, rows = self.counts(section)[0], [self.row[k] for k in keys]
        return {"cp10k": log1p_cp10k(counts)[:, rows].toarray(), "raw": np.log1p(counts[:, rows].toarray())}

    def ranked(self, sections: list[int]) -> list[str]:
        """Return the keys of the genes detected in at least 10 % of the spots of each section that measured them, by decreasing variance."""
        values = [log1p_cp10k(self.counts(s)[0]) for s in sections]
        rows, _ = rank_by_variance(values, [self.shards.measured(s) for s in sections], 0.1)
        return [self.keys[r] for r in rows]

    def known(self, keys: list[str], sections: list[int]) -> list[str]:
        """Return the keys that all sections measured."""
        ok = np.all([self.shards.measured(s) for s in sections], axis=0)
        return [k for k in keys if ok[self.row[k]]]

    def show(self, name: str, section: int, keys: list[str], predicted: Values) -> None:
        """Print and keep the scores of one prediction of a section."""
        found = []
        for norm in NORMS:
            measured = self.values(section, keys)[norm].astype(np.float64)
            s = score(measured, np.asarray(predicted[norm], np.float64), self.counts(section)[1], np.arange(len(keys)))
            found += [s.mean_pcc_50_hvg, s.partial_pcc_50_hvg]
        row = self.shards.manifest.sections[section].section_id, name
        self.scores[row] = found
        print(f"{row[0]:12s} {row[1]:58s} " + "{:.4f} / {:.4f}   {:.4f} / {:.4f}".format(*found), flush=True)

    # -- readouts -------------------------------------------------------------------------------------------

    def fit(
        self,
        cohort: str,
        train: list[int],
        valid: list[int],
        keys: list[str],
        blocks: set[str] | None,
        *,
        n_radii: int = len(RADII),
        equal: bool = True,
        kinds: Sequence[str] = ("kernel",),
        grid: ReadoutGrid | None = None,
    ) -> Readout:
        """Fit the heads of a cohort; keep only the blocks in ``blocks``, each with the same share, or all with their shares if None.

        ``n_radii`` radii are used, stages have equal weight in the penalty if ``equal``, and heads are of the
        kind among ``kinds`` that scores highest on split ``val``.
        """
        settings = replace(self.readout.settings, radii=self.readout.settings.radii[:n_radii])
        tables = {s: self._table(s, keys, n_radii) for s in [*train, *valid]}
        x = np.concatenate([self._x(s, n_radii) for s in train])
        ranked = [keys.index(k) for k in self.ranked(train) if k in set(keys)][:50]
        data = CohortData(
            cohort,
            keys,
            [tables[s] for s in train],
            [tables[s] for s in valid],
            x.mean(0),
            x.std(0),
            np.array(ranked),
            scale_F=penalty_scale(self.predictor.model, settings) if equal else None,
        )
        head = fit_cohort(data, settings, kinds=kinds, grid=grid)
        if blocks is None:
            return Readout(settings, [head])
        head.blocks = {b: v for b, v in head.blocks.items() if b in blocks}
        equal_shares = {b: 1 / len(head.blocks) for b in head.blocks} | {"levels": 0.0}
        head.mix = dict.fromkeys(NORMS, equal_shares)
        return Readout(settings, [head])

    def _x(self, section: int, n_radii: int) -> np.ndarray:
        """Return the features with their means over neighbours within the first radii."""
        x = self.features(section).readout_NF
        assert x is not None
        return x[:, : (1 + n_radii) * self.readout.settings.width(x.shape[1])]

    def _table(self, section: int, keys: list[str], n_radii: int) -> SectionTable:
        x = self._x(section, n_radii)
        measured = self.shards.measured(section)[[self.row[k] for k in keys]]
        y = {n: np.where(measured, v, 0.0) for n, v in self.values(section, keys).items()}
        return SectionTable(standardise(x, x.mean(0), x.std(0)), y, measured)

    def heads(self, readout: Readout, section: int, keys: list[str], vectors: GeneVectors | None = None) -> Values:
        """Predict with the heads alone."""
        return readout.predict(self._x(section, len(readout.settings.radii)), keys, None, vectors)[0]

    def levels(self, section: int, keys: list[str], *, viewed: bool) -> Values:
        """Predict from level sentences: from one view, or from the mean vectors of all views, averaged with neighbours."""
        f = self.features(section)
        genes = {g.key: g for g in self.predictor.bundle.genes}
        queries = [GeneQuery(genes[k].symbol, genes[k].name, k) for k in keys]
        if not viewed:
            return self.predictor.predict_levels(f, queries)
        out = self.predictor.predict_levels(self.predictor.averaged_views(f), queries)
        assert f.xy_N2 is not None
        return {n: 0.5 * (v + neighbour_mean(v, f.xy_N2)) for n, v in out.items()}

    def ridge(self, train: list[int], section: int, keys: list[str], which: str) -> Values:
        """Predict by ridge regression per gene; the penalty is cross-validated as in an evaluation."""
        x = {s: self._baseline(s, which) for s in [*train, section]}
        out = {n: np.zeros((len(x[section]), len(keys))) for n in NORMS}
        measured = np.array([[self.shards.measured(s)[self.row[k]] for s in train] for k in keys])
        for pattern in np.unique(measured, axis=0):
            cols = np.flatnonzero((measured == pattern).all(1))
            own = [s for s, there in zip(train, pattern, strict=True) if there]
            part = [keys[c] for c in cols]
            label = np.concatenate([np.full(len(x[s]), s) for s in own])
            fold = ridge_folds(label, np.concatenate([self.xy(s) for s in own]))
            for norm in NORMS:
                y = np.concatenate([self.values(s, part)[norm] for s in own])
                out[norm][:, cols] = fit_ridge(np.concatenate([x[s] for s in own]), y, label, fold).predict(x[section])
        return out

    def _baseline(self, section: int, which: str) -> np.ndarray:
        f = self.features(section)
        if which == "encoder":
            return np.asarray(f.pooled_Nd, np.float64)
        assert f.readout_NF is not None
        columns = frozen_columns(self.predictor.model, self.readout.settings)
        return np.asarray(f.readout_NF[:, columns[which]], np.float64)


def mean_of(*parts: Values) -> Values:
    """Return the mean of predictions."""
    return {n: np.mean([p[n] for p in parts], axis=0) for n in NORMS}


def table(lab: Lab, cohort: str, split: str) -> None:
    """Print all ways to predict trained genes."""
    train, valid = lab.sections(cohort, "train"), lab.sections(cohort, "val")
    trained = [k for k in lab.predictor.trained_genes if any(lab.shards.measured(s)[lab.row[k]] for s in train)]
    heads = {
        (b, n): lab.fit(cohort, train, valid, trained, {b}, n_radii=n)
        for b in ("vector", "frozen")
        for n in range(len(RADII) + 1)
    }
    unequal = lab.fit(cohort, train, valid, trained, {"frozen"}, equal=False)
    gene_wise = lab.fit(cohort, train, valid, trained, {"frozen"}, grid=ReadoutGrid(programmes=(0,)))
    linear = {b: lab.fit(cohort, train, valid, trained, {b}, kinds=("linear",)) for b in ("vector", "frozen")}
    default = lab.fit(cohort, train, valid, trained, None, kinds=KINDS)
    for section in lab.sections(cohort, split):
        keys = [k for k in lab.known(lab.ranked(train), [section])[:50] if k in set(trained)]
        z, frozen = (lab.heads(heads[b, len(RADII)], section, keys) for b in ("vector", "frozen"))
        linear_z, linear_frozen = (lab.heads(linear[b], section, keys) for b in ("vector", "frozen"))
        read = lab.levels(section, keys, viewed=True)
        heads_alone, share = lab.heads(default, section, keys), default.heads[0].levels
        lines = {
            "levels, one view": lab.levels(section, keys, viewed=False),
            "levels, views, neighbours": read,
            "head on z": z,
            "head on z, adjacent spots": lab.heads(heads["vector", 1], section, keys),
            "head on z, no neighbours": lab.heads(heads["vector", 0], section, keys),
            "head on frozen features": frozen,
            "head on frozen features, adjacent spots": lab.heads(heads["frozen", 1], section, keys),
            "head on frozen features, no neighbours": lab.heads(heads["frozen", 0], section, keys),
            "head on frozen features, stages by width": lab.heads(unequal, section, keys),
            "head on frozen features, no programmes": lab.heads(gene_wise, section, keys),
            "z + frozen": mean_of(z, frozen),
            "frozen + levels": mean_of(frozen, read),
            "z + levels": mean_of(z, read),
            "z + frozen + levels": mean_of(z, frozen, read),
            "z + 2 frozen + levels": mean_of(z, frozen, frozen, read),
            "2 z + frozen": mean_of(z, z, frozen),
            "2 z + 2 frozen + levels": mean_of(z, z, frozen, frozen, read),
            "heads of the kind that validation chooses (the default)": {
                n: (1 - share) * heads_alone[n] + share * read[n] for n in NORMS
            },
            "linear head on z": linear_z,
            "linear head on frozen features": linear_frozen,
            "linear heads, z + 2 frozen + levels (the former default)": mean_of(
                linear_z, linear_frozen, linear_frozen, read
            ),
            "ridge, encoder features": lab.ridge(train, section, keys, "encoder"),
            "ridge, frozen features": lab.ridge(train, section, keys, LAST_NAME),
            "ridge, frozen features, all stages": lab.ridge(train, section, keys, STAGES_NAME),
        }
        for name, predicted in lines.items():
            lab.show(name, section, keys, predicted)


def unseen(lab: Lab, cohort: str, split: str, vectors: GeneVectors, only: list[str], n_seen: int = 1900) -> None:
    """Print the scores of the 50 most variable genes; of the heads, only that of the ceiling is fitted on their expression.

    Only frozen features are used, because the encoder was trained on some of these genes.
    """
    sections = lab.shards.manifest.sections
    train = [s for s in lab.sections(cohort, "train") if not only or sections[s].section_id in only]
    valid = lab.sections(cohort, "val")
    for section in lab.sections(cohort, split):
        ranked = [k for k in lab.known(lab.ranked(train), [*train, *valid, section]) if k in vectors.row]
        genes, seen = ranked[:50], ranked[50 : 50 + n_seen]
        readout = lab.fit(cohort, train, valid, seen, {"frozen"}, grid=UNSEEN_GRID)
        ceiling = lab.fit(cohort, train, valid, genes + seen, {"frozen"}, grid=UNSEEN_GRID)
        shuffled = replace(
            vectors, vector_GK=vectors.vector_GK[np.random.default_rng(0).permutation(len(vectors.keys))]
        )
        own = lab.heads(readout, section, seen)
        mean = {n: ((v - v.mean(0)) / np.maximum(v.std(0), 1e-9)).mean(1, keepdims=True) for n, v in own.items()}
        lab.show(
            f"by gene vectors ({len(seen)} seen genes)", section, genes, lab.heads(readout, section, genes, vectors)
        )
        lab.show("control: vectors shuffled", section, genes, lab.heads(readout, section, genes, shuffled))
        lab.show("control: mean map", section, genes, {n: np.repeat(v, len(genes), 1) for n, v in mean.items()})
        lab.show("ceiling: a head that knows them", section, genes, lab.heads(ceiling, section, genes))


def main() -> None:
    """Print the chosen table for each cohort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of training runs whose models have a readout, such as seeds"
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="split to predict (default val)")
    parser.add_argument("--cohort", help="cohort to predict (default: every cohort of the model)")
    parser.add_argument("--vectors", type=Path, help="gene vectors: print the table of unseen genes")
    parser.add_argument("--only", default="", help="with --vectors: training sections to use, comma-separated ids")
    args = parser.parse_args()
    tables = [of_run(run, args) for run in args.runs]
    if len(tables) > 1:
        summarise(tables)


def of_run(run: Path, args: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Print the tables of one run and return its scores by section and method."""
    lab = Lab(run)
    for cohort in [args.cohort] if args.cohort else [h.cohort for h in lab.readout.heads]:
        if args.vectors:
            unseen(lab, cohort, args.split, GeneVectors.load(args.vectors), [s for s in args.only.split(",") if s])
        else:
            table(lab, cohort, args.split)
    return lab.scores


def summarise(tables: list[dict[tuple[str, str], list[float]]]) -> None:
    """Print the mean over runs of every row, with the lowest and the highest value."""
    print(f"\nmean over {len(tables)} runs (lowest to highest)")
    for section, name in tables[0]:
        columns = zip(*(scores[section, name] for scores in tables), strict=True)
        cells = [f"{np.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
        print(f"{section:12s} {name:58s} {cells[0]} / {cells[1]}   {cells[2]} / {cells[3]}")


if __name__ == "__main__":
    main()
