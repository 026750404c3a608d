"""The command line: ``comtip COMMAND``. A command's module parses options and calls the Python interface."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from comtip_shards.errors import name_origins
from comtip_shards.names import printable

from comtip_fast._version import __version__
from comtip_fast.runtime.streams import drain, guarded_stderr, reader_is_gone, write_line

# {command: help}. A command's module is imported only if the command is used, which keeps --help fast.
COMMANDS = {
    "shards": "check tissue sections, and build, merge and verify shard sets of them",
    "pretrain": "train a model on a shard set",
    "evaluate": "score a model on held-out sections, with nulls and baselines",
    "adapt": "adapt a model to a section, and compare it with the unadapted model on other spots",
    "predict": "predict gene expression of a section or of a slide without spots",
    "embed": "embed a section's tiles in the shared space",
    "convert": "write a section, prediction or embedding as SpatialData or Space Ranger files",
    "export": "copy the export of a finished run, or write a checkpoint as an export (safetensors and config.json)",
    "genes": "show how a gene identifier is resolved, or compute gene vectors",
    "plan": "estimate memory, traffic and time of a run on given hardware",
    "bench": "measure loaders or training steps on this machine, or score encoders on HEST-Benchmark",
    "doctor": "show which optional features work on this machine",
}
# Commands in the module of another one: {command: module}.
SHARED = {"embed": "predict"}
USER_ERROR, RESTART, KILLED = 2, 75, 143
SPIN_COUNT = "20000"
"""Iterations that an idle OpenMP thread spins before it sleeps; docs/performance.md compares it with the default."""
PIPE_CLOSED = 141  # as shells report a program that SIGPIPE terminated
# Errors of these types are caused by the input and name it; all others are bugs and show a traceback.
BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a bug raises its exception.

    0: success. 1: a check failed, or a bug. 2: bad input. 75: restart needed (a rank lost, a disk full). 130: interrupted.
    141: the reader of the output has closed it. 143: stopped by SIGTERM or SIGHUP after saving a checkpoint.
    """
    with guarded_stderr():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    """Parse the arguments, set up the log, run the command, and turn known errors into messages and exit codes."""
    from comtip_fast.cli.options import check_out

    _limit_spinning()
    parser = _parser(arguments)
    args = parser.parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Message(args.with_options))
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.INFO, handlers=[handler])
    for noisy in ("h5py", "matplotlib", "PIL", "fsspec", "asyncio", "ome_zarr"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if args.command != "pretrain" and not args.debug:
        logging.getLogger("comtip_kernels").setLevel(logging.WARNING)
    try:
        check_out(args)
        code = int(args.run(args) or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        write_line("comtip: interrupted", sys.stderr)
        return 130
    except BrokenPipeError:
        if not (reader_is_gone(sys.stdout) or reader_is_gone(sys.stderr)):
            raise
        return PIPE_CLOSED
    except BAD_INPUT as error:
        if args.debug:
            raise
        write_line(f"comtip: error: {printable(args.with_options(name_origins(str(error))))}", sys.stderr)
        return USER_ERROR
    except Exception as error:
        disk_error = _disk_error(error)
        if disk_error is None or args.debug:
            raise
        code, message = disk_error
        write_line(f"comtip: error: {message}", sys.stderr)
        return code
    finally:
        drain(sys.stdout)


def _limit_spinning() -> None:
    """Make idle OpenMP threads sleep soon, unless the environment sets ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY``.

    OpenMP reads the environment when torch is imported. If another process uses the core of one thread, the others would otherwise
    spin until that thread is scheduled again.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def _disk_error(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and message for a disk error, or None for any other error."""
    from comtip_shards.storage.disk import disk_fix, disk_trouble, error_number, unwritable

    problem = disk_trouble(error)
    if problem is not None:
        return RESTART, f"{problem}; {disk_fix(error)}, then run the same command again"
    problem = unwritable(error)
    if problem is None:
        return None
    named = {errno.ENAMETOOLONG: "give a shorter one", errno.ELOOP: "remove the links that form a loop"}
    fix = named.get(error_number(error) or 0, "give another path, or make this one writable")
    return USER_ERROR, f"{problem}; {fix}"


class _Message(logging.Formatter):
    """Formats log messages: names options instead of Python arguments, and escapes control characters of quoted text."""

    def __init__(self, with_options: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self._with_options = with_options

    def format(self, record: logging.LogRecord) -> str:
        """Return the message as it is shown."""
        return printable(self._with_options(name_origins(super().format(record))))


@functools.cache
def _build_options() -> Mapping[str, str]:
    """Return the options of ``comtip shards``.

    They are imported only if a message names an option that the command of the user does not have.
    """
    from comtip_fast.cli.options import options_of

    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module("comtip_fast.cli.shards").add_arguments(parser)
    return options_of(parser)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser, with the options of the command that ``arguments`` names and of no other."""
    parser = argparse.ArgumentParser(prog="comtip", description="CoMTIP: predict gene expression from histology.")
    parser.add_argument("--version", action="version", version=f"comtip {__version__}")
    parser.add_argument("--debug", action="store_true", help="show debug messages and full tracebacks")
    # Added by DeepSpeed's launcher by default; the same value is in LOCAL_RANK.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in arguments if a in COMMANDS), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:
            from comtip_fast.cli.options import name_options, options_of

            module = importlib.import_module(f"comtip_fast.cli.{SHARED.get(name, name)}")
            add, run = (f"add_{name}_arguments", f"run_{name}") if name in SHARED else ("add_arguments", "run")
            nested = getattr(module, "SUBCOMMANDS", {}).get(next(iter(arguments[arguments.index(name) + 1 :]), None))
            if nested is not None:
                nested(sub.add_subparsers(dest="action", required=True))
            else:
                getattr(module, add)(sub)
            with_options = functools.partial(name_options, own=options_of(sub), other=_build_options)
            sub.set_defaults(run=getattr(module, run, None) or sub.get_default("run"), with_options=with_options)
    return parser
