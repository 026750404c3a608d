"""Draw random public docstrings and messages of the packages, for a reader who has not seen the code.

    python bench/draw_texts.py --seed 1 --count 20 --out draw
    python bench/draw_texts.py --seed 1 --count 20 --control others.json --out draw

``--control`` adds as many texts of other projects, in random order: a JSON object with the lists ``docstrings`` (``signature``,
``text``) and ``messages`` (``text``). How many of these a reader rewrites is what the count for our texts is compared with, because
readers differ. Writes ``texts.md`` for the reader, and ``key.json`` with the origin of each text.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
PACKAGES = ("comtip_fast", "kernels/comtip_kernels", "data_shards/comtip_shards")
MIN_DOC, MIN_MESSAGE = 12, 5
"""Minimum number of words of a docstring of one line, and of a message."""
Text = dict[str, str]


def docstrings(tree: ast.Module, where: str) -> Iterator[Text]:
    """Yield the docstrings of a module and of its public classes and functions."""
    nodes: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [tree]
    while nodes:
        node = nodes.pop()
        named = [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
        nodes += [child for child in named if not child.name.startswith("_")]
        text = ast.get_docstring(node) or ""
        if "\n" in text or len(text.split()) >= MIN_DOC:
            lines = [] if isinstance(node, ast.Module) else ast.unparse(node).splitlines()
            head = next((line for line in lines if line.startswith(("def ", "class "))), "module")
            yield {"path": where, "signature": head, "text": text}


def messages(tree: ast.Module, where: str) -> Iterator[Text]:
    """Yield the messages of raised errors and of warnings, with their placeholders in braces."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if call is node and getattr(call.func, "attr", "") not in ("warn", "warning"):
            continue
        text = " ".join((_text_of(call.args[0]) or "").split())
        if len(text.split()) >= MIN_MESSAGE:
            yield {"path": where, "text": text}


def _text_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values]
        return "".join(map(str, parts))
    return None


def main() -> None:
    """Draw the texts and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="seed of the draw")
    parser.add_argument("--count", type=int, default=20, help="number of docstrings, and of messages (default 20)")
    parser.add_argument("--control", type=Path, help="JSON file with texts of other projects")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    rng, ours = Random(args.seed), {"docstrings": list[Text](), "messages": list[Text]()}
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        tree, where = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
        ours["docstrings"] += docstrings(tree, where)
        ours["messages"] += messages(tree, where)
    control = json.loads(args.control.read_text(encoding="utf-8")) if args.control else {}
    lines, key = [], {}
    for kind, letter in (("docstrings", "D"), ("messages", "M")):
        drawn = [("ours", text) for text in rng.sample(ours[kind], args.count)]
        if control:
            drawn += [("control", text) for text in rng.sample(control[kind], args.count)]
        rng.shuffle(drawn)
        for i, (origin, text) in enumerate(drawn, 1):
            key[f"{letter}{i}"] = [origin, text.get("path", "")]
            lines += [
                f"## {letter}{i}",
                "```",
                *([text["signature"]] if kind == "docstrings" else []),
                text["text"],
                "```",
                "",
            ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "texts.md").write_text("\n".join(lines), encoding="utf-8")
    (args.out / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    print(
        f"{args.out / 'texts.md'}: {len(key)} texts of {len(ours['docstrings'])} docstrings and {len(ours['messages'])} messages"
    )


if __name__ == "__main__":
    main()
