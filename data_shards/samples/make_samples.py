"""Build the sample sections of this folder from the published files; the output is byte-deterministic.

    python data_shards/samples/make_samples.py SOURCE

``SOURCE`` is a folder with a ``manifest.tsv`` and the files that it names. Counts are copied unchanged. Images finer than
2 um per px are resampled to this scale, and PNG is converted to JPEG; sizes and scale in the manifest, and spot positions,
refer to the written images.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import pandas as pd
from PIL import Image

FINEST_UM_PER_PX = 2.0
JPEG = {"format": "JPEG", "quality": 90, "subsampling": 0, "optimize": True}
SPLITS = {
    "her2st_C2": "train",
    "her2st_C3": "train",
    "her2st_C4": "train",
    "her2st_C5": "val",
    "her2st_A1": "test",
    "mob_Rep4": "train",
    "mob2k_1": "train",
    "mob2k_2": "train",
    "mob2k_3": "train",
    "mob2k_4": "val",
    "mob_Rep9": "test",
}
ATTRIBUTION = {
    "her2st": "Andersson et al., Nat Commun 2021, 12:6012; Zenodo 4751624; github almaan/her2st (CC BY 4.0)",
    "mob_stahl2016": "Stahl et al., Science 2016, aaf2403; images from github tare/Splotch (BSD-3-Clause), "
    "counts from github SpatialTranscriptomicsResearch/st_pipeline (MIT)",
    "mob_st2k": "Bergenstrahle, STUtility example data, github jbergenstrahle/STUtility (MIT)",
}
# The source does not state the animals of the four 2k-array sections, so they count as one donor.
DONOR_OF_UNKNOWN = {"mob_st2k": "mob_st2k_unstated"}


def make_section(row: pd.Series, source: Path, out: Path) -> pd.Series:
    """Write the files of one section to ``out`` and return its manifest row."""
    row = row.copy()
    folder = Path(str(row["dataset"]))
    (out / folder).mkdir(parents=True, exist_ok=True)
    for column in ("counts",):
        target = folder / Path(str(row[column])).name
        shutil.copyfile(source / str(row[column]), out / target)
        row[column] = target.as_posix()
    image = Image.open(source / str(row["image"])).convert("RGB")
    scale = min(1.0, float(row["mpp_um_per_px"]) / FINEST_UM_PER_PX)
    name = folder / (Path(str(row["image"])).stem + ".jpg")
    spots = pd.read_csv(source / str(row["spots"]), sep="\t", dtype=str, keep_default_na=False)
    if scale < 1 or not str(row["image"]).endswith(".jpg"):
        size = (round(image.width * scale), round(image.height * scale))
        shrunk = image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image
        shrunk.save(out / name, **JPEG)
        for column, factor in (("pixel_x", size[0] / image.width), ("pixel_y", size[1] / image.height)):
            spots[column] = [f"{float(v) * factor:.2f}" for v in spots[column]]
        row["mpp_um_per_px"] = round(float(row["mpp_um_per_px"]) * image.width / size[0], 4)
        row["image_width"], row["image_height"] = size
    else:
        shutil.copyfile(source / str(row["image"]), out / name)
    row["image"] = name.as_posix()
    row["spot_diameter_px"] = round(float(row["spot_diameter_um"]) / float(row["mpp_um_per_px"]), 2)
    row["spots"] = (folder / Path(str(row["spots"])).name).as_posix()
    spots.to_csv(out / str(row["spots"]), sep="\t", index=False, lineterminator="\n")
    row["donor"] = DONOR_OF_UNKNOWN.get(str(row["dataset"]), row["donor"])
    row["split"], row["attribution"] = SPLITS[str(row["sample_id"])], ATTRIBUTION[str(row["dataset"])]
    return row


def main() -> None:
    """Write every section, ``manifest.tsv`` and ``SHA256SUMS`` next to this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder that holds manifest.tsv and the published files")
    source: Path = parser.parse_args().source
    out = Path(__file__).resolve().parent
    Image.MAX_IMAGE_PIXELS = 200_000_000  # the largest published image has 92 million pixels
    table = pd.read_csv(source / "manifest.tsv", sep="\t")
    rows = [make_section(row, source, out) for _, row in table.iterrows() if row["sample_id"] in SPLITS]
    pd.DataFrame(rows).to_csv(out / "manifest.tsv", sep="\t", index=False, lineterminator="\n")
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.suffix in {".gz", ".tsv", ".jpg"})
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out).as_posix()}\n" for p in files]
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    print(f"{len(rows)} sections, {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
