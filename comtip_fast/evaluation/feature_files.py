"""Files of embeddings that were computed by other software, with one row per spot.

Two layouts are read: a folder with one HDF5 file per section, as HEST-Benchmark writes them (``SECTION.h5`` with
``embeddings`` and ``barcodes``), and one table (``.csv``, ``.tsv``, ``.parquet``) with the columns ``section`` and ``spot``;
all its other columns are features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from comtip_shards.sources.hdf5.opening import open_hdf5

SECTION, SPOT = "section", "spot"
NAME_KEYS = ("barcodes", "barcode")


@dataclass(frozen=True)
class SpotFeatures:
    """Features of N named spots."""

    names: list[str]
    values_NF: np.ndarray
    """float32 (N, F)."""

    def rows_of(self, names: Sequence[str], where: str) -> np.ndarray:
        """Return the features of the spots ``names``, in the order of ``names``, float32 (n, F).

        Raises
        ------
        ValueError
            A spot is missing, or occurs more than once.
        """
        row = {name: i for i, name in enumerate(self.names)}
        if len(row) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if row[name] != i)
            raise ValueError(
                f"{where}: spot {twice} has several rows (duplicate rows in all: {len(self.names) - len(row)}); keep one row "
                "per spot"
            )
        missing = [n for n in names if n not in row]
        if missing:
            raise ValueError(
                f"{where}: no embedding for {len(missing)} of {len(names)} spots ({', '.join(missing[:3])}); compute "
                "embeddings of all spots, with the spot ids of the section"
            )
        return self.values_NF[[row[n] for n in names]]


class FeatureFiles:
    """Embeddings by section.

    Parameters
    ----------
    path
        A folder of HDF5 files, or a table; see the module docstring.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    PermissionError
        There is no permission to read the table.
    ValueError
        The path is neither a folder nor a ``.csv``, ``.tsv`` or ``.parquet`` table, or the table cannot be read, lacks
        ``section``, ``spot`` or features, or has a column of features that are not numbers.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file or folder of embeddings; correct the path")
        self._table = None if self.path.is_dir() else _read_table(self.path)

    def of(self, section: str, task: str = "") -> SpotFeatures:
        """Return the embeddings of a section.

        In a folder, ``TASK/SECTION.h5`` takes precedence over ``SECTION.h5``; a table ignores ``task``.

        Raises
        ------
        FileNotFoundError, ValueError
            The section has no embeddings, or its file cannot be used.
        """
        return self._from_folder(section, task) if self._table is None else self._from_table(section)

    def _from_table(self, section: str) -> SpotFeatures:
        """Return the rows of a section; raise ValueError if there are none, or a value is not finite."""
        assert self._table is not None
        own = self._table[self._table[SECTION] == section]
        if own.empty:
            raise ValueError(
                f"{self.path}: no rows of section {section}; write the section id of each spot in the column section"
            )
        values = own.drop(columns=[SECTION, SPOT]).to_numpy(np.float32)
        return SpotFeatures(own[SPOT].tolist(), _finite(values, f"{self.path}, section {section}"))

    def _from_folder(self, section: str, task: str) -> SpotFeatures:
        """Read the file of a section; raise FileNotFoundError if there is none, and ValueError if it cannot be used."""
        found = [p for p in (self.path / task / f"{section}.h5", self.path / f"{section}.h5") if p.is_file()]
        if not found:
            raise FileNotFoundError(
                f"{self.path}: no embeddings of section {section}; add {section}.h5, named by the id of the section"
            )
        return read_embeddings(found[0])


def read_embeddings(path: Path) -> SpotFeatures:
    """Read one HDF5 file with ``embeddings`` (N, F) and ``barcodes`` or ``barcode`` (N,) or (N, 1).

    Raises
    ------
    ValueError
        The file cannot be read, a dataset is missing, the two datasets differ in length, or embeddings are not finite numbers.
    """
    with open_hdf5(path, "an HDF5 file of embeddings", "write it with h5py") as file:
        key = next((k for k in NAME_KEYS if k in file), None)
        if key is None or "embeddings" not in file:
            missing = "embeddings" if key is not None else "barcodes"
            raise ValueError(
                f"{path}: the dataset {missing} is missing (found {', '.join(sorted(file)) or 'none'}); write both embeddings and "
                "barcodes"
            )
        names = text_of(file[key][:])
        if file["embeddings"].dtype.kind not in "fiu":
            raise ValueError(f"{path}: embeddings are {file['embeddings'].dtype}, not numbers; write them as float32")
        values = np.asarray(file["embeddings"][:], np.float32)
    if values.ndim != 2 or len(values) != len(names):
        raise ValueError(
            f"{path}: embeddings of shape {values.shape} for {len(names)} barcodes; write one row of features per barcode"
        )
    return SpotFeatures(names, _finite(values, str(path)))


def text_of(values: np.ndarray) -> list[str]:
    """Return the values of an HDF5 dataset, bytes or str (N,) or (N, 1), as a list of str."""
    return [v.decode() if isinstance(v, bytes) else str(v) for v in np.ravel(values).tolist()]


def _finite(values_NF: np.ndarray, where: str) -> np.ndarray:
    """Return the values; raise ValueError if one of them is not finite."""
    if not np.isfinite(values_NF).all():
        lost = int((~np.isfinite(values_NF)).any(axis=1).sum())
        raise ValueError(
            f"{where}: values that are not finite in {lost} of {len(values_NF)} embeddings; compute these embeddings again"
        )
    return values_NF


def _read_table(path: Path) -> pd.DataFrame:
    """Read a table of embeddings; raise ValueError if its format or columns cannot be used."""
    if path.suffix not in (".parquet", ".csv", ".tsv"):
        raise ValueError(
            f"{path}: unsupported file type {path.suffix!r}; give a folder of .h5 files, or a .csv, .tsv or .parquet table"
        )
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype={SECTION: str, SPOT: str})
    except PermissionError:
        raise
    except (ValueError, OSError) as error:  # of pandas and pyarrow, without the name of the file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a {path.suffix} table ({reason}); write it again") from error
    missing = [c for c in (SECTION, SPOT) if c not in table]
    if missing:
        raise ValueError(
            f"{path}: no column {' and no column '.join(missing)}; write one row per spot, with the section id in the column "
            "section and the spot id in the column spot"
        )
    rest = table.columns.difference([SECTION, SPOT])
    text = [str(c) for c in rest if not pd.api.types.is_numeric_dtype(table[c])]
    if text:
        raise ValueError(
            f"{path}: columns that are not numbers: {', '.join(text[:3])}; keep section, spot and features only"
        )
    if rest.empty:
        raise ValueError(f"{path}: no column of features; add columns of numbers")
    return table.assign(**{SECTION: table[SECTION].astype(str), SPOT: table[SPOT].astype(str)})
