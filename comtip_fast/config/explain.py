"""Texts of config errors: what is wrong with a file, a key or a value, and the fix."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic_core import ErrorDetails

from comtip_fast.config.schema import RunConfig

SIMILAR = 0.6
"""Smallest ratio of :class:`difflib.SequenceMatcher` at which a key is suggested for an unknown one."""
_FIXES = {
    "tuple_type": "must be a list, e.g. [A, B]",
    "string_type": "must be text; put it in YAML quotes if it looks like a number, a truth value or null",
    "bool_type": "must be true or false",
}
"""{type of pydantic's error: text to show}, for errors whose text from pydantic names Python types."""


@functools.cache
def key_groups(cls: type) -> dict[str, type | None]:
    """Return ``{key: class of its group of keys, or None for a value}`` of a dataclass."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] if is_dataclass(hints[f.name]) else None for f in fields(cls)}


def all_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the keys of all values of a config, such as ``train.steps``."""
    for key, group in key_groups(cls).items():
        if group is None:
            yield prefix + key
        else:
            yield from all_keys(group, f"{prefix}{key}.")


def yaml_problem(error: Exception) -> str:
    """Return the problem of a YAML error and its position, on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is not None and problem.startswith("but "):
        problem = f"{getattr(error, 'context', None) or 'unexpected text'}, {problem}"
    at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    if not at and hasattr(error, "position"):  # a character that YAML does not allow
        at = f" (character {error.position + 1} of the text)"
    return f"{problem or str(error).splitlines()[0]}{at}"


def unknown_key(key: str, prefix: str, groups: Mapping[str, Any], renamed: Mapping[str, str]) -> str:
    """Return the message for a key that its group does not have.

    Parameters
    ----------
    key, prefix
        The key, and the name of its group with a point, such as ``train.``; empty for the top level.
    groups
        The keys that the group has.
    renamed
        {key of an earlier release: current key}; an earlier key is unknown only if the current one is given too.
    """
    name, known = prefix + key, list(all_keys())
    if name in renamed:
        return f"{name} is the former name of {renamed[name]}, and both are given; remove {name}"
    if not prefix and key in known:
        return f"unknown key {key}; in a file, write it as `{': {'.join(key.split('.'))}: VALUE{'}' * key.count('.')}`"
    near = difflib.get_close_matches(key, list(groups), n=1, cutoff=SIMILAR)
    if near:
        return f"unknown key {name}; did you mean {prefix}{near[0]}?"
    likeness = {k: difflib.SequenceMatcher(None, key, k.rsplit(".", 1)[-1]).ratio() for k in known}
    best = max(known, key=lambda k: likeness[k])
    if likeness[best] >= SIMILAR:
        return f"unknown key {name}; did you mean {best}?"
    return f"unknown key {name}; choose one of {', '.join(prefix + k for k in groups)}"


def invalid_value(errors: Sequence[ErrorDetails]) -> str:
    """Return key, problem and value of the first error of pydantic's validation."""
    first = errors[0]
    loc, problem = first["loc"], _FIXES.get(first["type"], first["msg"])
    if first["type"] == "missing":  # the list is too short; pydantic reports each value that it lacks
        loc = loc[:-1]
        needed = 1 + max(int(e["loc"][-1]) for e in errors if e["type"] == "missing" and e["loc"][:-1] == loc)
        problem = f"must be a list of {needed} values"
    elif first["type"] == "too_long":
        problem = f"must be a list of {first['ctx']['max_length']} values"
    given = first["input"]
    if (
        len(loc) > 1 and ".".join(map(str, loc[:-1])) in all_keys()
    ):  # of a value of several types, pydantic adds the type
        loc = loc[:-1] if isinstance(loc[-1], str) else loc
    return f"{'.'.join(map(str, loc))}: {problem} (given: {given!r}, {type(given).__name__})"


def not_json(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key whose value JSON cannot represent, with the value."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from not_json(value, f"{prefix}{key}.")
            continue
        try:
            json.dumps(value)
        except TypeError:
            yield f"{prefix}{key}", value
