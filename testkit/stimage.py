"""Synthetic STimage-1K4M folder, for tests of the reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

GENES = ("ERBB2", "KRT14", "CD74", "GAPDH")


@dataclass(frozen=True)
class StSlide:
    """One synthetic slide."""

    slide: str
    tech: str = "ST"
    species: str = "human"
    tissue: str = "breast"
    mpp: float = 4.0
    drawn_um: float = 100.0
    """Spot diameter in um that the radius ``r`` states."""
    picture: str = "TIFF"
    """Actual format of the ``.png`` file."""

    @property
    def pitch_um(self) -> float:
        """Centre-to-centre spot distance in um."""
        return 200.0 if self.tech == "ST" else 100.0


DEFAULT = (
    StSlide("Human_Breast_A_01012020_ST_A1"),
    StSlide("GSE1_GSM2", "Visium", mpp=1.0, drawn_um=65.0, picture="PNG"),
    StSlide("Mouse_Brain_10X_x", "Visium", "mouse", "brain", mpp=2.0, drawn_um=55.0, picture="JPEG"),
)


def counts(one: StSlide, side: int = 4) -> pd.DataFrame:
    """Return raw counts of ``side ** 2`` spots, (spots, genes); spots are named by slide and array position."""
    names = [f"{one.slide}_{x}x{y}" for x in range(1, side + 1) for y in range(1, side + 1)]
    seed = sum(one.slide.encode())
    return pd.DataFrame(
        np.random.default_rng(seed).poisson(4, (len(names), len(GENES))), index=names, columns=list(GENES)
    )


def coord(one: StSlide, side: int = 4) -> pd.DataFrame:
    """Return the table of positions in px, with y before x and the radius in every row."""
    step = one.pitch_um / one.mpp
    rows = [
        (f"{one.slide}_{x}x{y}", y * step + 3.25, x * step, one.drawn_um / 2 / one.mpp)
        for x in range(1, side + 1)
        for y in range(1, side + 1)
    ]
    return pd.DataFrame(rows, columns=["", "yaxis", "xaxis", "r"]).set_index("")


def write_slide(folder: Path, one: StSlide, side: int = 4) -> None:
    """Write the three files of a slide; counts have the reverse row order of positions."""
    tech = folder / one.tech
    for name in ("coord", "gene_exp", "image"):
        (tech / name).mkdir(parents=True, exist_ok=True)
    coord(one, side).to_csv(tech / "coord" / f"{one.slide}_coord.csv")
    counts(one, side).iloc[::-1].to_csv(tech / "gene_exp" / f"{one.slide}_count.csv")
    width = round((side + 1) * one.pitch_um / one.mpp)
    y, x = np.mgrid[0 : width + 20, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / (width + 20), np.full(x.shape, 120)], axis=-1).astype(np.uint8)
    with (tech / "image" / f"{one.slide}.png").open("wb") as file:
        Image.fromarray(pixels).save(file, one.picture)


def write_stimage(folder: Path, slides: Sequence[StSlide] = DEFAULT) -> Path:
    """Write the folder and return it; the table has the newest format, and titles with commas and quotes."""
    for one in slides:
        write_slide(folder, one)
    write_meta(folder / "meta" / "meta_all_gene02122025.csv", slides)
    return folder


def write_meta(path: Path, slides: Sequence[StSlide], *, sep: str = ",", title: str = 'Title 1: "A", and B.') -> None:
    """Write the metadata table of slides, separated by ``sep``, with the same title for all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "slide": s.slide,
            "species": s.species,
            "tissue": s.tissue,
            "pmid": "123,456",
            "title": title,
            "abstract": "a\nb",
            "tech": s.tech,
            "spot_num": "16",
            "gene_num": "4",
        }
        for s in slides
    ]
    pd.DataFrame(rows).to_csv(path, sep=sep, index=False, quoting=1 if sep == "," else 0)
