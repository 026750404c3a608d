"""Build speed and size on real sections, compared with HEST's layout: spots per second and bytes per spot.

    PYTHONPATH=.:data_shards python bench/shards/build.py [--samples her2st_C2,her2st_C3] [--rounds 3] [--jobs 2]

HEST's layout (hestcore, v1.3) is a patches h5 with ``img`` uint8 (N, px, px, 3), uncompressed with one patch per chunk,
``coords`` and ``barcode``, and an h5ad of raw counts. It is written here with h5py and anndata from the same sections,
with the same readers and the same tile code, but without checks, hashes or overviews, which is less work than a build.
Tiles are cut in three ways: blurred (224 um at 4 um/px, quality 95), and at the resolution of the image,
which keeps all detail, at quality 95 and 85.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from comtip_shards.builder.build import build_shards
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.sources import SectionSource, open_source

SAMPLES = Path(__file__).parents[2] / "data_shards/samples"
PX = 224


def write_hest(sources: Sequence[SectionSource], out: Path, tile_um: float, min_mpp: float) -> None:
    """Write sections in HEST's layout."""
    for folder in ("patches", "st"):
        (out / folder).mkdir(parents=True)
    for source in sources:
        section = source.read()
        name = section.meta.section_id
        with section.open_slide() as slide:
            tiles = slide.tiles(section.xy, section.meta.mpp, tile_um, PX, min_mpp)
        with h5py.File(out / f"patches/{name}.h5", "w") as file:
            file.create_dataset("img", data=tiles, chunks=(1, PX, PX, 3))
            half = tile_um / section.meta.mpp / 2
            file.create_dataset("coords", data=np.rint(section.xy - half).astype(np.int64))
            barcode = np.array(section.spot_ids, dtype=object)[:, None]
            file.create_dataset("barcode", data=barcode, dtype=h5py.string_dtype())
        obs = pd.DataFrame(
            {"in_tissue": 1, "pxl_col_in_fullres": section.xy[:, 0], "pxl_row_in_fullres": section.xy[:, 1]},
            index=section.spot_ids,
        )
        table = ad.AnnData(section.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=section.gene_ids))
        table.obsm["spatial"] = section.xy
        table.write_h5ad(out / f"st/{name}.h5ad")


def timed(work: Callable[[Path], object], out: Path, rounds: int) -> float:
    """Return the median seconds of ``rounds`` runs, each into a new folder."""
    seconds = []
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        work(out)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def size_of(folder: Path, pattern: str = "**/*") -> int:
    """Return the total bytes of the files that match a pattern."""
    return sum(p.stat().st_size for p in folder.glob(pattern) if p.is_file())


def parts(folder: Path) -> dict[str, float]:
    """Return bytes per spot of a shard set by content."""
    shards = ShardSet(folder)
    spots, n = range(len(shards)), len(shards)
    out = {f"{part} members": sum(map(len, shards.members(spots, part))) / n for part in ("tile", "expr", "json")}
    out["tar headers, padding"] = size_of(folder, "shards/*.tar") / n - sum(out.values())
    out["indexes, tables, manifest"] = (size_of(folder, "shards/*.idx") + size_of(folder, "*")) / n
    out["overviews, check reports"] = (size_of(folder, "overview/*") + size_of(folder, "report/*")) / n
    return out


def run(samples: list[str], tile_um: float, min_mpp: float, quality: int, rounds: int, jobs: int, folder: Path) -> None:
    """Print speed and size of both layouts for one way to cut the tiles."""
    sources = open_source(SAMPLES, samples=samples)
    how = {"tile_px": PX, "tile_um": tile_um, "min_mpp": min_mpp, "quality": quality}
    hest = timed(lambda out: write_hest(sources, out, tile_um, min_mpp), folder / "hest", rounds)
    one = timed(lambda out: build_shards(sources, out, **how), folder / "shards", rounds)
    many = timed(lambda out: build_shards(sources, out, jobs=jobs, **how), folder / "many", rounds)
    n = len(ShardSet(folder / "shards"))
    patches, counts = size_of(folder / "hest", "patches/*") / n, size_of(folder / "hest", "st/*") / n
    own = size_of(folder / "shards") / n
    cut = f"tiles of {tile_um:g} um in {PX} px, images blurred to {min_mpp:g} um/px, quality {quality}"
    print(f"\n{n} spots of {', '.join(samples)}; {cut}")
    print(f"{'':28}{'spots/s':>10}{'bytes/spot':>12}")
    print(f"{'HEST layout':28}{n / hest:10.0f}{patches + counts:12.0f}   (patches {patches:.0f}, h5ad {counts:.0f})")
    print(f"{'shards, 1 process':28}{n / one:10.0f}{own:12.0f}   1/{(patches + counts) / own:.1f} of the bytes")
    print(f"{f'shards, {jobs} processes':28}{n / many:10.0f}")
    for name, value in parts(folder / "shards").items():
        print(f"    {name:36}{value:10.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    breast = "her2st_C2,her2st_C3,her2st_C4,her2st_C5"
    parser.add_argument("--samples", default=breast, help=f"section ids, comma-separated (default {breast})")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way; the median is printed (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of the parallel build (default 2)")
    args = parser.parse_args()
    samples = args.samples.split(",")
    finest = min(s.meta.mpp for s in open_source(SAMPLES, samples=samples))
    with tempfile.TemporaryDirectory() as folder:
        for number, cut in enumerate(((224.0, 4.0, 95), (PX * finest, finest, 95), (PX * finest, finest, 85))):
            run(samples, *cut, args.rounds, args.jobs, Path(folder) / str(number))


if __name__ == "__main__":
    main()
