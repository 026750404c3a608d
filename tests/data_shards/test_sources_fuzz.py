"""Readers of mutated files return a section or raise an error that names the file; they never crash or hang."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import open_source

from testkit.tenx import NAMES, he_picture, write_segmentation, write_visium_hd, write_xenium

REAL = Path(__file__).parent / "fixtures/space_ranger"
CASES = {
    "heart": ("space_ranger", {"image": "lowres"}),
    "placenta": ("space_ranger", {"image": "lowres"}),
    "hd": ("visium_hd", {}),
    "hd cells": ("visium_hd", {"pool_from": "cells", "pool_um": "64"}),
    "xenium": ("xenium", {}),
    "xenium cells": ("xenium", {"pool_from": "cells"}),
}


def write(case: str, folder: Path) -> Path:
    """Return the folder of one case."""
    rng = np.random.default_rng(0)
    if case in ("heart", "placenta"):
        name = {"heart": "visium_sr1_h5", "placenta": "visium_sr3_mex"}[case]
        return Path(shutil.copytree(REAL / name, folder / name, copy_function=shutil.copyfile))
    if case.startswith("hd"):
        offset = np.array([[0.25, 0, 0], [0, 0.25, 0]])
        write_visium_hd(folder, 16, rng.poisson(0.5, (4, 256)), np.ones((16, 16), bool), offset)
        write_segmentation(folder, rng.poisson(1, (4, 30)), rng.uniform(5, 60, (30, 2)), 4.0, 2.0)
        he_picture(64, 64).save(folder / "tissue_image.tif")
        return folder
    n = 400
    table = pd.DataFrame(
        {
            "feature_name": rng.choice([*NAMES, "BLANK_1"], n),
            "qv": rng.choice([10.0, 30.0], n),
            "x_location": rng.uniform(0, 200, n),
            "y_location": rng.uniform(0, 200, n),
            "cell_id": rng.choice(["a-1", "b-1", "c-1", "UNASSIGNED"], n),
        }
    )
    write_xenium(folder / "x", table)
    he_picture(100, 100).save(folder / "x/a_he_image.ome.tif")
    (folder / "x/a_he_imagealignment.csv").write_text(f"{2 / 0.2125},0,0\n0,{2 / 0.2125},0\n0,0,1\n")
    return folder / "x"


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """Cut a file, change some of its bytes, or write one part of it over another."""
    data = bytearray(raw)
    kind, at = rng.integers(3), int(rng.integers(len(raw)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for offset in rng.integers(len(raw), size=rng.integers(1, 6)):
            data[offset] = rng.integers(256)
        return bytes(data)
    other = int(rng.integers(len(raw)))
    data[at : at + 20] = data[other : other + 20]
    return bytes(data)


@pytest.mark.parametrize("case", CASES)
def test_damaged_files_are_read_or_refused(case: str, tmp_path: Path):
    fmt, options = CASES[case]
    folder = write(case, tmp_path)
    facts = {"tissue": "any", **options}
    whole = open_source(folder, fmt=fmt, overrides=facts)[0].read()
    assert whole.counts.nnz > 0
    rng = np.random.default_rng(sum(map(ord, case)))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tif")
    messages: list[str] = []
    for _ in range(30):
        file = files[rng.integers(len(files))]
        raw = file.read_bytes()
        file.write_bytes(mutated(raw, rng))
        try:
            open_source(folder, fmt=fmt, overrides=facts)[0].read()
        except SourceError as error:
            messages.append(str(error))
        finally:
            file.write_bytes(raw)
    assert len(messages) > 4
    silent = [m for m in messages if str(folder) not in m and not m.startswith("section ")]
    assert not silent  # each says which file, or which section
