"""Rows of evidence: a part sends them one by one to the runner, which writes each to the CSV immediately."""

from __future__ import annotations

import csv
import datetime
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

COLUMNS = (
    "date",
    "commit",
    "mode",
    "gpu",
    "torch",
    "triton",
    "part",
    "name",
    "size",
    "dtype",
    "provider",
    "metric",
    "value",
    "low",
    "high",
    "unit",
    "status",
    "note",
)
GPU, DRY_RUN = "gpu", "dry_run"
CHANNEL = "COMTIP_EVIDENCE_FD"
"""Environment variable with the file descriptor to which a part writes its rows."""
MEASURED = ("ms", "s", "TFLOP/s", "TB/s", "spots/s", "tiles/s", "MiB", "GB", "%")
"""Units whose values a dry run omits, because they are meaningless on a CPU at tiny sizes."""


@dataclass(frozen=True)
class Row:
    """One measurement or check, or the reason why there is none; the fields are columns of the CSV."""

    name: str
    metric: str
    value: float | str = ""
    unit: str = ""
    size: str = ""
    dtype: str = ""
    provider: str = ""
    low: float | str = ""
    high: float | str = ""
    status: str = "ok"
    """``ok``, ``failed``, ``skipped`` (something is not installed) or ``deadline``."""
    note: str = ""


class Rows:
    """Sends rows to the runner, or prints them if the process was not started by one.

    Parameters
    ----------
    dry
        Whether to omit measured values.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self._channel = int(os.environ[CHANNEL]) if CHANNEL in os.environ else None

    def add(self, row: Row) -> None:
        """Send one row."""
        plain = asdict(row)
        if self.dry and row.unit in MEASURED:
            plain |= dict.fromkeys(("value", "low", "high"), "")
        plain["note"] = " ".join(str(plain["note"]).split())[:300]
        line = json.dumps(plain)
        if self._channel is None:
            print(line, flush=True)
            return
        data = (line + "\n").encode()
        while data:
            data = data[os.write(self._channel, data) :]

    def skip(self, name: str, reason: str, **where: str) -> None:
        """Send a row for something that cannot run here, with the reason."""
        self.add(Row(name, "ran", "no", status="skipped", note=reason, **where))

    def fail(self, name: str, error: BaseException | str, **where: str) -> None:
        """Send a row for something that failed, with the error."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.add(Row(name, "ran", "no", status="failed", note=text, **where))


class Table:
    """Writer of the CSV, which flushes every row.

    Parameters
    ----------
    path
        File to which rows are appended; a new file gets a header.
    columns
        Values of the columns that are the same in every row of this run.

    Raises
    ------
    ValueError
        The file has rows of another mode, or other columns.
    """

    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        self.path, self.columns = path, columns
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                modes = {row.get("mode") for row in reader}
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path}: has other columns; give another --out")
            if modes - {columns["mode"]}:
                raise ValueError(f"{path}: has rows of mode {', '.join(sorted(map(str, modes)))}; give another --out")
        new = not path.exists() or not path.stat().st_size
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if new:
            self._writer.writeheader()

    def write(self, part: str, row: dict[str, object]) -> None:
        """Write one row of a part and flush it."""
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self._writer.writerow(dict.fromkeys(COLUMNS, "") | self.columns | {"part": part} | row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def today() -> str:
    """Return the date in UTC."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
