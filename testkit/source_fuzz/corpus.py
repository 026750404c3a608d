"""Small valid sources of every format, which are the starting point of mutations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import sparse

from testkit.hest import HestSection, write_hest
from testkit.stimage import StSlide, write_stimage
from testkit.tenx import he_picture, write_h5, write_mex, write_segmentation, write_visium_hd, write_xenium
from testkit.tiny import SYMBOLS, TinySection, write_tiny_source

N_SPOTS, PITCH = 24, 25.0
IDS = ("ENSG00000141736", "ENSG00000019582", "ENSG00000119888", "ENSG00000198851", "ENSG00000108821")
NAMES = ("ERBB2", "CD74", "EPCAM", "CD3E", "COL1A1")
ROW, COL = np.divmod(np.arange(N_SPOTS), 6)
COL = COL * 2 + ROW % 2
XY = np.column_stack([30 + COL * PITCH / 2, 30 + ROW * PITCH * 0.866])
BARCODES = ["".join("ACGT"[i >> 2 * k & 3] for k in range(16)) + "-1" for i in range(N_SPOTS)]
COUNTS = np.random.default_rng(3).poisson(3, (N_SPOTS, len(IDS)))


@dataclass(frozen=True)
class Source:
    """Description of how one source is written and opened."""

    write: Callable[[Path], Path]
    """Writes the source into an empty folder and returns the path to open."""
    fmt: str = "auto"
    """Format, or ``slide`` for an image without spots."""
    facts: dict[str, str] = field(default_factory=dict)
    """Facts and options with which it is opened."""
    section: str = ""
    """Section to predict on, if the source has several."""


def _visium_folder(folder: Path) -> Path:
    (folder / "spatial").mkdir(parents=True)
    table = {"barcode": BARCODES, "in_tissue": 1, "array_row": ROW, "array_col": COL}
    xy = XY.round().astype(int)
    table |= {"pxl_row_in_fullres": xy[:, 1], "pxl_col_in_fullres": xy[:, 0]}
    pd.DataFrame(table).to_csv(folder / "spatial/tissue_positions.csv", index=False)
    factors = {"spot_diameter_fullres": 14.0, "tissue_hires_scalef": 1.0, "tissue_lowres_scalef": 0.3}
    (folder / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    he_picture(220, 160).save(folder / "spatial/tissue_hires_image.png")
    return folder


def visium_h5(folder: Path) -> Path:
    """Write a Visium run with an h5 matrix."""
    write_h5(_visium_folder(folder) / "filtered_feature_bc_matrix.h5", COUNTS.T, BARCODES, IDS, NAMES)
    return folder


def visium_mex(folder: Path) -> Path:
    """Write a Visium run with a matrix in Market Exchange format."""
    write_mex(_visium_folder(folder) / "filtered_feature_bc_matrix", COUNTS.T, BARCODES, IDS, NAMES)
    return folder


def visium_hd(folder: Path) -> Path:
    """Write Visium HD bins and segmented cells, with an image."""
    rng = np.random.default_rng(0)
    offset = np.array([[0.25, 0, 0], [0, 0.25, 0]])
    write_visium_hd(folder, 16, rng.poisson(0.5, (4, 256)), np.ones((16, 16), bool), offset)
    write_segmentation(folder, rng.poisson(1, (4, 30)), rng.uniform(5, 60, (30, 2)), 4.0, 2.0)
    he_picture(64, 64).save(folder / "tissue_image.tif")
    return folder


def xenium(folder: Path) -> Path:
    """Write a Xenium run."""
    rng, n = np.random.default_rng(0), 400
    names = ["ERBB2", "KRT14", "CD74", "GAPDH", "BLANK_1"]
    xy = rng.uniform(0, 200, (2, n))
    table = {"feature_name": rng.choice(names, n), "qv": rng.choice([10.0, 30.0], n), "x_location": xy[0]}
    table |= {"y_location": xy[1], "cell_id": rng.choice(["a-1", "b-1", "c-1", "UNASSIGNED"], n)}
    write_xenium(folder, pd.DataFrame(table))
    he_picture(100, 100).save(folder / "a_he_image.ome.tif")
    (folder / "a_he_imagealignment.csv").write_text(f"{2 / 0.2125},0,0\n0,{2 / 0.2125},0\n0,0,1\n")
    return folder


def xenium_csv(folder: Path) -> Path:
    """Write a Xenium run whose tables are csv.gz."""
    xenium(folder)
    for name in ("transcripts", "cells"):
        pd.read_parquet(folder / f"{name}.parquet").to_csv(folder / f"{name}.csv.gz", index=False)
        (folder / f"{name}.parquet").unlink()
    return folder


def anndata(folder: Path) -> Path:
    """Write an AnnData with sparse counts and an image."""
    obs = {"in_tissue": 1, "array_row": ROW, "array_col": COL, "library_id": pd.Categorical(["lib"] * N_SPOTS)}
    var = pd.DataFrame({"gene_ids": IDS}, index=pd.Index(NAMES))
    data = ad.AnnData(sparse.csr_matrix(COUNTS.astype(np.float32)), pd.DataFrame(obs, index=pd.Index(BARCODES)), var)
    data.obsm["spatial"] = XY
    factors = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 14.0}
    data.uns["spatial"] = {"lib": {"images": {"hires": np.asarray(he_picture(220, 160))}, "scalefactors": factors}}
    folder.mkdir(parents=True, exist_ok=True)
    data.write_h5ad(folder / "a.h5ad")
    return folder / "a.h5ad"


def anndata_dense(folder: Path) -> Path:
    """Write an AnnData with normalised values in X, dense counts in a layer, and a separate image."""
    path = anndata(folder)
    data = ad.read_h5ad(path)
    data.layers["counts"] = data.X.toarray()
    data.X = np.log1p(data.layers["counts"])
    del data.uns["spatial"]
    data.write_h5ad(path)
    he_picture(220, 160).save(folder / "slide.png")
    return path


def manifest(folder: Path) -> Path:
    """Write a table of sections with tsv.gz counts, and a tiled TIFF instead of one image."""
    write_tiny_source(folder, [TinySection("a", "d", "train"), TinySection("b", "e", "val")], side=3)
    pixels = np.asarray(Image.open(folder / "a.png").convert("RGB"))
    tifffile.imwrite(folder / "a.png", pixels, tile=(64, 64), photometric="rgb", resolution=(72, 72))
    return folder


def stimage(folder: Path) -> Path:
    """Write two slides of STimage-1K4M."""
    return write_stimage(
        folder, [StSlide("Human_Breast_A_ST_A1", mpp=4.0), StSlide("GSE1_GSM2", "Visium", mpp=2.0, drawn_um=55.0)]
    )


def hest(folder: Path) -> Path:
    """Write one section of HEST-1k."""
    write_hest(folder, [HestSection("TENX1", patient="Patient 1", side=4, mpp=3.0)])
    return folder


def legacy(folder: Path) -> Path:
    """Write a legacy ST section."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = (a.ravel() for a in np.meshgrid(np.arange(2, 8), np.arange(2, 8)))
    values = np.random.default_rng(1).poisson(3, (36, len(SYMBOLS)))
    names = [f"{a}x{b}" for a, b in zip(x, y, strict=True)]
    pd.DataFrame(values, names, list(SYMBOLS)).to_csv(folder / "S1.tsv.gz", sep="\t")
    spots = {"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": x * 20, "pixel_y": y * 20, "selected": 1}
    pd.DataFrame(spots).to_csv(folder / "S1_selection.tsv", sep="\t", index=False)
    he_picture(240, 240).save(folder / "S1_HE.jpg")
    return folder


def slide(folder: Path) -> Path:
    """Write a pyramid TIFF of 16-bit RGB with OME-XML, opened as a slide without spots."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(he_picture(300, 200)).astype(np.uint16) * 257
    with tifffile.TiffWriter(folder / "s.ome.tif", ome=True) as out:
        meta = {"axes": "YXS", "PhysicalSizeX": 0.5}
        out.write(pixels, subifds=1, tile=(64, 64), photometric="rgb", compression="deflate", metadata=meta)
        out.write(pixels[::2, ::2], subfiletype=1, tile=(64, 64), photometric="rgb", compression="deflate")
    return folder / "s.ome.tif"


def slide_pages(folder: Path) -> Path:
    """Write a TIFF of a palette thumbnail and an uncompressed RGBA page."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(he_picture(300, 200))
    rgba = np.dstack([pixels, np.full((200, 300), 200, np.uint8)])
    with tifffile.TiffWriter(folder / "s.tif") as out:
        out.write(pixels[::8, ::8, 0] // 64, photometric="palette", colormap=np.arange(768, dtype="u2").reshape(3, 256))
        out.write(rgba, tile=(64, 64), photometric="rgb", extrasamples=["unassalpha"], resolution=(20_000, 20_000))
    return folder / "s.tif"


SPATIAL_FACTS = {"tissue": "breast", "species": "human", "platform": "Visium"}
SOURCES: dict[str, Source] = {
    "visium h5": Source(visium_h5, facts={"tissue": "breast", "image": "hires"}),
    "visium mex": Source(visium_mex, facts={"tissue": "breast", "image": "hires"}),
    "visium hd": Source(visium_hd, facts={"tissue": "breast", "pool_um": "64"}),
    "visium hd cells": Source(visium_hd, facts={"tissue": "breast", "pool_from": "cells", "pool_um": "64"}),
    "xenium": Source(xenium, facts={"tissue": "breast"}),
    "xenium cells": Source(xenium, facts={"tissue": "breast", "pool_from": "cells"}),
    "xenium csv": Source(xenium_csv, facts={"tissue": "breast", "min_pooled": "1"}),
    "anndata": Source(anndata, facts=SPATIAL_FACTS),
    "anndata dense": Source(anndata_dense, facts=SPATIAL_FACTS | {"image": "slide.png"}),
    "manifest": Source(manifest, section="a"),
    "stimage": Source(stimage, section="Human_Breast_A_ST_A1"),
    "hest": Source(hest),
    "legacy": Source(legacy, facts={"tissue": "breast", "species": "human"}),
    "slide": Source(slide, fmt="slide"),
    "slide pages": Source(slide_pages, fmt="slide"),
}
"""``fmt="slide"`` is an image without spots, opened as ``comtip predict`` does."""
