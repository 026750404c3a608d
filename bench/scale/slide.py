"""Predict synthetic whole-slide images, killed at half and resumed: seconds, peak memory, and whether the files are equal.

``python bench/scale/slide.py --px 20000 100000`` writes pyramid TIFFs from a few encoded tiles, of which 5 % show tissue,
trains a tiny model for two steps, and runs ``comtip predict`` three times: killed when half of the tiles are encoded,
resumed, and without an interruption. Seconds are elapsed time (and CPU time, which other processes do not change).
"""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source
from PIL import Image
from scipy import ndimage

import comtip_fast
from comtip_fast.slide_prediction.run import PIECE_TILES
from testkit.tiny import write_tiny_source

TILE, MPP, TISSUE_SHARE, VARIANTS = 512, 0.5, 0.05, 8
EXACT_PX = 4096
"""Side of the levels whose tiles are encoded one by one."""
SETTINGS = (
    "data.batch_size=16 data.views=1 genes.per_cohort=30 panel.max_genes=24 levels.n_levels=5 levels.min_positive=10 "
    "vision.patch_px=32 vision.width=64 vision.depth=1 vision.heads=2 text.width=32 text.depth=1 text.heads=2 "
    "text.max_tokens=6 align.dim=32 optim.warmup_steps=1 train.steps=2 train.validate_every=0 train.checkpoint_every=2 "
    "train.device=cpu"
)
COMMAND = "import sys; from comtip_fast.cli import main; raise SystemExit(main(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, nargs="+", default=[20_000], help="sides of the slides (default 20000)")
    parser.add_argument("--folder", type=Path, help="where to write slides and answers (default: a temporary folder)")
    parser.add_argument("--once", action="store_true", help="omit the run without an interruption")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        run = tiny_model(folder)
        print("| slide | file | tiles | killed at | resumed | peak | uninterrupted | peak | same bytes |")
        print("|---|---|---|---|---|---|---|---|---|")
        for px in args.px:
            print(measure(folder, run, px, once=args.once), flush=True)


def measure(folder: Path, run: Path, px: int, *, once: bool) -> str:
    """Return the table row of one slide."""
    slide = folder / f"made_{px}.tif"
    write_slide(slide, px)
    answers = [folder / f"{name}_{px}.h5ad" for name in ("killed", "whole")]
    first = predict(run, slide, answers[0], kill_at_half=True)
    assert first.code == -signal.SIGKILL, "the slide was predicted before it could be killed; choose a larger --px"
    resumed = predict(run, slide, answers[0])
    assert resumed.code == 0, f"the resumed run exited with code {resumed.code}"
    tiles, comparison = n_tiles(answers[0]), "- | - | - |"
    if not once:
        whole = predict(run, slide, answers[1])
        same = answers[0].read_bytes() == answers[1].read_bytes()
        comparison = f"{whole} | {whole.peak / 2**20:,.0f} MiB | {'yes' if same else 'NO'} |"
    return (
        f"| {px:,} x {px:,} px | {slide.stat().st_size / 1e6:,.0f} MB | {tiles:,} | {first} "
        f"| {resumed} | {resumed.peak / 2**20:,.0f} MiB | {comparison}"
    )


@dataclass(frozen=True)
class Outcome:
    """One run of the command."""

    code: int
    seconds: float
    cpu: float
    peak: int
    """Maximum resident set size in bytes."""

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s ({self.cpu:.0f} s)"


def predict(run: Path, slide: Path, out: Path, *, kill_at_half: bool = False) -> Outcome:
    """Run ``comtip predict`` in a process; with ``kill_at_half``, kill it when half of the tiles on tissue are encoded."""
    arguments = ["predict", str(run), str(slide), "--genes", "all", "--species", "human", "--device", "cpu"]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments, "--out", str(out)], stdout=subprocess.DEVNULL
    )
    half = expected_tiles(slide) / PIECE_TILES / 2
    while kill_at_half and process.poll() is None:
        if len(list(out.parent.glob(f".{out.name}.parts/features-*.npy"))) >= half:
            process.kill()
            break
        time.sleep(0.05)
    if process.returncode is not None:
        return Outcome(process.returncode, time.monotonic() - start, math.nan, 0)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    return Outcome(process.returncode, time.monotonic() - start, cpu, usage.ru_maxrss * 1024)


def expected_tiles(slide: Path) -> float:
    """Return about how many tiles are on tissue."""
    with tifffile.TiffFile(slide) as file:
        side = file.pages.first.shape[0]
    return TISSUE_SHARE * (side * MPP / 112.0) ** 2


def n_tiles(answer: Path) -> int:
    """Return the number of predicted tiles."""
    import h5py

    with h5py.File(answer, "r") as file:
        return int(file["X"].shape[0])


def write_slide(path: Path, px: int) -> None:
    """Write a pyramid of JPEG tiles; the tissue is a disc of 5 % of the area."""
    levels = max(1, math.ceil(math.log2(px / 1024)))
    tiles = list(drawn_tiles())
    encoded = [encode(tile) for tile in tiles]
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(levels):
            side = px // 2**level
            writer.write(
                disc(tiles, encoded, side),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                resolution=(1e4 / (MPP * 2**level),) * 2,
                resolutionunit="centimeter",
                subifds=levels - 1 if level == 0 else 0,
                subfiletype=0 if level == 0 else 1,
                metadata=None,
            )


def disc(tiles: list[np.ndarray], encoded: list[bytes], side: int) -> Iterator[bytes]:
    """Yield the tiles of a level row by row: tissue inside the disc, glass elsewhere."""
    count, radius = math.ceil(side / TILE), math.sqrt(TISSUE_SHARE / math.pi) * side
    for row in range(count):
        for column in range(count):
            which = 1 + (3 * row + column) % VARIANTS
            x, y = column * TILE - side / 2, row * TILE - side / 2
            if side > EXACT_PX:
                yield encoded[which if math.hypot(x + TILE / 2, y + TILE / 2) < radius else 0]
            else:  # tissue is found in the low levels, where a tile is too large to follow the disc
                pixel = np.arange(TILE) + 0.5
                inside = np.hypot(x + pixel[None, :], y + pixel[:, None]) < radius
                yield encode(np.where(inside[..., None], tiles[which], tiles[0]))


def drawn_tiles() -> Iterator[np.ndarray]:
    """Yield a tile of glass, then the variants of tissue."""
    rng = np.random.default_rng(0)
    yield np.full((TILE, TILE, 3), 242, np.uint8)
    for _ in range(VARIANTS):
        cells = ndimage.gaussian_filter(rng.normal(size=(TILE, TILE)), 4, mode="wrap")
        picture = np.array([190, 120, 175]) + (cells / cells.std())[..., None] * np.array([25, 28, 14])
        yield np.clip(picture, 0, 255).astype(np.uint8)


def encode(tile: np.ndarray) -> bytes:
    """Return a tile as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=85, subsampling=2)
    return buffer.getvalue()


def tiny_model(folder: Path) -> Path:
    """Train a tiny model on tiles of 112 um in 224 px for two steps, unless ``folder`` has one, and return its run folder."""
    source, shards, run = folder / "source", folder / "shards", folder / "run"
    if not run.exists():
        write_tiny_source(source)
        build_shards(open_source(source), shards, tile_px=224, tile_um=112.0, min_mpp=0.5)
        comtip_fast.pretrain(None, run, overrides=[*SETTINGS.split(), f"data.shards={shards}"])
    return run


if __name__ == "__main__":
    main()
