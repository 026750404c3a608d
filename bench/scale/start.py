"""Seconds, CPU seconds, bytes read and peak memory up to the first batch and the first step, on a synthetic shard set.

    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py build --out SET --spots 1500000 --sections 1100 --genes 20000
    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py build --out SMALL --spots 3000 --sections 20 --genes 20000
    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py build --out TILES --spots 4000 --sections 20 --px 224 --grain 15
    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py measure SET [--fit-spots 50000]
    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py first-step SET SMALL [--ranks 2] [--set KEY=VALUE ...]

``build`` writes real shards whose tiles are drawn from a pool of 64 JPEGs and whose counts are drawn for 256 spots of a section
and repeated; a spot takes about 6 kB. ``--px 224`` changes the width of the tiles; ``--grain`` adds noise to them, so that a tile
has as many bytes as one of tissue, and takes as long to decode. ``measure`` prints one row for the data side alone. ``first-step`` starts
`comtip pretrain` with the demo's config on several ranks and prints the seconds from the start of the command to the first step,
and the peak memory of each rank up to there; the row of SMALL is what model, libraries and the start of processes cost without a
large set. Compare two commits by measuring one set in both checkouts on the same machine; on a shared machine compare CPU seconds.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.builder.jobs import run_jobs
from comtip_shards.builder.writer import RecordRun, SectionHead, write_set
from comtip_shards.format.manifest import TileSpec
from comtip_shards.format.record import encode_json, encode_tile
from comtip_shards.sections.section import SectionMeta
from comtip_shards.slides.tiles import StainStats
from PIL import Image
from scipy import sparse

from comtip_fast.config.io import load_config
from comtip_fast.data.expression.training_tables import training_tables
from comtip_fast.data.loaders.torch import TorchLoader

PX, TILE_UM, QUALITY = 128, 224.0, 80
TILE = TileSpec(PX, TILE_UM, TILE_UM / PX, "jpeg", QUALITY)
"""Tile of a set unless its command states another width."""
POOL, COUNTS, BATCH = 64, 256, 256


@dataclass(frozen=True)
class SyntheticSection:
    """One section of log-normal counts, whose depth and detection differ between sections."""

    number: int
    n_spots: int
    n_genes: int
    split: str
    tile: TileSpec = TILE
    grain: float = 0.0
    """Standard deviation of the noise of the tiles, in grey levels."""

    def head(self) -> SectionHead:
        """Return everything except the records."""
        name = f"s{self.number:05d}"
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 150, 200)).save(out, "JPEG")
        meta = SectionMeta(
            section_id=name,
            dataset="synthetic",
            species="human",
            tissue="breast",
            donor=f"d{self.number}",
            platform="none",
            licence="CC0",
            attribution="synthetic",
            mpp=self.tile.min_mpp,
            spot_diameter_um=55.0,
            spot_pitch_um=100.0,
            split=self.split,
        )
        source = {
            "dropped_spots": {},
            "genes": "",
            "notes": [],
            "beside": [],
            "checks": [],
            "print": {"spots": "", "picture": "A" * 43 + "="},
        }
        keys = [f"human:GENE{i}" for i in range(self.n_genes)]
        stain = StainStats((0.3, 0.5, 0.3), (0.1, 0.1, 0.1))
        return SectionHead(
            meta, f"{self.number:064x}", self.n_spots, keys, stain, out.getvalue(), self.tile.min_mpp, source
        )

    def runs(self, size: int) -> Iterator[RecordRun]:
        """Yield the records, ``size`` spots at a time."""
        rng = np.random.default_rng([1, self.number])
        pool = [encode_tile(_pixels(i, self.tile.px, self.grain), "jpeg", QUALITY) for i in range(POOL)]
        share = np.random.default_rng(0).lognormal(0, 2, self.n_genes)
        share /= share.sum()
        depth = rng.lognormal(6.8, 0.4, COUNTS)
        drawn = sparse.csr_matrix(rng.poisson(depth[:, None] * share))
        for start in range(0, self.n_spots, size):
            n = min(size, self.n_spots - start)
            own = drawn[rng.integers(COUNTS, size=n)]
            jsons = [
                encode_json(
                    {
                        "section_id": f"s{self.number:05d}",
                        "spot_id": str(start + i),
                        "source_row": start + i,
                        "x_px": float((start + i) % 100 * 30),
                        "y_px": float((start + i) // 100 * 30),
                    }
                )
                for i in range(n)
            ]
            tiles = [pool[i] for i in rng.integers(POOL, size=n)]
            yield RecordRun(tiles, jsons, own.indptr.astype(np.int64), own.indices.astype(np.int64), own.data)


def _pixels(number: int, px: int, grain: float) -> np.ndarray:
    rng = np.random.default_rng([2, number])
    small = Image.fromarray(rng.integers(120, 255, (4, 4, 3), np.uint8))
    smooth = np.asarray(small.resize((px, px), Image.Resampling.BICUBIC))
    if not grain:
        return smooth
    return np.clip(smooth + rng.normal(0, grain, (px, px, 1)), 0, 255).astype(np.uint8)


def build(args: argparse.Namespace) -> None:
    """Write a set; one section in twenty is for validation."""
    out, n_spots, n_sections = args.out, args.spots, args.sections
    if not 8 <= args.px <= 4096:
        raise SystemExit(f"--px {args.px}: give a width from 8 to 4096 px")
    per_spot = 8_000 + (args.px**2 if args.grain else 0)
    free = shutil.disk_usage(out.parent).free
    if free < per_spot * n_spots:
        raise SystemExit(
            f"{out}: {1e-9 * per_spot * n_spots:.1f} GB must be free, but {free / 1e9:.1f} GB are; free space or choose fewer --spots"
        )
    share = np.random.default_rng(0).lognormal(0, 0.5, n_sections)
    sizes = np.maximum(20, np.round(share / share.sum() * n_spots)).astype(int).tolist()
    split = ["val" if i % 20 == 19 else "train" for i in range(n_sections)]
    tile = replace(TILE, px=args.px, min_mpp=TILE_UM / args.px)
    sections = [
        SyntheticSection(i, n, args.genes, s, tile, args.grain)
        for i, (n, s) in enumerate(zip(sizes, split, strict=True))
    ]
    write(sections, out, args.jobs)


def write(sections: list[SyntheticSection], out: Path, jobs: int) -> None:
    """Write a set of these sections, which have tiles of one kind, to the new folder ``out``."""
    out.mkdir()
    write_set(sections, sections[0].tile, out, 512, partial(run_jobs, jobs=jobs, label="shards", progress=True))


def measure(folder: Path, fit_spots: int, expression: str) -> dict[str, Any]:
    """Return sizes of the set, and times, bytes read and peak memory up to the first batch; the model is not built."""
    at_import = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, began, cpu = _read_bytes(), time.perf_counter(), time.process_time()
    shards = ShardSet(folder)
    more = [
        f"data.expression={expression}",
        f"levels.fit_spots={fit_spots}",
        f"data.batch_size={BATCH}",
        "data.workers=0",
        "genes.min_detection=0.05",
    ]
    config = load_config(None, [f"data.shards={folder}", *more])
    tables = training_tables(shards, config)
    start = {"tables_s": time.perf_counter() - began, "tables_cpu_s": time.process_time() - cpu}
    start["tables_mb_read"] = (_read_bytes() - before) / 1e6
    loader = TorchLoader(shards, tables, config)
    loader.batch(loader.batches(0)[0], 1, 0)
    loader.close()
    return {
        "spots": shards.manifest.n_spots,
        "set_mb": sum(s.bytes for s in shards.manifest.shards) / 1e6,
        "genes_trained": tables.genes.trained.size,
        **start,
        "first_batch_s": time.perf_counter() - began,
        "first_batch_cpu_s": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mb_of_imports": at_import,
    }


def first_step(folder: Path, n_ranks: int, settings: list[str]) -> dict[str, Any]:
    """Return the elapsed seconds to the first step of a run over ranks, and the ranks' peak memory up to there, largest first."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        comtip = str(Path(sys.executable).with_name("comtip"))
        command += ["--no-python", comtip, "pretrain", "--config", "configs/demo_cpu.yaml", "--out", f"{out}/run"]
        fixed = [f"data.shards={folder}", "train.steps=2", "train.validate_every=0", "genes.detected_in=pooled"]
        command += [word for setting in [*fixed, *settings] for word in ("--set", setting)]
        began, log = time.perf_counter(), Path(out) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peak: dict[int, float] = {}
        try:
            while "step 1/" not in (text := log.read_text(encoding="utf-8")):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{text}")
                peak |= {pid: mb for pid in _children(process.pid) if (mb := _peak_mb(pid))}
                time.sleep(0.05)
            seconds = time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()
    return {"first_step_s": seconds} | {f"peak_mb_{i}": mb for i, mb in enumerate(sorted(peak.values(), reverse=True))}


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(number) for number in text.split()]


def _peak_mb(pid: int) -> float | None:
    """Return the peak resident memory of a process, in MB of 2**20 bytes; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def _read_bytes() -> int:
    """Return the bytes that this process has read so far, from files or the page cache."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="write a synthetic shard set")
    one.add_argument("--out", type=Path, required=True, help="new folder of the set")
    one.add_argument("--spots", type=int, default=1_500_000, help="number of spots (default 1500000)")
    one.add_argument("--sections", type=int, default=1_100, help="number of sections (default 1100)")
    one.add_argument("--genes", type=int, default=20_000, help="number of genes (default 20000)")
    one.add_argument("--px", type=int, default=PX, help=f"width of the tiles in px (default {PX})")
    one.add_argument(
        "--grain", type=float, default=0.0, help="noise of the tiles, standard deviation in grey levels (default 0)"
    )
    one.add_argument("--jobs", type=int, default=2, help="processes that write (default 2)")
    two = commands.add_parser("measure", help="measure a start with a set")
    two.add_argument("set", type=Path, help="folder of the set")
    two.add_argument("--fit-spots", type=int, default=50_000, help="levels.fit_spots (default 50000)")
    two.add_argument(
        "--expression",
        default="auto",
        help="data.expression; records on a small set acts as auto on a large one (default auto)",
    )
    three = commands.add_parser("first-step", help="measure the time to the first step of ranks")
    three.add_argument("sets", type=Path, nargs="+", help="folders of sets")
    three.add_argument("--ranks", type=int, default=2, help="number of ranks (default 2)")
    three.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="override a key of the config"
    )
    args = parser.parse_args()
    if args.command == "build":
        build(args)
    elif args.command == "measure":
        print("  ".join(f"{k} {v:,.1f}" for k, v in measure(args.set, args.fit_spots, args.expression).items()))
    else:
        for folder in args.sets:
            row = first_step(folder.resolve(), args.ranks, args.settings)
            print(folder.name, "  ".join(f"{k} {v:,.1f}" for k, v in row.items()), flush=True)
