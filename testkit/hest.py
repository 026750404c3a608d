"""Synthetic HEST-1k folder, for tests of the reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import sparse

GENES = ("ERBB2", "KRT14", "CD74", "GAPDH", "BLANK_0012")
PATCH_UM, PATCH_PX = 112.0, 224


@dataclass(frozen=True)
class HestSection:
    """One synthetic section."""

    id: str
    technology: str = "Visium"
    species: str = "Homo sapiens"
    organ: str = "Breast"
    patient: str = ""
    mpp: float = 0.7
    side: int = 5
    """Number of spots in a row and in a column."""
    pitch_um: float = 100.0
    title: str = "A study, with a comma"

    def pooled(self) -> bool:
        """Return whether the spots are pooled squares."""
        return self.technology in ("Xenium", "Visium HD")


DEFAULT = (
    HestSection("TENX1", patient="Patient 1"),
    HestSection("TENX2", technology="Xenium", organ="Lung"),
    HestSection(
        "MISC3", species="Mus musculus", organ="Brain", technology="Spatial Transcriptomics", pitch_um=200.0, mpp=1.4
    ),
)


def picture(section: HestSection) -> np.ndarray:
    """Return the WSI, uint8 (H, W, 3) RGB: red encodes the column, green the row, and blue adds texture."""
    width = round((section.side + 1) * section.pitch_um / section.mpp)
    y, x = np.mgrid[0:width, 0:width]
    blue = 150 + 60 * np.sin(x / 9) * np.cos(y / 13)
    return np.stack([40 + 180 * x / width, 40 + 180 * y / width, blue], axis=-1).astype(np.uint8)


def spots(section: HestSection) -> tuple[list[str], np.ndarray]:
    """Return barcodes, and spot centres in px of the WSI, float (n, 2)."""
    row, column = np.divmod(np.arange(section.side**2), section.side)
    ids = [f"{r:03d}x{c:03d}" if section.pooled() else f"BC{r}{c}-1" for r, c in zip(row, column, strict=True)]
    return ids, (np.stack([column, row], axis=1) + 1) * section.pitch_um / section.mpp


def counts(section: HestSection) -> np.ndarray:
    """Return raw counts, (spots, genes)."""
    seed = sum(section.id.encode())
    return np.random.default_rng(seed).poisson(3, (section.side**2, len(GENES)))


def write_hest(
    folder: Path,
    sections: Sequence[HestSection] = DEFAULT,
    *,
    wsis: bool = True,
    patches: bool = True,
    img: bool = True,
    without_patch: int = 3,
) -> Path:
    """Write the folder and return it.

    Parameters
    ----------
    folder
        Folder to write.
    sections
        Its sections.
    wsis, patches
        Whether to write WSIs and patches. Patches are in another order than spots.
    img
        Whether patch files contain pixels.
    without_patch
        Number of spots, from the first one, that have no patch.
    """
    for section in sections:
        write_st(folder / "st" / f"{section.id}.h5ad", section)
        write_metadata(folder / "metadata" / f"{section.id}.json", section)
        if wsis:
            write_wsi(folder / "wsis" / f"{section.id}.tif", section)
        if patches:
            write_patches(folder / "patches" / f"{section.id}.h5", section, without_patch, img=img)
    write_table(folder / "HEST_v1_1_0.csv", sections)
    return folder


def write_table(path: Path, sections: Sequence[HestSection]) -> None:
    """Write the table of sections, with a byte order mark as in HEST."""
    rows = [
        {
            "dataset_title": s.title,
            "id": s.id,
            "image_filename": f"{s.id}.tif",
            "organ": s.organ,
            "species": s.species,
            "patient": s.patient,
            "st_technology": s.technology,
            "license": "CC BY 4.0",
            "study_link": "https://example.org",
            "pixel_size_um_estimated": s.mpp,
            "inter_spot_dist": "" if s.pooled() else s.pitch_um,
            "spot_diameter": "" if s.pooled() else s.pitch_um * 0.55,
        }
        for s in sections
    ]
    pd.DataFrame(rows).to_csv(path, index=False, encoding="utf-8-sig")


def write_metadata(path: Path, section: HestSection) -> None:
    """Write the metadata JSON of one section."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = picture(section).shape[1]
    facts = {
        "id": section.id,
        "organ": section.organ,
        "species": section.species,
        "st_technology": section.technology,
        "pixel_size_um_estimated": section.mpp,
        "pixel_size_um_embedded": None,
        "fullres_px_width": width,
        "fullres_px_height": width,
    }
    path.write_text(json.dumps(facts), encoding="utf-8")


def write_st(path: Path, section: HestSection) -> None:
    """Write the h5ad with counts (uint16 for pooled sections), positions and a downscaled image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, xy = spots(section)
    row, column = np.divmod(np.arange(len(ids)), section.side)
    obs = pd.DataFrame(
        {
            "in_tissue": 1,
            "array_row": row,
            "array_col": column,
            "pxl_col_in_fullres": xy[:, 0],
            "pxl_row_in_fullres": xy[:, 1],
        },
        index=ids,
    )
    image = Image.fromarray(picture(section))
    small = np.asarray(image.resize((image.width // 4, image.height // 4), Image.Resampling.BOX))
    factors = {"tissue_downscaled_fullres_scalef": 0.25, "spot_diameter_fullres": 55 / section.mpp}
    spatial = {"ST": {"images": {"downscaled_fullres": small}, "scalefactors": factors}}
    matrix = sparse.csr_matrix(counts(section).astype(np.uint16 if section.pooled() else np.float32))
    data = ad.AnnData(matrix, obs, pd.DataFrame(index=list(GENES)), uns={"spatial": spatial}, obsm={"spatial": xy})
    data.write_h5ad(path)


def write_wsi(path: Path, section: HestSection) -> None:
    """Write the WSI as a tiled BigTIFF with three levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture(section))
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for level in range(3):
            size = (image.width >> level, image.height >> level)
            pixels = np.asarray(image.resize(size, Image.Resampling.BOX) if level else image)
            out.write(pixels, tile=(256, 256), photometric="rgb", subfiletype=int(level > 0))


def write_patches(path: Path, section: HestSection, without_patch: int, *, img: bool = True) -> None:
    """Write patches of 224 px at 0.5 um per px, uncompressed and one per chunk; ``coords`` are top-left corners.

    The first ``without_patch`` spots have none; without ``img``, the file has no pixels.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, xy = spots(section)
    width = round(PATCH_UM / section.mpp)
    order = np.random.default_rng(0).permutation(np.arange(without_patch, len(ids)))
    corners = np.rint(xy[order] - width / 2).astype(np.int64)
    white = Image.fromarray(np.pad(picture(section), ((width, width), (width, width), (0, 0)), constant_values=255))
    pixels = [
        np.asarray(
            white.resize(
                (PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS, box=(x + width, y + width, x + 2 * width, y + 2 * width)
            )
        )
        for x, y in corners
    ]
    with h5py.File(path, "w") as file:
        file["coords"] = corners
        file["barcode"] = np.array([[ids[i]] for i in order], dtype=h5py.string_dtype())
        if img:
            file.create_dataset("img", data=np.stack(pixels), chunks=(1, PATCH_PX, PATCH_PX, 3))
        target = file["img" if img else "coords"]
        target.attrs["patch_size_src"], target.attrs["patch_size_target"] = width, PATCH_PX
        target.attrs["pixel_size"], target.attrs["name"] = section.mpp, section.id
