"""Which of a run's shard sets differ from those of a checkpoint, and whether sets were only appended.

A set is identified by the digest of its manifest, which has the hashes of all its files; no tar is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SETS = "shard sets"
"""Key of the fingerprint: the digest of each set, in the order of ``data.shards``, separated by spaces. Checkpoints of earlier
versions lack it."""
FIRST = "first sets"
"""Key of the fingerprint: the digests of the sets that the run started with, on which genes were selected and levels fitted. Only if
further sets were appended."""
APPEND = (
    "further sections can be trained on as sets of their own, appended to data.shards after the sets of the run, whose order and "
    "content stay the same"
)
"""How data may be added to a run, for messages."""


def sets_of(fingerprint: Mapping[str, str]) -> list[str]:
    """Return the digests of all sets; for several sets of a checkpoint without :data:`SETS`, only the digest of them together."""
    return fingerprint.get(SETS, fingerprint.get("shards", "")).split()


def first_sets(fingerprint: Mapping[str, str]) -> list[str]:
    """Return the digests of the sets that genes and levels are those of (:data:`FIRST`)."""
    return fingerprint[FIRST].split() if FIRST in fingerprint else sets_of(fingerprint)


def further_sets(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the digests of the sets that ``now`` has after those of ``then``; empty if it has none, or if the others differ."""
    old, new = sets_of(then), sets_of(now)
    return new[len(old) :] if new[: len(old)] == old else []


def digests_of(fingerprint: Mapping[str, str], names: Sequence[str]) -> list[str] | None:
    """Return the digest of each of the sets ``names``; None if the fingerprint has only one for all of them."""
    digests = sets_of(fingerprint)
    return digests if len(digests) == len(names) else None


def changed_sets(
    then: Mapping[str, str], now: Mapping[str, str], names_then: Sequence[str], names_now: Sequence[str]
) -> str:
    """Return how the shard sets of two fingerprints differ, for a message.

    Parameters
    ----------
    then, now
        Fingerprints of the checkpoint and of the resuming run.
    names_then, names_now
        Values of ``data.shards``, one per set.
    """
    old, new = digests_of(then, names_then), digests_of(now, names_now)
    if old is None or new is None:
        return "shards (the checkpoint does not state a hash of each set)"
    found, same_path = [], dict(zip(names_then, old, strict=True))
    for name, digest in zip(names_now, new, strict=True):
        if digest not in old:
            known = name in same_path
            found.append(
                f"the content of {name} is not that of the checkpoint"
                if known
                else f"{name} is no set of the checkpoint"
            )
    changed = {name for name, digest in zip(names_now, new, strict=True) if digest not in old}
    for name, digest in zip(names_then, old, strict=True):
        if digest not in new and name not in changed:
            found.append(f"the set of the checkpoint that was {name} is missing")
    if not found and sorted(old) != sorted(new):
        found = ["a set is given more or less often than in the checkpoint"]
    if not found:
        name_of = {digest: name for name, digest in zip(names_now, new, strict=True)}
        found = [f"the order of the sets was {', '.join(name_of[digest] for digest in old)}"]
    return f"shards ({'; '.join(found)})"
