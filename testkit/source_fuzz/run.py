"""Fuzzing of the source readers: each mutated source must be read, or refused with an error that names it.

Everything else counts as escaped: any other exception, a read that exceeds the time limit, more than 2 GiB of memory, a file
written outside the output folder, a started process or connection, values that no section can have, or an error that does not
name the source. Seed and number reproduce a case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards.errors import ShardError, SourceError, UnforeseenError
from comtip_shards.sections.section import Section
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import open_slide
from comtip_shards.sources import open_source
from comtip_shards.sources.files.packaging import temporary_folder
from comtip_shards.sources.hdf5.probe import WALK

from testkit.source_fuzz.corpus import SOURCES, Source
from testkit.source_fuzz.mutate import mutate, pick, replaced

MEMORY_BYTES = 2 << 30
REST_BYTES = 300 << 20
"""What a process that has imported the readers holds before it reads anything."""
_SPAWNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
_CHANGES = {
    "os.rename": (2, 3),
    "os.remove": (1,),
    "os.mkdir": (2,),
    "os.rmdir": (1,),
    "os.link": (2, 3),
    "os.symlink": (2,),
    "os.truncate": (),
    "os.chmod": (2,),
    "shutil.rmtree": (1,),
}
"""Audit events of changes, and which of their arguments are descriptors of the folders that relative paths begin at."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class HangError(BaseException):
    """The time limit was reached; a BaseException, so that no reader handles it."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one case."""

    number: int
    """Number of the case, -1 for an intact source."""
    source: str
    """A key of :data:`testkit.source_fuzz.corpus.SOURCES`."""
    what: str
    """File and mutation."""
    outcome: str
    """``reads``, ``refused`` or ``escaped``."""
    detail: str
    """The message, or the end of the traceback."""
    seconds: float
    peak_mb: int
    """Peak memory of the process in MiB."""


def _in_folder(path: Any, dir_fd: int | None) -> Any:
    """Return the path with the folder of an open descriptor before it; -1 and None stand for the working directory."""
    if dir_fd is None or dir_fd < 0:
        return path
    return Path(f"/proc/self/fd/{dir_fd}").readlink() / os.fsdecode(path)


class Guard:
    """Recorder of changes outside some folders, by an audit hook; a process has one, because hooks cannot be removed."""

    _installed: Guard | None = None

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []

    @classmethod
    def install(cls) -> Guard:
        """Return the guard of this process; the first call installs it."""
        if cls._installed is None:
            cls._installed = cls()
            sys.addaudithook(cls._installed._hook)
        return cls._installed

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None or (event == "subprocess.Popen" and str(WALK) in args[1]):
            return
        named = args[:2]
        if event == "open":  # args[0] is a descriptor for a pipe to the helper process
            named = args[:1] if self._is_write(args[1], args[2]) else ()
        paths = [a for a in named if isinstance(a, (str, bytes, os.PathLike))]
        if descriptors := [args[i] for i in _CHANGES.get(event, ()) if i < len(args)]:
            paths = [_in_folder(path, fd) for path, fd in zip(paths, cycle(descriptors), strict=False)]
        if event in _SPAWNS or (event in ("open", *_CHANGES) and not all(map(self._is_allowed, paths))):
            self.seen.append(f"{event} {args[:2]}")

    @staticmethod
    def _is_write(mode: Any, flags: Any) -> bool:
        if isinstance(mode, str):
            return any(c in mode for c in "wax+")
        return bool(isinstance(flags, int) and flags & WRITES)

    def _is_allowed(self, path: Any) -> bool:
        if isinstance(path, int) or self.allowed is None:
            return True
        real = os.path.realpath(os.fsdecode(path))
        return real == "/dev/null" or real.startswith(self.allowed)

    @contextmanager
    def only_in(self, *folders: Path) -> Iterator[None]:
        """Record in ``seen`` the changes outside ``folders``, and started processes and connections, inside the block."""
        self.seen, self.allowed = [], tuple(f"{folder.resolve()}{os.sep}" for folder in folders)
        try:
            yield
        finally:
            self.allowed = None


Through = Callable[[Path, Source, Path], None]
"""Reads a source at a path; the third argument is the output folder."""


def check_section(section: Section) -> None:
    """Check the values of a section, and cut tiles.

    Raises
    ------
    AssertionError
        A value is not possible for a section.
    """
    n = len(section.spot_ids)
    assert section.counts.shape == (n, len(section.gene_ids)), "shape of the counts"
    assert n == 0 or np.isfinite(section.xy).all(), "positions are not finite"
    values = section.counts.data
    assert np.issubdtype(values.dtype, np.integer), "counts are not integers"
    assert (values >= 0).all(), "negative counts"
    section.check()
    assert 0.05 <= section.meta.mpp <= 50, "scale"
    with section.open_slide() as slide:
        check_slide(slide, section.xy[:3], section.meta.mpp)


def check_slide(slide: Slide, xy_N2: np.ndarray, mpp: float) -> None:
    """Check an overview and tiles at ``xy_N2`` (px) of a slide; raises AssertionError for a wrong shape or dtype."""
    picture, _ = slide.overview(256)
    assert picture.dtype == np.uint8, "dtype of the overview"
    assert picture.ndim == 3, "shape of the overview"
    tiles = slide.tiles(xy_N2, mpp, 112.0, 16, 1.0)
    assert tiles.shape == (len(xy_N2), 16, 16, 3), "shape of the tiles"


def read_source(path: Path, source: Source, out: Path) -> None:
    """Read and check every section of a source, or a slide without spots; nothing is written to ``out``."""
    if source.fmt == "slide":
        with open_slide(path) as slide:
            check_slide(slide, np.array([[50.0, 50.0], [0.0, 0.0]]), slide.mpp or 0.5)
        return
    for section in open_source(path, fmt=source.fmt, overrides=facts_of(path, source)):
        check_section(section.read())


def facts_of(path: Path, source: Source) -> dict[str, str]:
    """Return the facts of a source; the name of an image next to it is replaced by its path."""
    facts = dict(source.facts)
    if "." in facts.get("image", ""):
        facts["image"] = str(path.parent / facts["image"])
    return facts


class SourceFuzzer:
    """Writes the intact sources once, and evaluates intact or mutated copies.

    Parameters
    ----------
    folder
        Work folder; sources, copies and outputs are written below it.
    seed
        Seed of all cases.
    limit_s
        Time limit of a case in s.
    through
        Function that is run on each source.
    """

    def __init__(self, folder: Path, seed: int, *, limit_s: int = 60, through: Through = read_source) -> None:
        self.folder, self.seed, self.limit_s, self.through = folder, seed, limit_s, through
        self.intact = folder / "intact"
        self.paths = {
            name: source.write(self.intact / name.replace(" ", "_")).relative_to(self.intact)
            for name, source in SOURCES.items()
        }
        self.guard = Guard.install()

    def intact_outcome(self, name: str) -> Outcome:
        """Return the outcome of an intact source, which must be ``reads``."""
        return self._judge(name, self.folder / "case", lambda root: "nothing", -1)

    def run(self, number: int) -> Outcome:
        """Return the outcome of case ``number``; its source is chosen by the number."""
        rng = np.random.default_rng([self.seed, number])
        name = list(SOURCES)[number % len(SOURCES)]

        def change(root: Path) -> str:
            done = []
            for _ in range(1 if rng.random() < 0.85 else 2):
                files = sorted(
                    p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < 1 << 27
                )
                if not files:
                    break
                file = pick(rng, files)
                done.append(f"{file.relative_to(root)}: {mutate(file, files, rng)}")
            return "; ".join(done)

        return self._judge(name, self.folder / "case", change, number)

    def run_replaced(self, name: str, file: Path, kind: str) -> Outcome:
        """Return the outcome of source ``name`` with ``file``, relative to its folder, replaced by something else."""

        def change(root: Path) -> str:
            files = sorted(p for p in root.rglob("*") if p.is_file())
            return f"{file}: {replaced(root / file, kind, files, np.random.default_rng(self.seed))}"

        return self._judge(name, self.folder / "case", change, -1)

    def files_of(self, name: str) -> list[Path]:
        """Return the files of an intact source, relative to its folder."""
        root = self.intact / name.replace(" ", "_")
        return sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())

    def _judge(self, name: str, case: Path, change: Callable[[Path], str], number: int) -> Outcome:
        shutil.rmtree(case, ignore_errors=True)
        home = name.replace(" ", "_")
        shutil.copytree(self.intact / home, case / home)
        out = case / "out"
        out.mkdir()
        what = change(case / home)
        before = _listing(case / home)
        held = _rss_bytes()
        _reset_peak()
        began = time.monotonic()
        with self.guard.only_in(out, temporary_folder()):  # compressed files are unpacked to the temporary folder
            outcome, detail = self._attempt(case / self.paths[name], SOURCES[name], out)
        seconds, peak = time.monotonic() - began, _peak_bytes()
        if outcome == "refused" and home not in detail and "section " not in detail:
            outcome, detail = "escaped", f"the error names neither file nor section: {detail}"
        changed = self.guard.seen or ([] if _listing(case / home) == before else ["the source was changed"])
        if changed:
            outcome, detail = "escaped", f"changes outside the output folder: {changed[:3]}"
        if peak - max(0, held - REST_BYTES) > MEMORY_BYTES:  # without what tests and earlier cases left behind
            outcome, detail = "escaped", f"{peak >> 20} MiB of memory; {detail}"
        return Outcome(number, name, what, outcome, detail, round(seconds, 3), peak >> 20)

    def _attempt(self, path: Path, source: Source, out: Path) -> tuple[str, str]:
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(self.limit_s)
        # Ends the process if native code never returns to Python; a resumed run counts the case as escaped.
        faulthandler.dump_traceback_later(4 * self.limit_s, exit=True, file=sys.__stderr__)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.through(path, source, out)
        except UnforeseenError as error:  # the error names the source, but no reader handles its cause
            return "escaped", "".join(traceback.format_exception(error.__cause__ or error))[-3000:]
        except (SourceError, ShardError) as error:
            return "refused", str(error)
        except HangError as error:
            text = traceback.format_exc()[-1500:]
            traceback.clear_frames(error.__traceback__)  # frees the reader's memory
            return "escaped", f"hang: {text}"
        except Exception:
            return "escaped", traceback.format_exc()[-3000:]
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
        return "reads", ""


def _hang(*_: object) -> None:
    raise HangError


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), s.st_size, s.st_mtime_ns) for p in folder.rglob("*") for s in [p.lstat()] if not p.is_dir())


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not permitted: the peak is that of the process
        return


def _peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kind_of(outcome: Outcome) -> str:
    """Return one line with the error and its last frames, which is equal for escapes with the same cause."""
    lines = [line for line in outcome.detail.strip().splitlines() if line.strip()]
    frames = [
        line.split('"')[1].rsplit("/", 1)[-1] + ":" + line.split("line ")[1].split(",")[0]
        for line in lines
        if '  File "' in line and "testkit" not in line
    ]
    ours = [
        p
        for p, line in zip(frames, [x for x in lines if '  File "' in x and "testkit" not in x], strict=True)
        if "comtip" in line
    ]
    return f"{lines[-1][:150] if lines else ''} @ {' < '.join(reversed(ours[-2:]))}"


def main(argv: list[str] | None = None) -> int:
    """Run cases from the command line; return 1 if a case escaped, 2 if an intact source is not read."""
    parser = argparse.ArgumentParser(prog="python -m testkit.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default 0)")
    parser.add_argument("--count", type=int, default=10_000, help="number of cases (default 10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--limit-s", type=int, default=60, help="time limit of a case in seconds (default 60)")
    parser.add_argument(
        "--log", type=Path, help="file for the outcomes, one JSON object per line; a run with the same file resumes"
    )
    parser.add_argument(
        "--through",
        choices=("readers", "predict"),
        default="readers",
        help="run the readers only, or shards build and predict (default readers)",
    )
    args = parser.parse_args(argv)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return _fuzz(args)
    finally:
        logging.disable(level)


def _fuzz(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        if args.through == "predict":
            from testkit.source_fuzz.through import build_and_predict

            through = build_and_predict(Path(folder))
        else:
            through = read_source
        fuzzer = SourceFuzzer(Path(folder), args.seed, limit_s=args.limit_s, through=through)
        log = args.log or Path(folder) / "log.jsonl"
        return _run(fuzzer, args, log)


def _run(fuzzer: SourceFuzzer, args: argparse.Namespace, log: Path) -> int:
    done, started = _read_log(log, args)
    broken = [o for o in map(fuzzer.intact_outcome, SOURCES) if o.outcome != "reads"]
    if broken:
        print(
            "\n".join(f"{o.source}: the intact source cannot be read: {o.detail}; fix the reader first" for o in broken)
        )
        return 2
    with log.open("a") as file:
        for number in sorted(started - set(done)):
            lost = Outcome(number, list(SOURCES)[number % len(SOURCES)], "", "escaped", "the process ended", 0.0, 0)
            done[number] = lost
            file.write(json.dumps(asdict(lost) | {"seed": args.seed, "through": args.through}) + "\n")
        for number in range(args.first, args.first + args.count):
            if number in done:
                continue
            file.write(json.dumps({"seed": args.seed, "through": args.through, "start": number}) + "\n")
            file.flush()
            done[number] = fuzzer.run(number)
            file.write(json.dumps(asdict(done[number]) | {"seed": args.seed, "through": args.through}) + "\n")
            file.flush()
            if len(done) % 500 == 0:
                print(f"{len(done)} of {args.count}: {dict(Counter(o.outcome for o in done.values()))}", flush=True)
    return _report([done[n] for n in range(args.first, args.first + args.count)])


def _read_log(log: Path, args: argparse.Namespace) -> tuple[dict[int, Outcome], set[int]]:
    """Return {number: outcome} of the finished cases of this seed and mode, and the numbers of all started cases."""
    done: dict[int, Outcome] = {}
    started: set[int] = set()
    for line in log.read_text().splitlines() if log.is_file() else []:
        row = json.loads(line)
        if (row.pop("seed"), row.pop("through")) != (args.seed, args.through):
            continue
        if "start" in row:
            started.add(row["start"])
        else:
            done[row["number"]] = Outcome(**row)
    return done, started


def _report(outcomes: list[Outcome]) -> int:
    by = Counter((o.source, o.outcome) for o in outcomes)
    print(f"{'source':18} {'reads':>7} {'refused':>8} {'escaped':>8}")
    for name in SOURCES:
        print(f"{name:18} {by[name, 'reads']:7} {by[name, 'refused']:8} {by[name, 'escaped']:8}")
    total = Counter(o.outcome for o in outcomes)
    print(f"{'all':18} {total['reads']:7} {total['refused']:8} {total['escaped']:8}")
    print(f"slowest {max(o.seconds for o in outcomes)} s, largest peak {max(o.peak_mb for o in outcomes)} MiB")
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.outcome == "escaped":
            kinds.setdefault(kind_of(outcome), []).append(outcome)
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        first = members[0]
        print(f"{len(members):5} x {kind}\n        case {first.number} ({first.source}): {first.what[:200]}")
    return 1 if total["escaped"] else 0
