"""Measure the code's structure: sizes, folders, import cycles, layers, and constructs that the project avoids.

``python bench/structure.py`` prints one table for this checkout; with further folders, one column for each, so that two
commits can be compared: ``git worktree add ../before COMMIT && python bench/structure.py ../before .``
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

PACKAGES = {
    "comtip_fast": "comtip_fast",
    "comtip_kernels": "kernels/comtip_kernels",
    "comtip_shards": "data_shards/comtip_shards",
}
SUPPORT = re.compile(
    r"/(testing|testing\.py|fuzz\.py|conftest\.py)(/|$)|^(import|from) (pytest|hypothesis|unittest)\b", re.MULTILINE
)
"""Test support by its path, or by an import of a test framework anywhere in the file."""
NO_FACTS = {
    "environ": "environment variables",
    "attributes": "attributes of an XML element",
    "cells": "cells of a row of a user's table, before they are parsed",
    "row": "a row of the ledger as stored, before it is parsed",
    "kept": "rows of the ledger as stored",
    "before": "a row of the ledger as stored",
    "known": "hashes by file, or rows of the ledger as stored",
    "operands": "names of kernel arguments and their types, as Triton takes them",
    "fingerprint": "hashes by input of a run",
    "then": "hashes by input of a run",
    "now": "hashes by input of a run",
    "failed": "error messages by section",
    "renamed": "settings by their former names",
}
"""{name of a parameter of type ``dict[str, str]`` without facts about a section: what it holds}."""
FACTS = re.compile(r"(dict|Mapping)\[str, str\]")


def package_files(root: Path) -> dict[str, Path]:
    """Return module name -> file of the three packages."""
    files = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            files[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return files


def imports_of(module: str, path: Path, known: set[str]) -> set[str]:
    """Return the modules of the three packages that a file imports, also inside functions, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in known and name != module}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1:
                out.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return out


def functions_of(tree: ast.Module) -> list[int]:
    """Return the number of lines of every function and method."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, kinds) and n.end_lineno]


def statements_of(tree: ast.Module) -> list[int]:
    """Return the number of statements of every function and method; unlike lines, it does not depend on the formatter."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [sum(isinstance(s, ast.stmt) for s in ast.walk(n)) - 1 for n in ast.walk(tree) if isinstance(n, kinds)]


def facts_in_signatures(tree: ast.Module) -> int:
    """Return the number of parameters that carry facts as ``dict[str, str]``."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(
        bool(arg.annotation is not None and arg.arg not in NO_FACTS and FACTS.search(ast.unparse(arg.annotation)))
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    )


def outside_layers(root: Path, files: dict[str, Path]) -> list[str]:
    """Return the top-level modules of a package that no contract of import-linter puts in a layer."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    layered: dict[str, set[str]] = defaultdict(set)
    for contract in settings["tool"]["importlinter"]["contracts"]:
        for container in contract.get("containers", []):
            for line in contract["layers"]:
                layered[container] |= {part.strip(" ()") for part in re.split(r"[|:]", line)}
            layered[container] |= {name.rsplit(".", 1)[-1] for name in contract.get("exhaustive_ignores", [])}
    tops = {m for m in files if m.count(".") == 1 and not m.rsplit(".", 1)[1].startswith("_")}
    return sorted(m for m in tops if m.rsplit(".", 1)[1] not in layered[m.split(".")[0]])


def twice_named_classes(trees: dict[str, ast.Module]) -> list[str]:
    """Return the public class names that more than one module defines."""
    owners: dict[str, set[str]] = defaultdict(set)
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].add(module)
    return sorted(name for name, modules in owners.items() if len(modules) > 1)


def count_skips(paths: list[Path]) -> int:
    """Return how often ``fmt: skip`` and ``fmt: off`` occur in files."""
    return sum(len(re.findall(r"fmt: (?:skip|off)", p.read_text(encoding="utf-8"))) for p in paths)


def measure(root: Path) -> dict[str, str]:
    """Return every figure of one checkout, by the name of its row."""
    files = package_files(root)
    texts = {m: p.read_text(encoding="utf-8") for m, p in files.items()}
    trees = {m: ast.parse(t) for m, t in texts.items()}
    lines = sorted(t.count("\n") for t in texts.values())
    functions = sorted(n for tree in trees.values() for n in functions_of(tree))
    statements = sorted(n for tree in trees.values() for n in statements_of(tree))
    graph = {m: imports_of(m, p, set(files)) for m, p in files.items()}
    folders = Counter(p.parent for p in files.values() if p.name != "__init__.py")
    largest, count = folders.most_common(1)[0]
    loops, outside, twice = cycles(graph), outside_layers(root, files), twice_named_classes(trees)
    support = sum(t.count("\n") for m, t in texts.items() if SUPPORT.search(f"{files[m]}\n{t}"))
    ours = [root / part for part in ("tests", "bench", "testkit") if (root / part).is_dir()]
    everything = [*files.values(), *(p for part in ours for p in part.rglob("*.py") if p != Path(__file__).resolve())]
    return {
        "files": str(len(files)),
        "lines per file, median / p90 / max": f"{statistics.median(lines):.0f} / {_p90(lines)} / {lines[-1]}",
        "lines per function, mean / p90 / max": f"{statistics.mean(functions):.1f} / {_p90(functions)} / {functions[-1]}",
        "statements per function, mean / p90 / max": (
            f"{statistics.mean(statements):.1f} / {_p90(statements)} / {statements[-1]}"
        ),
        "modules in the fullest folder": f"{count} ({largest.name})",
        "import cycles": str(len(loops)) + "".join(f"; {' <-> '.join(c)}" for c in loops),
        "modules outside any layer": str(len(outside)) + (f" ({', '.join(outside)})" if outside else ""),
        "fmt: skip, packages / all": f"{count_skips(list(files.values()))} / {count_skips(everything)}",
        "parameters of type dict[str, str]": str(sum(facts_in_signatures(t) for t in trees.values())),
        "lines of test support in the wheel": str(support),
        "class names used for two things": str(len(twice)) + (f" ({', '.join(twice)})" if twice else ""),
    }


def _p90(values: list[int]) -> int:
    return values[int(0.9 * (len(values) - 1))]


def main() -> None:
    """Print one row per figure, one column per checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("roots", nargs="*", type=Path, default=[here], help="checkouts (default: this one)")
    roots = parser.parse_args().roots
    columns = [measure(root.resolve()) for root in roots]
    print("| | " + " | ".join(root.resolve().name for root in roots) + " |")
    print("|---|" + "---|" * len(roots))
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(column[row] for column in columns) + " |")


if __name__ == "__main__":
    main()
