"""Drawings of a finished prediction: overlays as PNG, and GeoJSON for QuPath."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
from comtip_shards.names import problem_with
from comtip_shards.sources.hdf5.opening import open_hdf5
from comtip_shards.storage.atomic import atomic_path
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from comtip_fast.constants import UNS
from comtip_fast.drawing import plain, scale_bar

ROWS = 4096
"""Number of rows per read."""
QUANTILES = (0.01, 0.99)
"""Quantiles at the ends of the colour map."""
OPACITY = 0.6
MAX_GENE_NAME = 100
"""Maximum length of a gene's name in the name of its overlay, in characters."""
MAX_MEASUREMENTS = 50
"""Maximum number of genes in a GeoJSON file if the genes to write are not named."""


class Answer:
    """A finished prediction of a slide, stored in an ``.h5ad`` file, whose values are read in blocks of rows.

    Parameters
    ----------
    path
        Path of the ``.h5ad`` file.

    Raises
    ------
    SourceError
        The file is missing or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_hdf5(path, "an .h5ad", "predict the slide again") as file:
            self.genes = [str(v) for v in ad.io.read_elem(file["var"]).index]
            self.names = [str(v) for v in ad.io.read_elem(file["obs"]).index]
            self.xy_N2 = np.asarray(file["obsm/spatial"][()], np.float64)
            facts = ad.io.read_elem(file[f"uns/{UNS}"])
            library = next(iter(ad.io.read_elem(file["uns/spatial"]).values()))
        self.image, self.scale = library["images"]["hires"], float(library["scalefactors"]["tissue_hires_scalef"])
        self.mpp = float(facts["mpp"]) / self.scale
        """um per px of the image."""
        self.tile_px = float(facts["tile_um"]) / float(facts["mpp"])
        """Width of a tile in px of the slide."""

    def columns(self, genes: Sequence[str]) -> list[int]:
        """Return the columns of genes.

        Raises
        ------
        ValueError
            A gene was not predicted.
        """
        check_genes(self.genes, genes, str(self.path))
        index = {gene: i for i, gene in enumerate(self.genes)}
        return [index[g] for g in genes]

    def rows(self, columns: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index of the first row, values of ``columns`` (n, columns)) for consecutive blocks of rows."""
        order = np.argsort(columns, kind="stable")
        wanted = np.asarray(columns, np.int64)[order]
        with open_hdf5(self.path, "an .h5ad", "predict the slide again") as file:
            for start in range(0, len(self.names), ROWS):
                part = np.asarray(file["X"][start : start + ROWS, wanted])
                values = np.empty_like(part)
                values[:, order] = part
                yield start, values


def check_genes(predicted: Sequence[str], genes: Sequence[str], where: str) -> None:
    """Raise ValueError if one of ``genes`` is not among the predicted genes; the message starts with ``where``."""
    known = set(predicted)
    missing = [g for g in genes if g not in known]
    if missing:
        raise ValueError(
            f"{where}: not predicted: {', '.join(missing[:5])}; name all genes to predict in `genes`, including these"
        )


def check_measurements(predicted: Sequence[str], genes: Sequence[str] | None, where: str) -> None:
    """Raise ValueError if a GeoJSON cannot hold these genes (None: all predicted ones); the message starts with ``where``."""
    if genes is None and len(predicted) > MAX_MEASUREMENTS:
        raise ValueError(
            f"{where}: has {len(predicted)} genes, but a GeoJSON of all genes holds at most {MAX_MEASUREMENTS}; name "
            f"the genes to write, e.g. {' '.join(predicted[:2])}"
        )
    check_genes(predicted, genes or (), where)


def write_overlays(answer: Answer, genes: Sequence[str], folder: Path) -> list[Path]:
    """Draw genes over the slide, one PNG per gene in ``folder``, and return the files.

    Raises
    ------
    ValueError
        A gene was not predicted.
    """
    columns = answer.columns(genes)
    folder.mkdir(exist_ok=True)
    owner = _owner(answer)
    written = []
    names = overlay_names(genes)
    for gene, column in zip(genes, columns, strict=True):
        values = np.concatenate([v[:, 0] for _, v in answer.rows([column])])
        path = folder / names[gene]
        figure = _figure(answer.image, owner, values, gene, answer.mpp)
        with atomic_path(path) as tmp_path:
            figure.savefig(tmp_path, format="png", metadata={"Software": None})
        written.append(path)
    return written


def overlay_names(genes: Sequence[str]) -> dict[str, str]:
    """Return {gene: file name of its overlay}.

    Characters that are not allowed in a file name are replaced by ``_``. A hash of the gene's name is appended if the result is
    too long, is not valid on every operating system, or equals the result of another gene, ignoring case.
    """
    replaced = {gene: re.sub(r"[^A-Za-z0-9._-]", "_", gene) for gene in genes}
    uses = Counter(name.casefold() for name in replaced.values())
    out = {}
    for gene, name in replaced.items():
        if uses[name.casefold()] > 1 or problem_with(name, MAX_GENE_NAME):
            # Without dots, so that it is neither hidden nor the name of a device, such as CON.1 on Windows.
            name = f"{name[:MAX_GENE_NAME].replace('.', '_')}-{hashlib.sha256(gene.encode()).hexdigest()[:12]}"
        out[gene] = f"{name}.png"
    return out


def _owner(answer: Answer) -> np.ndarray:
    """Return the index of the tile that covers each pixel of the overview, int32 (H, W): -1 for no tile, the last of several."""
    owner = np.full(answer.image.shape[:2], -1, np.int32)
    half = answer.tile_px / 2
    low = np.floor((answer.xy_N2 - half) * answer.scale).astype(int).clip(0)
    high = np.maximum(np.ceil((answer.xy_N2 + half) * answer.scale).astype(int), low + 1)
    for i in range(len(low)):
        owner[low[i, 1] : high[i, 1], low[i, 0] : high[i, 0]] = i
    return owner


def _figure(image_HW3: np.ndarray, owner_HW: np.ndarray, values_N: np.ndarray, gene: str, mpp: float) -> Figure:
    """Draw the overview with the tiles coloured by the values of one gene, a colour bar and a scale bar."""
    low, high = (float(v) for v in np.quantile(values_N, QUANTILES))
    norm, colours = Normalize(low, high if high > low else low + 1e-6, clip=True), colormaps["viridis"]
    picture = np.asarray(image_HW3, np.float32) / 255
    shown = owner_HW >= 0
    picture[shown] = (1 - OPACITY) * picture[shown] + OPACITY * colours(norm(values_N[owner_HW[shown]]))[:, :3]
    height, width = owner_HW.shape
    figure = Figure(figsize=(width / 100 + 1.5, height / 100 + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(plain(gene), parse_math=False)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="log1p counts per 10,000, predicted")
    axes.autoscale(False)
    scale_bar(axes, mpp, (0, width, 0, height))
    return figure


def write_geojson(answer: Answer, genes: Sequence[str] | None, path: Path) -> int:
    """Write the tiles as polygons with measurements, in px of the slide, as QuPath reads them.

    Parameters
    ----------
    answer
        The prediction.
    genes
        Genes to write; None writes all if there are at most :data:`MAX_MEASUREMENTS`.
    path
        Path of the ``.geojson`` file to write.

    Returns
    -------
    Number of tiles.

    Raises
    ------
    ValueError
        A gene was not predicted, or there are too many genes.
    """
    check_measurements(answer.genes, genes, str(answer.path))
    named = list(answer.genes if genes is None else genes)
    columns, half = answer.columns(named), answer.tile_px / 2
    with atomic_path(path) as tmp_path, tmp_path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for start, values in answer.rows(columns):
            for i, row in enumerate(values.tolist(), start=start):
                feature = _feature(answer.xy_N2[i], half, answer.names[i], dict(zip(named, row, strict=True)))
                file.write((",\n" if i else "\n") + json.dumps(feature))
        file.write("\n]}\n")
    return len(answer.names)


def _feature(xy: np.ndarray, half: float, name: str, measurements: dict[str, float]) -> dict[str, object]:
    """Return the GeoJSON feature of one tile."""
    x0, y0, x1, y1 = (round(float(v), 2) for v in (*(xy - half), *(xy + half)))
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
        "properties": {
            "objectType": "tile",
            "name": name,
            "measurements": {k: round(v, 5) for k, v in measurements.items()},
        },
    }
