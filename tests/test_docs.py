"""Documents stay true to the repository: links, paths and commands in Markdown files exist."""

import csv
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from comtip_fast.cli import _parser, main
from comtip_fast.config.io import load_config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "comtip_fast|data_shards|kernels|bench|tests|testkit|configs|docs"
HISTORY = "CHANGELOG.md"


def documents() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tracked files are unknown")
    found = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in found.stdout.split() if name != HISTORY and "/fixtures/" not in name]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(document: Path) -> list[str]:
    out = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = document.parent / target if target else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            out.append(f"{document}: {target}#{anchor}")
    return out


def missing_paths(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)`", text)
    scripts = re.findall(r"python (bench/[\w/]+\.py)", text)
    name = document.relative_to(ROOT)
    return [f"{name}: {path}" for path in {*paths, *scripts} if not any(ROOT.glob(path.rstrip("/")))]


def commands(document: Path) -> set[tuple[str, ...]]:
    """Return (command, option, ...) of every ``comtip`` call in code."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    code = re.findall(r"^ *comtip .*$|`comtip [^`]*`|--no-python +comtip .*$", text, re.MULTILINE)
    found = set()
    for line in code:
        words = line.replace("`", "").partition("comtip ")[2].partition("#")[0].split()
        names = (
            [words[0], *words[1:2]]
            if words and (words[0] in ("shards", "bench") or "vectors" in words[1:2])
            else words[:1]
        )
        if all(re.fullmatch(r"[a-z]+", name) for name in names):
            found.add((" ".join(names), *sorted(w for w in words if re.fullmatch(r"--[a-z-]+", w))))
    return found


def test_links_point_to_files_and_headings():
    assert [link for document in documents() for link in broken_links(document)] == []


def test_paths_in_documents_exist():
    assert [path for document in documents() for path in missing_paths(document)] == []


def test_every_page_of_docs_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name})" not in text] == []


def test_commands_and_options_in_documents_exist(capsys: pytest.CaptureFixture[str]):
    found = set().union(*(commands(document) for document in documents()))
    assert len({name for name, *_ in found}) >= 10
    helps: dict[str, str] = {}
    for name in {name for name, *_ in found}:
        with pytest.raises(SystemExit) as end:
            main([*name.split(), "--help"])
        assert end.value.code == 0, name
        helps[name] = capsys.readouterr().out
    wrong = [(name, o) for name, *options in found for o in options if not re.search(rf"{o}(?![\w-])", helps[name])]
    assert wrong == []


def command_lines(text: str) -> list[list[str]]:
    """Return the words after ``comtip`` of every command line in blocks of shell code."""
    lines = [
        line.strip()
        for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    found = [re.search(r"^(?:.*--no-python +)?comtip (.*)$", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_command_lines_in_documents_parse(capsys: pytest.CaptureFixture[str]):
    """Not only the names of options, but all arguments and their values; settings are keys of the config."""
    found = {tuple(words) for d in documents() for words in command_lines(d.read_text(encoding="utf-8"))}
    assert len(found) > 30
    for words in found:
        try:
            args = _parser(words).parse_args(words)
        except SystemExit:
            pytest.fail(f"comtip {' '.join(words)}: {capsys.readouterr().err}")
        config = getattr(args, "config", None)
        settings = [value for name in ("set", "overrides") for value in getattr(args, name, None) or []]
        if config is not None:
            load_config(ROOT / config if (ROOT / config).is_file() else None, settings)


def missing_tests(text: str) -> list[str]:
    """Return the test functions and files that a document names and ``tests/`` lacks."""
    files = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "bench").rglob("test_*.py")]
    known = {f.stem for f in files}.union(
        *(re.findall(r"def (test_\w+)", f.read_text(encoding="utf-8")) for f in files)
    )
    return sorted(set(re.findall(r"`(?:[\w/]+/)?(test_\w+)(?:\.py)?`", text)) - known)


def test_tests_in_documents_exist():
    texts = {str(d): d.read_text(encoding="utf-8") for d in documents()}
    assert {name: found for name, text in texts.items() if (found := missing_tests(text))} == {}
    assert missing_tests("`test_of_nothing` in `tests/test_docs.py`") == ["test_of_nothing"]


def wrong_options(text: str) -> list[str]:
    """Return ``SCRIPT OPTION`` for every option after ``python bench/SCRIPT.py`` that the script does not define."""
    calls = re.findall(r"python (bench/[\w/]+\.py)([^`\n]*)", text.replace("\\\n", " "))
    used = {(script, option) for script, rest in calls for option in re.findall(r" (--[a-z][\w-]*)", rest)}
    sources = {script: (ROOT / script).read_text(encoding="utf-8") for script, _ in used}
    return sorted(f"{script} {option}" for script, option in used if f'"{option}"' not in sources[script])


def test_options_of_scripts_in_documents_exist():
    assert [found for document in documents() for found in wrong_options(document.read_text(encoding="utf-8"))] == []
    assert wrong_options("`python bench/train/parity.py --never 1`") == ["bench/train/parity.py --never"]


MODULES = {"vision.patch_embed", "vision.blocks"}
"""Names of modules in ``optim.freeze``, which look like settings."""


def unknown_settings(text: str) -> list[str]:
    """Return the names ``group.key`` outside of Python code that are not keys of a config."""
    keys = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/settings.md").read_text(encoding="utf-8"), re.MULTILINE))
    keys |= {key.rpartition(".")[0] for key in keys}
    groups = "|".join({key.split(".")[0] for key in keys if "." in key})
    prose = re.sub(r"^```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(rf"(?<![\w/.-])((?:{groups})(?:\.[a-z][a-z_0-9]*)+)(?![\w(/])", prose)
    files = (".py", ".csv", ".tsv", ".json", ".jsonl", ".md", ".yaml", ".txt", ".safetensors", ".h5ad", ".svg")
    return sorted({name for name in named if not name.endswith(files)} - keys - MODULES)


def test_settings_in_documents_exist():
    texts = {str(d): d.read_text(encoding="utf-8") for d in documents()}
    assert {name: found for name, text in texts.items() if (found := unknown_settings(text))} == {}
    assert unknown_settings("`train.lr` and `optim.lr`, see train.py") == ["train.lr"]


def builds_without_split(text: str) -> list[str]:
    """Return the builds of a recipe (they state a tile) whose sections have no split, so that training refuses the set."""
    builds = re.findall(r"^(?:#\s+)?(comtip shards build .*--tile-um .*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [b for b in builds if "data_shards/samples" not in b and not re.search(r" --(auto-)?split ", b)]


def test_builds_that_a_training_follows_state_splits():
    recipes = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.*")]
    found = {str(r): builds_without_split(r.read_text(encoding="utf-8")) for r in recipes if r.is_file()}
    assert {name: builds for name, builds in found.items() if builds} == {}
    assert len(builds_without_split("#   comtip shards build SOURCE --out s --tile-um 112 --tile-px 224")) == 1


def table(name: str) -> list[dict[str, str]]:
    with (ROOT / "bench" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_counts_in_sentences_are_those_of_the_tables():
    """Sentences of docs/performance.md, with the numbers of the tables that they summarise."""
    text = " ".join((ROOT / "docs/performance.md").read_text(encoding="utf-8").split())
    steps = {r["walk"]: r for r in table("rehearsal.csv") if r["config"] == "1gpu"}
    one, pieces = steps["step"], steps["step micro_batches=4 activation_checkpointing=true"]
    assert (
        f"has {int(one['operators']):,} operators, {one['launches']} launches, no host wait, one upload of "
        f"{float(one['uploads_mb']):.0f} MB, {float(one['gflop']) / 1e3:.1f} TFLOP, {float(one['moved_gb']):.0f} GB of operands and "
        f"results, and {float(one['saved_mb']) / 1e3:.1f} GB saved for the backward pass; with four micro-batches and activation "
        f"checkpointing {float(pieces['gflop']) / 1e3:.1f} TFLOP and {float(pieces['saved_mb']) / 1e3:.1f} GB."
    ) in text
    ranks = next(r for r in table("cost_curves.csv") if (r["curve"], r["value"]) == ("ranks", "64"))
    reduced = next(r for r in table("rehearsal.csv") if (r["config"], r["ranks"], r["walk"]) == ("8xh100", "8", "step"))
    assert f"{float(reduced['all_reduce_mb']):.0f} of the {float(ranks['sent_mb']):.0f} MB with 64 ranks" in text
    shares = [100 * (float(r["peak_mb"]) / float(r["saved_mb"]) - 1) for r in table("drawn_memory.csv")]
    assert f"The peak is {min(shares):.0f} to {max(shares):.0f} % more." in text


def test_a_command_line_with_a_wrong_value_is_detected():
    (words,) = command_lines("text\n```bash\ncomtip plan --config c.yaml \\\n  --gpus many  # x\n```\n")
    assert words == ["plan", "--config", "c.yaml", "--gpus", "many"]
    with pytest.raises(SystemExit):
        _parser(words).parse_args(words)


def test_a_broken_link_is_detected(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#none) [c](gone.md) [d](https://example.org/x)\n")
    assert [link.rpartition(": ")[2] for link in broken_links(page)] == ["#none", "gone.md#"]


def test_nightly_runs_every_target_that_is_called_nightly():
    rules = re.findall(r"^([a-z-]+):([^#\n]*)##(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    called = {name for name, _, text in rules if text.strip().startswith("nightly:")}
    assert called >= {"rehearsal-grid", "mutants"}
    needs = {name: set(others.split()) for name, others, _ in rules}
    assert called <= needs["nightly"], called - needs["nightly"]
