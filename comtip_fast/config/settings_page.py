"""Generate docs/settings.md, a table of every setting: ``python -m comtip_fast.config.settings_page docs/settings.md``."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import annotated_types
from pydantic.fields import FieldInfo

from comtip_fast.config.schema import RunConfig

HEAD = """# Settings

Every key of a run's config: type, bounds, default and meaning. Set keys in a YAML file (`--config`) or on the command
line (`--set optim.lr=3e-4`). This page is generated from `comtip_fast/config/` by
`python -m comtip_fast.config.settings_page docs/settings.md`; a test fails if it is out of date.
"""


def field_docstrings(cls: type) -> dict[str, str]:
    """Return ``{field: its docstring on one line}`` of a dataclass, from the source of its module."""
    tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    found = {}
    for node, after in pairwise(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[node.target.id] = " ".join(str(after.value.value).split())
    return found


def describe_type(hint: Any) -> tuple[str, str]:
    """Return the type and the bounds of a field's annotation as two texts; the second is empty without bounds."""
    if hint is type(None):
        return "null", ""
    bounds: list[str] = []
    if hasattr(hint, "__metadata__"):
        for info in hint.__metadata__:
            bounds += [_bound(m) for m in (info.metadata if isinstance(info, FieldInfo) else [info])]
        hint = get_args(hint)[0]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in args), ""
    if origin is tuple:
        inner = [describe_type(a) for a in args if a is not Ellipsis]
        of_each = f"each {inner[0][1].removeprefix('each ')}" if inner[0][1] else ""
        return f"list of {inner[0][0]}" if Ellipsis in args else f"[{', '.join(i[0] for i in inner)}]", of_each
    if args:  # a union
        inner = [describe_type(a) for a in args]
        return " or ".join(i[0] for i in inner), ", ".join(i[1] for i in inner if i[1])
    return str(hint.__name__), ", ".join(b for b in bounds if b)


def _bound(item: Any) -> str:
    """Return a bound as text; empty for metadata that is not a bound."""
    signs = {annotated_types.Ge: ("ge", "≥"), annotated_types.Gt: ("gt", ">")}
    signs |= {annotated_types.Le: ("le", "≤"), annotated_types.Lt: ("lt", "<")}
    for kind, (name, sign) in signs.items():
        if isinstance(item, kind):
            return f"{sign} {getattr(item, name):g}"
    return "not empty" if isinstance(item, annotated_types.MinLen) else ""


def page() -> str:
    """Return the settings page as Markdown."""
    return HEAD + "".join(_group(RunConfig, "")).replace("``", "`")


def _group(cls: type, prefix: str) -> list[str]:
    """Return the Markdown of a group of keys and of the groups below it."""
    hints, texts = get_type_hints(cls, include_extras=True), field_docstrings(cls)
    rows, below = [], []
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            below += _group(hints[item.name], f"{prefix}{item.name}.")
            continue
        kind, bounds = describe_type(hints[item.name])
        default = item.default if item.default is not MISSING else ""
        rows.append(f"| `{prefix}{item.name}` | {kind} | {bounds} | {_value(default)} | {texts[item.name]} |\n")
    title = f"`{prefix[:-1]}`" if prefix else "Top level"
    head = f"\n## {title}\n{cls.__doc__}\n\n| key | type | bounds | default | meaning |\n|---|---|---|---|---|\n"
    return [head, *rows, *below]


def _value(value: Any) -> str:
    """Return a default value as Markdown."""
    if value is None:
        return "`null`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "empty" if value == "" else f"`{value}`"


def main() -> None:
    """Write the settings page to the path that is the first command-line argument."""
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
