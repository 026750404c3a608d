"""Rates of GPUs: one table for the ledger and the plan, and measured rates in place of those of datasheets."""

from pathlib import Path

import pytest
from comtip_kernels import rates
from comtip_kernels.ledger.sizes import ROOFS

from bench.evidence.rows import COLUMNS
from comtip_fast.plan.hardware import DEVICES

LINES = {
    "matrix product": ("bf16", "700", "TFLOP/s"),
    "copy": ("", "2.9", "TB/s"),
    "L2 read": ("", "6.1", "TB/s"),
}


def evidence(path: Path, names: list[str], gpu: str = "NVIDIA H100 80GB HBM3") -> Path:
    rows = []
    for name in names:
        dtype, value, unit = LINES[name]
        cells = {
            "commit": "abc",
            "mode": "gpu",
            "gpu": gpu,
            "name": name,
            "dtype": dtype,
            "metric": "rate",
            "value": value,
        }
        rows.append(",".join((cells | {"unit": unit, "status": "ok"}).get(c, "") for c in COLUMNS))
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n", encoding="utf-8")
    return path


def test_plan_and_ledger_have_the_same_rates():
    for name, rate in rates.read_rates().items():
        device = DEVICES[name]
        assert (device.bf16, device.fp32, device.memory_bytes_per_s) == (rate.bf16, rate.fp32, rate.memory)
        assert (device.l2_bytes_per_s, device.multiprocessors) == (rate.l2, rate.multiprocessors)
    assert ROOFS["h100"] == rates.read_rates()["h100"]


def test_measured_rates_replace_those_of_the_datasheet(tmp_path: Path):
    h100 = rates.read_rates()["h100"]
    measured = rates.with_measured(h100, evidence(tmp_path / "evidence.csv", list(LINES)))
    assert (measured.bf16, measured.memory, measured.l2) == (700e12, 2.9e12, 6.1e12)
    assert (measured.fp32, measured.multiprocessors) == (h100.fp32, h100.multiprocessors)
    assert measured.reachable_memory == 2.9e12
    assert h100.reachable_memory == pytest.approx(0.9 * 3.35e12)
    rates.write_rates({"h100": measured}, tmp_path / "rates.csv")
    assert rates.read_rates(tmp_path / "rates.csv") == {"h100": measured}


def test_a_missing_measurement_is_named(tmp_path: Path):
    table = evidence(tmp_path / "evidence.csv", ["copy", "matrix product"])
    with pytest.raises(
        ValueError, match=r"evidence.csv: no measured rate of L2 read on h100 \(.*HBM3\); run .* on a GPU"
    ):
        rates.with_measured(rates.read_rates()["h100"], table)


def test_an_unknown_gpu_is_refused(capsys: pytest.CaptureFixture[str]):
    assert rates.main(["evidence.csv", "v100"]) == 2
    assert "one of a100-40" in capsys.readouterr().err


def test_rates_of_another_gpu_are_refused(tmp_path: Path):
    table, known = evidence(tmp_path / "evidence.csv", list(LINES), "NVIDIA H200"), rates.read_rates()
    with pytest.raises(ValueError, match=r"no measured rate of .* on h100 \(rates in the table: NVIDIA H200\)"):
        rates.with_measured(known["h100"], table)
    assert rates.with_measured(known["h200"], table).l2 == 6.1e12
