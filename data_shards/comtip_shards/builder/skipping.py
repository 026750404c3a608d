"""Policy for a section that cannot be built: stop the build, or leave the section out and report it at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from comtip_shards.errors import ShardError, SourceError
from comtip_shards.storage.disk import disk_trouble, unwritable

OnError = Literal["stop", "skip"]
INCOMPLETE = "incomplete.json"
"""File in the staging folder that marks a set without some of its sections; the same command may complete the set."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Failure:
    """A section that cannot be built, and why."""

    section_id: str
    reason: str


def check_policy(on_error: str, part: tuple[int, int] | None) -> OnError:
    """Check that ``on_error`` is a known policy that can be combined with ``part``, and return it.

    Raises
    ------
    SourceError
        ``on_error`` is neither ``stop`` nor ``skip``; or it is ``skip`` and one part of a set is built: all parts must have the
        same list of sections, but a part cannot know which sections another part leaves out.
    """
    if on_error not in get_args(OnError):
        raise SourceError(f"`on_error` {on_error!r} is unknown; use {' or '.join(get_args(OnError))}")
    if on_error == "skip" and part is not None:
        raise SourceError(
            "`on_error=skip` cannot be combined with `part`, because all parts must agree on the sections; leave `on_error` "
            "out, and exclude the sections that fail from every part"
        )
    return on_error  # type: ignore[return-value]


def attempt(function: Callable[..., _T], section_id: str, *arguments: Any) -> _T | Failure:
    """Call ``function(*arguments)``; if it raises because of the section, return a :class:`Failure`.

    Errors of the output folder and of the disk are raised, because all other sections would fail with them too.
    """
    try:
        return function(*arguments)
    except SourceError as error:
        return Failure(section_id, str(error))
    except ShardError:
        raise
    except Exception as error:
        if disk_trouble(error) is not None or unwritable(error) is not None:
            raise
        text = " ".join(str(error).split()) or "no message"
        return Failure(section_id, f"unexpected {type(error).__name__} ({text}); `on_error=stop` shows the traceback")


def incomplete_set(staging: Path) -> str | None:
    """Return the fingerprint of the set that was written without some sections, or None if ``staging`` records no such set."""
    try:
        found = json.loads((staging / INCOMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found["fingerprint"]) if isinstance(found, dict) and "fingerprint" in found else None


def mark_incomplete(staging: Path, fingerprint: str, failures: list[Failure]) -> None:
    """Record that the set lacks sections, so that its staged sections are kept for the next run."""
    facts = {"fingerprint": fingerprint, "left_out": {f.section_id: f.reason for f in failures}}
    (staging / INCOMPLETE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def text_of(failures: list[Failure], n_sections: int, staging: Path) -> str:
    """Return the message about the sections that were left out, empty if there are none."""
    if not failures:
        return ""
    lines = [f"\nsections that could not be built and were left out ({len(failures)} of {n_sections}):"]
    lines += [f"  {f.section_id}: {f.reason}" for f in failures]
    kept = f": finished sections are kept in {staging} (delete it if the set is final)" if staging.is_dir() else ""
    lines.append(f"fix them and run the same command again{kept}")
    return "\n".join(lines) + "\n"
