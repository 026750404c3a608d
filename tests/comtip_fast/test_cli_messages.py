"""Messages of the library name Python arguments, the command line names options; each subcommand has its own help."""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from comtip_shards import SourceError

from comtip_fast.cli import COMMANDS, SHARED, main
from comtip_fast.cli.options import name_options, options_of
from comtip_fast.shards import build_shards

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("comtip_fast", "data_shards/comtip_shards", "kernels/comtip_kernels")
OPTION = re.compile(r"(?<![\w-])--[a-z{]")
MARKED = re.compile(r"`([a-z]\w*)(?:=[^`\s]*)?`")
OTHER_PROGRAMS = {
    "comtip_fast/benchmarks/rounds.py": "git",
    "comtip_fast/config/settings_page.py": "text of the settings page, which explains both",
    "comtip_fast/training/distributed/rendezvous.py": "torchrun",
    "data_shards/comtip_shards/genes/make_resource.py": "a program of its own",
    "data_shards/comtip_shards/slides/base.py": "vips",
    "data_shards/comtip_shards/slides/wsi.py": "vips",
    "kernels/comtip_kernels/ledger/__main__.py": "a program of its own",
    "kernels/comtip_kernels/ledger/aot.py": "cuobjdump",
    "kernels/comtip_kernels/ledger/toolchain.py": "pip",
}
"""{module whose strings name options of another program: which}."""

MARKDOWN = ("comtip_fast/config/settings_page.py", "comtip_fast/export.py")
"""Modules that write a page, with other words as code."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield path and syntax tree of every module outside the command line."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "cli" not in path.parts:
                yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string that is no docstring; fields of f-strings are written ``{}``."""
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            parts.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            if id(node) not in parts:
                yield node.lineno, text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def options_in_messages(path: str, tree: ast.Module) -> list[str]:
    return [f"{path}:{line}: {text!r}" for line, text in strings(tree) if OPTION.search(text)]


def parser_of(command: str, sub: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a command as :func:`main` builds it."""
    from comtip_fast.cli import _parser

    commands = next(a for a in _parser([command, *([sub] if sub else [])])._actions if a.dest == "command")
    assert isinstance(commands, argparse._SubParsersAction)
    return commands.choices[command]


def subcommands() -> Iterator[list[str]]:
    """Yield the words of every command and subcommand."""
    for command in COMMANDS:
        yield [command]
        module = importlib.import_module(f"comtip_fast.cli.{SHARED.get(command, command)}")
        nested = next((a for a in parser_of(command)._actions if isinstance(a, argparse._SubParsersAction)), None)
        for sub in [*(nested.choices if nested else ()), *getattr(module, "SUBCOMMANDS", ())]:
            yield [command, sub]


@pytest.fixture(scope="module")
def options() -> dict[str, str]:
    found = dict(options_of(parser_of("genes", "vectors")))
    for command in COMMANDS:
        found |= options_of(parser_of(command))
    return found


def test_messages_of_the_library_name_no_option():
    found = {path: options_in_messages(path, tree) for path, tree in modules()}
    assert [text for path, texts in found.items() if path not in OTHER_PROGRAMS for text in texts] == []
    unused = [path for path in OTHER_PROGRAMS if not found.get(path)]
    assert not unused, f"exceptions that nothing needs: {unused}"


def test_an_option_in_a_message_is_found():
    tree = ast.parse('"""Docs --mpp."""\ndef f(x):\n    """--mpp"""\n    raise ValueError(f"{x}: no scale; set --mpp")')
    assert options_in_messages("a.py", tree) == ["a.py:4: '{}: no scale; set --mpp'"]


def test_marked_names_are_arguments_and_options(options: dict[str, str]):
    """Each marked name is a parameter or field in the library, so that a Python user can set it, and an option."""
    arguments: set[str] = set()
    marked: dict[str, str] = {}
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                arguments.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                arguments.add(node.target.id)
        if path not in MARKDOWN:
            marked |= {name: f"{path}:{line}" for line, text in strings(tree) for name in MARKED.findall(text)}
    assert len(marked) > 30
    assert {name: where for name, where in marked.items() if name not in arguments or name not in options} == {}


def test_arguments_become_options():
    own, other = {"fmt": "--format", "mpp": "--mpp"}, {"tile_px": "--tile-px"}
    cases = {
        "set `mpp`": "set --mpp",
        "`mpp=0.5` is used; `fmt` too": "--mpp 0.5 is used; --format too",
        "build with `tile_px=224`": "build with --tile-px 224",
        "use `data.tile_px=224`": "use --set data.tile_px=224",
        "`x` of NumPy, `comtip shards verify`, `np.float32`": "`x` of NumPy, `comtip shards verify`, `np.float32`",
    }
    assert {text: name_options(text, own, lambda: other) for text in cases} == cases


def test_an_error_names_the_argument_in_python_and_the_option_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SourceError, match=r"^`pool_um` 0: must be greater than 0$"):
        build_shards(tmp_path, tmp_path / "set", facts={"pool_um": 0})
    assert main(["shards", "build", str(tmp_path), "--out", str(tmp_path / "set"), "--pool-um", "0"]) == 2
    assert capsys.readouterr().err == "comtip: error: --pool-um 0: must be greater than 0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["shards", "build", "x", "--out", "y", "--auto-split", "80,a,10"],
            "'80,a,10': write TRAIN,VAL,TEST as numbers",
        ),
        (["bench", "loader", "--spots", "0"], "--spots 0: must be at least 1"),
        (["bench", "loader", "--epochs", "-1"], "--epochs: '-1': give an integer of at least 0"),
        (["bench", "step", "--config", "x.yaml", "--per-round", "0"], "--per-round 0: must be at least 1"),
    ],
)
def test_a_wrong_number_is_named_with_its_option_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_every_subcommand_prints_its_own_help(capsys: pytest.CaptureFixture[str]):
    found: dict[str, str] = {}
    for words in subcommands():
        with pytest.raises(SystemExit) as end:
            main([*words, "--help"])
        assert end.value.code == 0
        found[" ".join(words)] = capsys.readouterr().out
    assert {"genes vectors", "shards build", "shards verify", "bench hest", "embed"} <= set(found)
    assert {words for words, text in found.items() if not re.match(rf"usage: comtip {words} [^a-z]", text)} == set()
    assert len(set(found.values())) == len(found)
    assert "--min-detection" in found["genes vectors"]
    assert "--min-detection" not in found["genes"]
