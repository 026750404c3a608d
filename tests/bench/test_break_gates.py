"""``bench/kernels/break_gates.py``: its faults still fit the code that they break."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("break_gates", ROOT / "bench/kernels/break_gates.py")
assert SPEC is not None
assert SPEC.loader is not None
gates = importlib.util.module_from_spec(SPEC)
sys.modules["break_gates"] = gates  # dataclasses look their module up
SPEC.loader.exec_module(gates)


@pytest.mark.parametrize("fault", gates.FAULTS, ids=[f.name for f in gates.FAULTS])
def test_a_fault_is_a_change_of_the_code(fault: "gates.Fault"):
    for name, text, replacement in (gates.ONE_ARCHITECTURE, *fault.edits):
        source = (ROOT / gates.PACKAGE / name).read_text(encoding="utf-8")
        assert text in source, name
        assert text != replacement


def test_a_fault_that_does_not_fit_is_reported():
    fault = gates.Fault("gone", (("tiles.py", "no such text", ""),))
    with pytest.raises(ValueError, match=r"gone: tiles\.py does not contain 'no such text'"):
        gates.caught(fault)
