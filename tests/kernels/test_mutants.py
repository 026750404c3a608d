"""The mutants of ``bench/kernels/mutate.py`` apply to the kernels as they are, and cover all of them."""

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "bench/kernels/mutate.py")
mutate = importlib.util.module_from_spec(SPEC)
sys.modules["mutate"] = mutate  # where its dataclass looks for its module
SPEC.loader.exec_module(mutate)


def test_every_mutant_applies_and_compiles():
    for mutant in mutate.MUTANTS:
        source = (ROOT / "kernels/comtip_kernels" / mutant.file).read_text(encoding="utf-8")
        changed = mutant.apply(source)
        ast.parse(changed)
        assert changed != source


def test_every_kernel_has_two():
    count = Counter(m.kernel for m in mutate.MUTANTS)
    for path in (ROOT / "kernels/comtip_kernels").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                assert count[node.name] >= (1 if node.name.startswith("_") else 2), node.name
    kinds = {m.kind.split()[0] for m in mutate.MUTANTS}
    assert {"slice", "mask", "tail", "dtype", "stale", "swapped", "missing"} <= kinds
