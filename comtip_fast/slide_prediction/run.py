"""Prediction of one slide: encode and predict tiles in pieces, and join the pieces in one AnnData file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import SourceError
from comtip_shards.progress import Progress
from comtip_shards.slides.appearance import looks_like_he
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import open_slide
from comtip_shards.slides.pixel_scale import check_side, check_stated_mpp
from comtip_shards.slides.tiles import StainStats, stain_stats
from comtip_shards.sources.hdf5.opening import open_hdf5
from PIL import Image

from comtip_fast._version import __version__
from comtip_fast.constants import LAYER_CP10K, LAYER_RAW, UNS
from comtip_fast.data.h5ad import MatrixRows, write_h5ad
from comtip_fast.data.sections import MPP_RANGE, OVERVIEW_PX, attach_image
from comtip_fast.data.tile_sources import SlideTiles, TileGeometry
from comtip_fast.inference import GeneQuery, Predictor, SectionPrediction
from comtip_fast.slide_prediction.grid import GridOptions, TileGrid, tissue_grid
from comtip_fast.slide_prediction.pieces import PieceFeatures, Pieces, feature_name, value_name
from comtip_fast.slide_prediction.tissue import tissue_mask

log = logging.getLogger("comtip_fast")
MASK_PX = 2048
"""Maximum side of the overview in which tissue is found."""
PIECE_TILES = 256
"""Number of tiles per piece of features; a killed process loses at most one piece."""
PIECE_BYTES = 64 << 20
"""Approximate size of a piece of predictions."""
STAIN_TILES = 512
"""Tiles, evenly spaced over the tissue, from which stain statistics are computed."""
HASHED_BYTES, HASHED_BLOCK = 64 << 20, 64 << 10
"""Number of bytes that are hashed of a large file, to detect a changed slide, and number of bytes per block."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SlideRequest:
    """Genes, scale and grid of a prediction."""

    queries: list[GeneQuery]
    """The G genes."""
    var: pd.DataFrame
    """Annotation of the genes, ``var`` of the output."""
    cohort: str | None
    """``species_organ``, whose head of the readout is used; None uses the mean over the heads that predict a gene."""
    provenance: dict[str, str]
    """Record of the model and of stated facts, ``uns["comtip"]`` of the output."""
    mpp: float | None = None
    """um per px; None uses the scale of the file."""
    trust_mpp: bool = False
    """Whether ``mpp`` is used although the file, or the size of the slide, contradicts it."""
    grid: GridOptions = field(default_factory=GridOptions)
    progress: bool = False
    """Whether to show a progress bar on a terminal, or log the progress otherwise."""


@dataclass
class _Layout:
    """A slide, its scale and the tiles to predict."""

    slide: Slide
    name: str
    mpp: float
    grid: TileGrid
    overview: np.ndarray
    tile: TileGeometry

    def tiles(self, rows: slice | np.ndarray) -> SlideTiles:
        """Return some tiles of the slide, which stays open."""
        return SlideTiles(lambda: nullcontext(self.slide), self.grid.xy_N2[rows], self.mpp, self.tile)


def predict_slide(predictor: Predictor, path: Path, out: Path, request: SlideRequest) -> bool:
    """Predict genes on the tissue of a slide and write an AnnData file.

    After an interruption, the next call resumes from the pieces in ``.NAME.parts`` next to ``out``; the file has the same bytes
    as without an interruption.

    Parameters
    ----------
    predictor
        The model.
    path
        Image or whole-slide file.
    out
        Path of the ``.h5ad`` file to write.
    request
        What to predict.

    Returns
    -------
    Whether the slide was predicted; False if ``out`` already holds this prediction.

    Raises
    ------
    SourceError
        The slide cannot be read or shows no tissue; or its scale is missing, is not plausible, or is contradicted by the file or by
        the size of the slide.
    ValueError
        The grid has too many tiles.
    FileExistsError
        Another process predicts the same output, or the folder of the pieces is a file or contains other files.
    """
    with open_slide(path) as slide:
        plan = _plan(predictor, path, slide, request)
        with Pieces(out, plan) as pieces:
            if stored_plan(out) == pieces.plan:
                log.info("%s: already complete; not predicted again", out)
                pieces.remove()
                return False
            if pieces.discarded:
                log.warning(
                    "%s: deleted the pieces in %s, which were computed for another slide or model, or with other settings",
                    out,
                    pieces.folder,
                )
            layout = _layout(slide, path, predictor, request)
            prediction = SectionPrediction(predictor, request.queries, request.cohort)
            _encode(layout, prediction, pieces, request.progress)
            size = _predict(layout, prediction, pieces, request.progress)
            _join(layout, request, pieces, out, size)
            pieces.remove()
    return True


def stored_plan(out: Path) -> str:
    """Return the hash of the plan that ``out`` was computed from; empty if ``out`` is not a complete prediction."""
    try:
        with open_hdf5(out, "an .h5ad", "delete it") as file:
            value = file[f"uns/{UNS}/plan"][()]
    except (SourceError, OSError, KeyError, TypeError):
        return ""
    return value.decode() if isinstance(value, bytes) else str(value)


def _plan(predictor: Predictor, path: Path, slide: Slide, request: SlideRequest) -> dict[str, Any]:
    """Return everything that the output depends on."""
    return {
        "format": FORMAT,
        "version": __version__,
        "model": predictor.fingerprint,
        "precision": [predictor.config.train.precision, predictor.device.type],
        "slide": [path.name, _content(path), slide.reader, list(slide.size)],
        "mpp": _scale(slide, path, request),
        "grid": asdict(request.grid),
        "pieces": [PIECE_TILES, PIECE_BYTES, MASK_PX, STAIN_TILES],
        "genes": [[q.symbol, q.name, q.key] for q in request.queries],
        "cohort": request.cohort,
        "var": request.var.to_csv(),
        "provenance": request.provenance,
    }


def _content(path: Path) -> str:
    """Return a hash of the files of a slide.

    It includes all bytes of a file up to :data:`HASHED_BYTES`, and evenly spaced blocks of a larger file. The pixels of a ``.mrxs``
    file are in a folder of the same name.
    """
    inner = sorted(p for p in path.with_suffix("").rglob("*") if p.is_file()) if path.suffix.lower() == ".mrxs" else []
    digest = hashlib.sha256()
    for part in (path, *inner):
        size = part.stat().st_size
        digest.update(f"{part.name}\n{size}\n".encode())
        n = HASHED_BYTES // HASHED_BLOCK
        starts = (
            range(0, size, HASHED_BLOCK)
            if size <= HASHED_BYTES
            else np.linspace(0, size - HASHED_BLOCK, n, dtype=np.int64)
        )
        with part.open("rb") as file:
            for start in starts:
                file.seek(int(start))
                digest.update(file.read(HASHED_BLOCK))
    return digest.hexdigest()


def _scale(slide: Slide, path: Path, request: SlideRequest) -> float:
    """Return um per px, stated or from the file; raise SourceError if it is missing, not plausible or contradicted."""
    mpp = slide.mpp if request.mpp is None else request.mpp
    if mpp is None:
        raise SourceError(f"{path}: the file states no resolution; set `mpp` to its um per px")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        fix = "set" if request.mpp is None else "correct"
        raise SourceError(
            f"{path}: {mpp:.10g} um per px is not plausible ({MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}); {fix} `mpp`"
        )
    check_side(slide.size, mpp, str(path), trusted=request.trust_mpp)
    return float(mpp)


def _layout(slide: Slide, path: Path, predictor: Predictor, request: SlideRequest) -> _Layout:
    """Find the tissue and lay out the tiles.

    Raise SourceError for an unusable scale (:func:`_scale`) or if no tile has enough tissue, and ValueError for too many tiles.
    """
    mpp = _scale(slide, path, request)
    if request.mpp is not None:
        check_stated_mpp(mpp, slide.mpp, "the file", str(path), trusted=request.trust_mpp)
    tile = TileGeometry(predictor.tile_px, predictor.tile_um, predictor.min_mpp)
    if tile.um / mpp < tile.px / 4 and mpp > tile.min_mpp:
        log.warning(
            "%s: at %g um per px a tile of %g um has only %.0f px and is enlarged to %d px; check `mpp`, or use a finer image",
            path,
            mpp,
            tile.um,
            tile.um / mpp,
            tile.px,
        )
    picture, factor = slide.overview(MASK_PX)
    mask = tissue_mask(picture, mpp * factor) if request.grid.min_tissue > 0 else np.ones(picture.shape[:2], bool)
    grid = tissue_grid(mask, slide.size, mpp, tile.um, request.grid)
    if not len(grid.xy_N2):
        width, height = (side * mpp for side in slide.size)
        raise SourceError(
            f"{path}: no tile of {tile.um:g} um has {100 * request.grid.min_tissue:.3g} % of its area on tissue: the image covers "
            f"{width:.0f} x {height:.0f} um at {mpp:g} um per px, and {100 * mask.mean():.1f} % of it is tissue; check that it is an "
            "H&E image and that `mpp` is correct, lower `min_tissue`, or set it to 0 to predict the complete image"
        )
    is_he, reason = looks_like_he(picture[mask][:, None])
    if not is_he:
        log.warning(
            "%s: the image may not be H&E (%s); the model was trained on H&E only, so check the prediction",
            path,
            reason,
        )
    covered = f"tissue, {mask.mean():.1%} of the image" if request.grid.min_tissue > 0 else "the complete image"
    log.info("%s: %d tiles of %g um on %s", path, len(grid.xy_N2), tile.um, covered)
    return _Layout(slide, path.stem, mpp, grid, _shrunk(picture), tile)


def _shrunk(picture_HW3: np.ndarray) -> np.ndarray:
    """Return the overview, downsampled to the size that is stored in the output (:data:`OVERVIEW_PX`) if it is larger."""
    height, width = picture_HW3.shape[:2]
    part = min(1.0, OVERVIEW_PX / max(height, width))
    size = (max(1, round(width * part)), max(1, round(height * part)))
    return np.asarray(Image.fromarray(picture_HW3).resize(size, Image.Resampling.LANCZOS))


def _encode(layout: _Layout, prediction: SectionPrediction, pieces: Pieces, show: bool) -> None:
    """Write the missing pieces of features."""
    n = len(layout.grid.xy_N2)
    starts = range(0, n, PIECE_TILES)
    todo = [i for i in range(len(starts)) if not pieces.has(feature_name(i))]
    if not todo:
        return
    stain = _stain(layout) if prediction.predictor.normalises_stain else None
    resumed = n - sum(min(PIECE_TILES, n - starts[i]) for i in todo)
    with Progress(f"{layout.name}: encoding", n, unit="tile", show=show, done=resumed) as done:
        for i in todo:
            rows = slice(starts[i], min(starts[i] + PIECE_TILES, n))
            tiles = layout.tiles(rows)
            features = np.empty((len(tiles), prediction.width), np.float32)
            for chunk in tiles.ahead():
                features[chunk.rows] = prediction.encode(chunk.tiles_NSS3, stain)
                done.update(len(chunk.rows))
            pieces.write(feature_name(i), features)


def _stain(layout: _Layout) -> StainStats:
    """Return the stain statistics of the slide, from evenly spaced tiles of the grid."""
    n = len(layout.grid.xy_N2)
    rows = np.unique(np.linspace(0, n - 1, min(n, STAIN_TILES)).round().astype(np.int64))
    return stain_stats(tile for chunk in layout.tiles(rows).chunks() for tile in chunk.tiles_NSS3)


def _predict(layout: _Layout, prediction: SectionPrediction, pieces: Pieces, show: bool) -> int:
    """Write the missing pieces of predictions; return the number of tiles per piece."""
    n = len(layout.grid.xy_N2)
    size = min(prediction.block_spots, max(64, PIECE_BYTES // (8 * max(prediction.n_genes, 1))))
    starts = range(0, n, size)
    todo = [i for i in range(len(starts)) if not pieces.has(value_name(i))]
    if not todo:
        return size
    store = PieceFeatures(pieces, PIECE_TILES, prediction.width)
    whole = prediction.summarise(store, n, layout.grid.xy_N2)
    resumed = n - sum(min(size, n - starts[i]) for i in todo)
    with Progress(f"{layout.name}: prediction", n, unit="tile", show=show, done=resumed) as done:
        for i in todo:
            rows = np.arange(starts[i], min(starts[i] + size, n))
            values = np.empty((2, rows.size, prediction.n_genes), np.float32)
            for block in prediction.predict_rows(whole, rows):
                values[0, :, block.columns], values[1, :, block.columns] = block.values["cp10k"], block.values["raw"]
            pieces.write(value_name(i), values)
            done.update(rows.size)
    return size


def _join(layout: _Layout, request: SlideRequest, pieces: Pieces, out: Path, size: int) -> None:
    """Write the output from the pieces, one piece at a time."""
    grid, n = layout.grid, len(layout.grid.xy_N2)
    obs = pd.DataFrame(
        {
            "section_id": pd.Categorical([layout.name] * n),
            "array_col": grid.array_N2[:, 0],
            "array_row": grid.array_N2[:, 1],
            "tissue": grid.tissue_N,
        },
        index=pd.Index([f"{row}x{column}" for column, row in grid.array_N2.tolist()], dtype=object),
    )
    data = ad.AnnData(obs=obs, var=request.var, obsm={"spatial": grid.xy_N2.copy()})
    small_mpp = layout.mpp * layout.slide.size[0] / layout.overview.shape[1]
    attach_image(data, layout.name, layout.overview, layout.mpp, small_mpp, layout.tile.um)
    step = request.grid.step_um or layout.tile.um
    data.uns[UNS] = request.provenance | {
        "grid": request.grid.shape,
        "step_um": step,
        "tile_um": layout.tile.um,
        "mpp": layout.mpp,
        "plan": pieces.plan,
    }

    def rows_of(norm: int) -> Iterator[tuple[slice, np.ndarray]]:
        for i, start in enumerate(range(0, n, size)):
            values = pieces.read(value_name(i))[norm]
            yield slice(start, start + len(values)), values

    cp10k, raw = (MatrixRows((n, len(request.var)), partial(rows_of, norm)) for norm in (0, 1))
    write_h5ad(data, out, {"X": cp10k, f"layers/{LAYER_CP10K}": cp10k, f"layers/{LAYER_RAW}": raw})
