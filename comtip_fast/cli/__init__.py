"""The command line: ``comtip COMMAND``. Each command is one thin module; the work is done elsewhere."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from comtip_shards.names import printable

from comtip_fast._version import __version__
from comtip_fast.streams import drain, guarded_stderr, reader_is_gone, write_line

# name -> (module, help); imported only when asked for, so that --help answers at once.
COMMANDS = {
    "shards": "build and verify shard sets from tissue sections",
    "pretrain": "train a model on a shard set",
    "evaluate": "score a model on sections it never saw, beside nulls and baselines",
    "predict": "predict gene expression of a section from its tiles",
    "embed": "embed a section's tiles in the shared space",
    "export": "write a checkpoint as safetensors and config.json",
    "genes": "say how a gene identifier is understood",
    "plan": "predict memory, traffic and time of a run on given hardware",
    "bench": "measure loaders on this machine",
    "doctor": "say what this machine can run",
}
USER_ERROR, RESTART, KILLED = 2, 75, 143
PIPE_CLOSED = 141  # as a shell reports a program that SIGPIPE ended
# These say what is wrong with the input, with the file's name; anything else is our bug and is shown whole.
BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 a check failed or a bug, 2 bad input, 75 to be started again (a rank lost, a disk full), 130 interrupted,
    141 the reader of the output has ended, 143 stopped by SIGTERM or SIGHUP and saved.
    """
    with guarded_stderr():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    parser = _parser(arguments)
    args = parser.parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.INFO, handlers=[handler])
    for noisy in ("h5py", "matplotlib", "PIL", "fsspec", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if args.command != "pretrain" and not args.debug:
        logging.getLogger("comtip_kernels").setLevel(logging.WARNING)
    try:
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
        write_line(f"comtip: error: {printable(str(error))}", sys.stderr)
        return USER_ERROR
    except Exception as error:
        found = _of_the_disk(error)
        if found is None or args.debug:
            raise
        write_line(f"comtip: error: {found[1]}", sys.stderr)
        return found[0]
    finally:
        drain(sys.stdout)


def _of_the_disk(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the message of an error of the disk, None for any other error."""
    from comtip_shards.storage.disk import disk_trouble, unwritable

    said = disk_trouble(error)
    if said is not None:
        return RESTART, f"{said}; make room (or repair the device), then run the same command again"
    said = unwritable(error)
    return None if said is None else (USER_ERROR, f"{said}; give another path, or make this one writable")


class _Printable(logging.Formatter):
    """Escapes control characters: messages quote names and texts from files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().format(record))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comtip", description="CoMTIP: predict gene expression from histology.")
    parser.add_argument("--version", action="version", version=f"comtip {__version__}")
    parser.add_argument("--debug", action="store_true", help="show debug messages and whole tracebacks")
    # DeepSpeed's launcher adds it before the rest, unless told otherwise; what it says stands in LOCAL_RANK too.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in arguments if a in COMMANDS), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:
            module = importlib.import_module(f"comtip_fast.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=getattr(module, "run", None) or sub.get_default("run"))
    return parser
