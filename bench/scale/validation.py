"""Seconds, CPU seconds and memory of each rank in a validation, for validation sets of several sizes, on CPU ranks under gloo.

    export PYTHONPATH=.:kernels:data_shards
    python bench/scale/validation.py --set vision.stem=pixels --work SETS
    python bench/scale/validation.py --set vision.stem=pixels --work SETS --validations 1 --kept-mb 0
    python bench/scale/validation.py --set vision.stem=pixels --ranks 1 --spots 20000 --per-section 20000 --validations 1 --kept-mb 0

Runs of `comtip pretrain` with the demo's config validate after each of their first steps, on synthetic sets with the same training
sections and different numbers of validation sections; a spot takes about 6 kB of disk. *Read* are the spots whose counts the rank
read, *chunk* the largest number of spots of one request. *Before* is the resident memory at the start of the validation, *added* the
highest one during it minus *before*, with pages of files that are read; *anonymous* leaves these out. The second validation reuses the
tiles, or the features of a frozen stem, that the first one has cached, up to ``KEPT_BYTES`` of `comtip_fast/training/validation.py`;
``--kept-mb`` sets another limit. By default glibc keeps freed arrays of some MB for later ones, so that memory varies by about 100 MB;
the environment variable ``MALLOC_MMAP_THRESHOLD_=1048576`` returns them to the system. Seconds include the wait for the other ranks,
which takes no CPU seconds; on a shared machine compare CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from scipy import sparse
from torch import Tensor

from bench.scale.memory import MB, measured
from comtip_fast.cli import KILLED
from comtip_fast.cli import main as comtip
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.training import validation
from comtip_fast.training.trainer import Trainer
from testkit.distributed import run_distributed

TRAIN_SECTIONS, TRAIN_SPOTS = 4, 150
"""Number of training sections of every set, and of spots in each."""
FIXED = (
    "genes.detected_in=pooled",
    "data.views=1",
    "train.steps=100",
    "train.validate_every=1",
    "train.patience=0",
    "train.device=cpu",
    "train.async_checkpoint=false",
)
COLUMNS = ("spots", "ranks", "rank", "validation", "read", "chunk", "before", "added", "anonymous", "cpu", "seconds")
HEADER = (
    "| validation spots | ranks | rank | validation | read | chunk | before MB | added MB | anonymous MB | CPU s | s |"
)


def section_sizes(spots: int, per_section: int) -> list[int]:
    """Return sizes of sections that have ``spots`` spots together; all but the last have ``per_section``."""
    whole, rest = divmod(spots, per_section)
    return [per_section] * whole + ([rest] if rest else [])


def built(folder: Path, spots: int, per_section: int, n_genes: int) -> Path:
    """Return the folder of a set with this many validation spots; it is written if ``folder`` does not have it."""
    from bench.scale.start import SyntheticSection, write  # not by the ranks, whose memory is measured

    out = folder / f"set_{spots}_{per_section}_{n_genes}"
    sizes = [TRAIN_SPOTS] * TRAIN_SECTIONS + section_sizes(spots, per_section)
    if not out.exists():
        splits = ["train" if i < TRAIN_SECTIONS else "val" for i in range(len(sizes))]
        sections = [
            SyntheticSection(i, n, n_genes, split) for i, (n, split) in enumerate(zip(sizes, splits, strict=True))
        ]
        write(sections, out, jobs=1)
    return out


@dataclass
class Recorder:
    """Measures the validations of a run in this process, and stops the run after the last one."""

    validations: int
    rows: list[dict[str, float]] = field(default_factory=list)

    def install(self, stack: ExitStack) -> None:
        """Wrap the validation of the trainer and the loader's reads until ``stack`` is closed."""
        validate, counts, tiles = Trainer._validate, BaseLoader.counts, BaseLoader.tiles

        def _validate(trainer: Trainer) -> None:
            self.rows.append({"rank": trainer.group.rank, "validation": len(self.rows) + 1, "read": 0, "chunk": 0})
            with measured(self.rows[-1]):
                validate(trainer)
            if len(self.rows) == self.validations:
                os.kill(os.getpid(), signal.SIGTERM)  # the run stops before its next validation, and writes no export

        def _counts(loader: BaseLoader, spots: np.ndarray) -> tuple[np.ndarray, sparse.csr_matrix]:
            self._read(spots.size, spots.size)
            return counts(loader, spots)

        def _tiles(loader: BaseLoader, spots: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, Tensor]:
            self._read(0, spots.size)
            return tiles(loader, spots, view)

        stack.enter_context(mock.patch.object(Trainer, "_validate", _validate))
        stack.enter_context(mock.patch.object(BaseLoader, "counts", _counts))
        stack.enter_context(mock.patch.object(BaseLoader, "tiles", _tiles))

    def _read(self, spots: int, chunk: int) -> None:
        if self.rows:  # not while features of training spots are computed
            self.rows[-1]["read"] += spots
            self.rows[-1]["chunk"] = max(self.rows[-1]["chunk"], chunk)


def measure_rank(shards: Path, out: Path, validations: int, kept_mb: float, settings: list[str]) -> int:
    """Run ``comtip pretrain`` as one rank, print a row for each validation, and return the exit code."""
    recorder = Recorder(validations)
    with ExitStack() as stack:
        recorder.install(stack)
        stack.enter_context(mock.patch.object(validation, "KEPT_BYTES", round(kept_mb * MB)))
        words = [word for setting in (f"data.shards={shards}", *FIXED, *settings) for word in ("--set", setting)]
        code = comtip(["pretrain", "--config", "configs/demo_cpu.yaml", "--out", str(out), *words])
    for row in recorder.rows:
        print("ROW " + json.dumps(row), flush=True)
    return 0 if code == KILLED else code or 1


def measure(shards: Path, ranks: int, validations: int, more: list[str]) -> list[dict[str, float]]:
    """Return the rows of all ranks, by validation and rank."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [__file__, "--rank", str(shards), f"{folder}/run", "--validations", str(validations), *more]
        outputs = run_distributed(arguments, ranks, timeout_s=3600, environment={"MALLOC_ARENA_MAX": "2"})
    rows = [json.loads(line[4:]) for text in outputs for line in text.splitlines() if line.startswith("ROW ")]
    if len(rows) != ranks * validations:
        raise SystemExit(
            f"{shards}: {len(rows)} rows of {ranks * validations}; the ranks printed\n" + "\n".join(outputs)
        )
    return sorted(rows, key=lambda row: (row["validation"], row["rank"]))


def cells(row: dict[str, float]) -> str:
    """Return a row of the table; only seconds have a decimal."""
    return "| " + " | ".join(f"{row[k]:,.{int(k in ('cpu', 'seconds'))}f}" for k in COLUMNS) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--spots",
        type=int,
        nargs="+",
        default=[2_000, 8_000, 32_000],
        help="validation spots (default 2000 8000 32000)",
    )
    parser.add_argument("--per-section", type=int, default=1_000, help="spots of a validation section (default 1000)")
    parser.add_argument("--genes", type=int, default=5_000, help="number of genes (default 5000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default 1 2)")
    parser.add_argument("--validations", type=int, default=2, help="validations of each run (default 2)")
    kept = validation.KEPT_BYTES / MB
    parser.add_argument("--kept-mb", type=float, default=kept, help=f"limit of the cache in MB (default {kept:,.0f})")
    parser.add_argument("--work", type=Path, help="folder where sets are kept and found (default: a temporary one)")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="override a key of the config"
    )
    parser.add_argument(
        "--rank", nargs=2, type=Path, metavar=("SET", "OUT"), help="measure as one rank (used internally)"
    )
    args = parser.parse_args()
    if args.rank:
        return measure_rank(*args.rank, args.validations, args.kept_mb, args.settings)
    more = ["--kept-mb", str(args.kept_mb)] + [word for setting in args.settings for word in ("--set", setting)]
    print(f"{HEADER}\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for spots in args.spots:
            shards = built(args.work or Path(temporary), spots, args.per_section, args.genes)
            for ranks in args.ranks:
                for row in measure(shards.resolve(), ranks, args.validations, more):
                    print(cells(row | {"spots": spots, "ranks": ranks}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
