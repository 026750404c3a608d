"""Documents stay true to the repository: links, paths and commands in Markdown files exist."""

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
