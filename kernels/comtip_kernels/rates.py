"""Rates of GPUs, stated once: the ledger's predicted times and ``comtip plan`` read them from ``rates.csv``.

FLOP/s, bytes/s from and to memory and the number of multiprocessors are those of the vendor's datasheets (SXM modules, dense products
of bf16, fp32 without tf32). No datasheet has the rate of the L2 cache: 5.5 TB/s of an H100 is 61 % of 5,120 bytes per clock, the share
that public microbenchmarks reach; 4.4 TB/s of an A100, and twice the H100's for the two dies of a B200, are assumed.

After a run of ``bench/gpu_evidence.py`` on a GPU, its measured rates replace these::

    python -m comtip_kernels.rates bench/gpu_evidence.csv h100
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

TABLE = Path(__file__).with_name("rates.csv")
DATASHEET = "datasheet"
MEMORY_SHARE = 0.9
"""Share of a datasheet's memory bytes/s that memory-bound kernels are reported to reach; measured rates need no such factor."""
MEASUREMENTS = {"bf16": ("matrix product", "bf16"), "memory": ("copy", ""), "l2": ("L2 read", "")}
"""{rate: name and dtype of its rows in the table of ``bench/gpu_evidence.py``}."""
UNITS = {"TFLOP/s": 1e12, "TB/s": 1e12}


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU, per second."""

    gpu: str
    bf16: float
    """FLOP/s of dense bf16 products."""
    fp32: float
    """FLOP/s of dense fp32 products without tf32."""
    memory: float
    """Bytes/s from and to memory."""
    l2: float
    """Bytes/s from the L2 cache to the multiprocessors."""
    multiprocessors: int
    source: str
    """``datasheet``, or the commit at which bf16, memory and L2 were measured."""

    @property
    def reachable_memory(self) -> float:
        """Bytes/s that a memory-bound kernel is assumed to reach."""
        return self.memory * (MEMORY_SHARE if self.source == DATASHEET else 1.0)


def read_rates(path: Path = TABLE) -> dict[str, Rates]:
    """Return {name of the GPU: its rates}."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["gpu"]: _rates(row) for row in csv.DictReader(file)}


def _rates(row: dict[str, str]) -> Rates:
    bf16, fp32, memory, l2 = (float(row[name]) for name in ("bf16", "fp32", "memory", "l2"))
    return Rates(row["gpu"], bf16, fp32, memory, l2, int(row["multiprocessors"]), row["source"])


def gpu_of(device_name: str) -> str | None:
    """Return the GPU of :data:`TABLE` for a device name as CUDA reports it: ``NVIDIA H100 80GB HBM3`` is ``h100``.

    None for an unknown device, and for PCIe and NVL variants, which have other rates.
    """
    words = device_name.lower().replace("-", " ").split()
    for gpu in read_rates():
        family, _, memory = gpu.partition("-")
        sized = not memory or any(w.startswith(memory) for w in words)
        if family in words and sized and "pcie" not in words and "nvl" not in words:
            return gpu
    return None


def with_measured(rates: Rates, evidence: Path) -> Rates:
    """Return ``rates`` with the rates that ``bench/gpu_evidence.py`` measured last on the same kind of GPU.

    Parameters
    ----------
    rates
        Rates of the GPU that was measured; fp32 and the number of multiprocessors stay.
    evidence
        Table of ``bench/gpu_evidence.py``.

    Raises
    ------
    ValueError
        If the table lacks the measurement of a rate on this kind of GPU.
    """
    with evidence.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["mode"] == "gpu" and r["status"] == "ok" and r["metric"] == "rate"]
    measured_on = sorted({r["gpu"] for r in rows})
    rows = [r for r in rows if gpu_of(r["gpu"]) == rates.gpu]
    found: dict[str, float] = {}
    commit = ""
    for row in rows:
        for rate, (name, dtype) in MEASUREMENTS.items():
            if row["name"] == name and row["dtype"] == dtype:
                found[rate], commit = float(row["value"]) * UNITS[row["unit"]], row["commit"]
    missing = [MEASUREMENTS[rate][0] for rate in MEASUREMENTS if rate not in found]
    if missing:
        raise ValueError(
            f"{evidence}: no measured rate of {', '.join(missing)} on {rates.gpu} (rates in the table: "
            f"{', '.join(measured_on) or 'none'}); run python bench/gpu_evidence.py on a GPU of this kind"
        )
    return replace(rates, **found, source=f"measured at {commit}")  # type: ignore[arg-type]


def write_rates(rates: dict[str, Rates], path: Path = TABLE) -> None:
    """Write the table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, [f.name for f in fields(Rates)], lineterminator="\n")
        out.writeheader()
        out.writerows(asdict(r) for r in rates.values())


def main(arguments: Sequence[str]) -> int:
    """Replace the rates of a GPU by measured ones: ``EVIDENCE GPU``. Returns 2 if an argument is wrong, otherwise 0."""
    rates = read_rates()
    if len(arguments) != 2 or arguments[1] not in rates:
        print(f"usage: python -m comtip_kernels.rates EVIDENCE.csv GPU, one of {', '.join(rates)}", file=sys.stderr)
        return 2
    evidence, gpu = arguments
    write_rates(rates | {gpu: with_measured(rates[gpu], Path(evidence))})
    print(f"{TABLE}: {gpu} has measured rates; now run python -m comtip_kernels.ledger, which predicts times with them")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
