"""Compare the loaders of comtip_fast with those of other projects, in one run with interleaved rounds.

    python bench/loader/compare.py --work runs/bench_loader --out bench/loader
    python bench/loader/plot.py

The first command builds a set with tiles of 224 px from data_shards/samples, unless ``--shards`` names one; the second draws
docs/loader.png and updates the table in docs/data_loading.md. ``comtip bench loader`` measures only our loaders.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.loader.peers import dali_reader_batches, h5_batches, limit_rate, webdataset_batches, write_h5
from comtip_fast.benchmarks import loaders
from comtip_fast.benchmarks.loaders import LoaderInputs, Setting
from comtip_fast.benchmarks.rounds import Contender
from comtip_fast.data.loaders.factory import dali_is_installed

WEBDATASET, WEBDATASET_PILLOW = "webdataset + PIL, numpy views", "webdataset + PIL, Pillow views"
H5, DALI_READER = "HEST-style h5", "DALI's own reader, decode only"
RATIOS = (
    ("DALI loader / webdataset + PIL, numpy views", loaders.DALI, WEBDATASET),
    ("DALI loader / webdataset + PIL, Pillow views", loaders.DALI, WEBDATASET_PILLOW),
    *loaders.RATIOS,
)
MB = 1e6


def contenders_of(setting: Setting, inputs: LoaderInputs, work: Path, rate_mb: float) -> list[Contender]:
    """Return the loaders of other projects, our loaders and the decoders, those with worker processes first.

    If ``rate_mb`` is above 0, some loaders are also measured on a storage limited to this many MB/s.
    """
    shards, config, size = setting.shards, setting.config.data, inputs.bytes_per_spot
    panel = np.sort(np.random.default_rng(0).permutation(inputs.streamed.genes.trained.size)[:256])
    rates = [0.0, rate_mb] if rate_mb else [0.0]
    write_h5(shards, work / "h5")
    found = [
        Contender(name, webdataset_batches(shards, inputs.streamed, panel, config, views), size["tar"])
        for name, views in ((WEBDATASET, "numpy"), (WEBDATASET_PILLOW, "pillow"))
    ]
    for rate in rates:
        batches = h5_batches(work / "h5", shards, inputs.in_memory, panel, config, "numpy", rate * MB)
        found.append(Contender(_at_rate(H5, rate), batches, size["raw"]))
    found += loaders.contenders_of(setting, inputs)
    if dali_is_installed():
        if rate_mb:
            slow = loaders.make("dali", setting, inputs.streamed)
            limit_rate(slow.records, rate_mb * MB)
            found.append(Contender(_at_rate(loaders.DALI, rate_mb), loaders.batch_sizes(slow), size["record"]))
        found.append(Contender(DALI_READER, dali_reader_batches(shards, config), size["tar"]))
    return found


def _at_rate(name: str, rate_mb: float) -> str:
    return f"{name}, storage of {rate_mb:g} MB/s" if rate_mb else name


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="shard set to read (default: build one from --source)")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("data_shards/samples"),
        help="sections to build it from (default data_shards/samples)",
    )
    parser.add_argument("--px", type=int, default=224, help="tile width in px (default 224)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench_loader"),
        help="folder for built files (default runs/bench_loader)",
    )
    parser.add_argument("--out", type=Path, help="folder for the result files (default: the --work folder)")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes per loader or decoder (default 2)")
    parser.add_argument("--batch-size", type=int, default=64, help="spots per batch (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default 7)")
    parser.add_argument("--spots", type=int, default=2000, help="spots per round and loader or decoder (default 2000)")
    parser.add_argument(
        "--rate", type=float, default=100.0, help="storage rate of the rate-limited rows in MB/s (default 100; 0: none)"
    )
    parser.add_argument(
        "--epochs", type=int, default=20, help="epochs over which memory is recorded (default 20; 0: none)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    shards = loaders.open_set(args.shards, args.source, args.work, args.px)
    setting = Setting(shards, args.workers, args.batch_size, args.rounds, args.spots)
    resident = loaders.memory(setting, args.epochs) if args.epochs else {}
    contenders = contenders_of(setting, loaders.load_inputs(setting), args.work, args.rate)
    loaders.measure(setting, contenders)
    print("\n".join(loaders.table_of(contenders, resident, RATIOS)))
    loaders.write_results(args.out or args.work, setting, contenders, resident, RATIOS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
