"""The project uses the field's terms: none of the former names and phrases occurs in code, documents or configs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FORBIDDEN = {
    # Identifiers, with the name that replaced them.
    r"\bfirst_does\b": "on_rank_zero",
    r"\bfind_place\b": "distributed_env",
    r"\bpass_on\b": "ring_shift",
    r"\bsaid_clearly\b": "explain_failures",
    r"\bend_now\b": "hard_exit",
    r"\bRefusals\b": "RestartGuard",
    r"\bat_home\b": "gathered_for_read",
    r"\bwritable\(": "elementwise",
    r"\bover_heads\b": "embedding_losses",
    r"\b_?half_row\b": "row_weight",
    r"\b_Everyone\b": "gather_row_metadata",
    r"\bAlarm\b": "SpikeDetector",
    r"\bMeter\b": "ThroughputMeter",
    r"\bTracer\b": "Profiler",
    r"\.beat\(": "Watchdog.reset",
    r"\.settle\(": "join_quietly",
    r"\bset_aside_after\b": "quarantine_newer",
    r"\bkeep_apart\b": "enforce_split_policy",
    r"\bsection_print\b": "section_fingerprint",
    r"\bPatience\b": "RetryPolicy",
    r"\bcomm_clock\b": "comm_timer",
    r"\boutfolder\b": "output_dir",
    r"\bloader_peers\b": "bench/loader/peers.py",
    r"\btestkit[./]breakdowns\b": "testkit.fault_injection",
    r"\btestkit[./]faults\b": "testkit.section_faults",
    r"\bgenes\.per_task\b": "genes.per_cohort",
    # Words and phrases, with the standard term.
    r"\baside\b": "tmp_path, temporary",
    r"\bbeside\b": "next to, with, compared with",
    r"\bsaid\b": "message, reported",
    r"\bmade\b": "built, computed, created",
    r"(?<!in )(?<!in-)\bplaces?\b": "index, rank, offset, position",
    r"\b(of|by) itself\b": "automatically, alone",
    r"\bby themselves\b": "automatically",
    r"\b(go|goes|going|went) on\b": "continue, resume",
    r"\bstands? (twice|still|aside|beside|alone)\b": "duplicate, block, self-contained",
    r"\b[Tt]wins\b": "duplicates, references",
    r"\b[Bb]reak(s|down|downs)? down\b|\b[Bb]reakdowns?\b": "failure",
    r"\bWays in which\b": "the noun itself",
    r"\bHear that\b": "reset, notify",
    r"\b(is|are) told by\b": "is identified by, errors name",
    r"\bwithout Python's hand\b": "without per-pixel Python",
    r"\bwhose it is\b": "ownership",
    r"\b(mend|mends|mended)\b": "fix",
    r"\bshared out\b": "sharded, split",
    r"\bpeople mean\b": "is meant",
    r"\bto the (bit|byte)\b": "bit-identical, byte-identical",
    r"\bspoil(s|ed|t)?\b": "corrupt",
    r"\bmade-up\b": "synthetic",
    r"\bdef test_\w*_(said|told|aside|beside|twins|mended|goes_on|in_place_of)(_|\()": "reported, next to, duplicates, fixed",
}
"""{pattern: what to write instead}; case-sensitive."""

NOT_YET_CHECKED: tuple[str, ...] = ()
"""Path prefixes that have not been rewritten yet. This list may only get shorter."""

ALLOWED = {
    ("comtip_fast/config/io.py", r"RENAMED|genes\.per_task"): "key of 0.1 that is still read",
    ("tests/test_words.py", ".*"): "lists the words",
    ("CHANGELOG.md", ".*"): "history is not rewritten",
    ("data_shards/FORMAT.md", r"`said`|source\.beside|`beside`"): "names of fields in files that exist",
    ("tests/data_shards/test_sources_detect.py", r"made up"): "attribution of the synthetic source",
    ("tests/data_shards/test_merge_foreign.py", r"\"said\": "): "field of the manifest and of reports",
    ("data_shards/comtip_shards/format/section_source.py", r"^    (said|beside): "): "fields of the manifest",
    ("data_shards/comtip_shards/builder/writer.py", r"\"beside\""): "field of the manifest",
    ("bench/scale/start.py", r"\"beside\""): "field of the manifest",
    ("data_shards/comtip_shards/qc/result.py", r"``said``|[\"']said[\"']"): "field of the manifest and of reports",
    ("data_shards/comtip_shards/qc/stored.py", r"^    said: |f\.said"): "field of reports",
    ("tests/comtip_fast/test_evaluation.py", r"made up"): "attribution of the synthetic source",
    ("tests/integration/test_cli.py", r"made up"): "attribution of the synthetic source",
    ("testkit/tiny.py", r"made up"): "attribution of the synthetic source, tested in rooms not yet checked",
}
"""{(path, regular expression that must match on the line): reason}."""


def files() -> list[str]:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [f for f in tracked.splitlines() if f.endswith((".py", ".md", ".yaml", ".sbatch", ".def", "Containerfile"))]


def is_allowed(path: str, line: str) -> bool:
    return any(path == file and re.search(pattern, line) for file, pattern in ALLOWED)


def violations(path: str, text: str) -> list[str]:
    """Return ``path:line: word (write: replacement)`` for each forbidden word that is not allowed there."""
    return [
        f"{path}:{number}: {match.group(0)!r} (write: {instead})"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in FORBIDDEN.items()
        if (match := re.search(pattern, line)) and not is_allowed(path, line)
    ]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tracked files are unknown")
    return files()


def test_no_former_name_or_phrase_is_left(tracked: list[str]):
    checked = [f for f in tracked if not f.startswith(NOT_YET_CHECKED)]
    assert len(checked) > 60, "most of the repository must be checked"
    found = [v for f in checked if (ROOT / f).is_file() for v in violations(f, (ROOT / f).read_text(encoding="utf-8"))]
    assert not found, "\n".join(["", *found])


def test_former_names_are_detected():
    assert violations("docs/x.md", "The file is written aside.") == [
        "docs/x.md:1: 'aside' (write: tmp_path, temporary)"
    ]
    assert len(violations("a.py", "x = first_does(work)\n\nplace = 3  # goes on where it was")) == 3
    assert len(violations("test_a.py", "def test_an_error_is_said():")) == 1
    assert not violations("a.py", "x.mul_(2)  # in place, in-place; replaced; said_so; made_with; misplaced")


def test_every_exception_is_still_needed(tracked: list[str]):
    for file, pattern in ALLOWED:
        assert file in tracked or file == "tests/test_words.py", f"{file} is not tracked any more: remove its exception"
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        used = [line for line in lines if re.search(pattern, line) and any(re.search(w, line) for w in FORBIDDEN)]
        assert used, f"ALLOWED has an exception for {file} ({pattern}) that nothing needs: remove it"


def test_the_list_of_unchecked_paths_has_no_dead_entry(tracked: list[str]):
    dead = [prefix for prefix in NOT_YET_CHECKED if not any(f.startswith(prefix) for f in tracked)]
    assert not dead
