"""Labels of spots from a table, or from a column of an AnnData."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from comtip_shards.sources.anndata_parts.store import is_anndata_file

from comtip_fast.data.anndata_file import read_annotation

log = logging.getLogger("comtip_fast")
SECTION_COLUMNS, SPOT_COLUMNS = ("section", "section_id"), ("spot", "spot_id", "barcode")


class LabelFile:
    """Labels by section and spot.

    Parameters
    ----------
    spec
        A table (``.csv``, ``.tsv``, optionally ``.gz``) with a column ``label``, a column of spot ids (``spot``, ``spot_id`` or
        ``barcode``) and, unless every spot id occurs in one section only, a column of section ids (``section`` or
        ``section_id``). Or ``FILE.h5ad:COLUMN``, an ``obs`` column of an AnnData whose ``obs_names`` are spot ids.

    Raises
    ------
    FileNotFoundError, PermissionError, ValueError
        The file does not exist, cannot be read, or lacks a column, or an ``.h5ad`` is given without a column.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        file, _, column = spec.rpartition(":")
        if spec.lower().endswith(".h5ad"):
            raise ValueError(f"`labels` {spec}: names no column of the AnnData; give FILE.h5ad:COLUMN")
        if is_anndata_file(Path(file)):
            self._table = _from_h5ad(Path(file), column)
        else:
            self._table = _from_table(Path(spec))
        lost = int(self._table["section"].eq("").sum())
        if 0 < lost < len(self._table):
            log.warning("labels %s: %d of %d rows name no section and are left out", spec, lost, len(self._table))

    def of(self, section: str, spots: Sequence[str]) -> np.ndarray:
        """Return the labels of spots, str (N,); empty text for a spot without a label.

        Raises
        ------
        ValueError
            A spot has several labels.
        """
        own = self._table
        by_section = own["section"].ne("").any()
        if by_section:
            own = own[own["section"] == section]
        own = own[own["spot"].isin(set(spots))]
        if own["spot"].duplicated().any():
            twice = own["spot"][own["spot"].duplicated()].iloc[0]
            raise ValueError(
                f"{self.spec}: several labels for spot {twice} of {section}; "
                + (
                    "keep one per section and spot"
                    if by_section
                    else "add a column section, or keep one label per spot"
                )
            )
        return own.set_index("spot")["label"].reindex(list(spots)).fillna("").to_numpy(str)


def _from_h5ad(path: Path, column: str) -> pd.DataFrame:
    """Read label, spot and section from ``obs`` of an AnnData; section is "" if ``obs`` has no column of sections."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give FILE.h5ad:COLUMN or a table of labels")
    obs = read_annotation(path).obs
    if column not in obs:
        fix = f"name one of {', '.join(map(str, obs.columns))}" if len(obs.columns) else "add a column with the labels"
        raise ValueError(f"{path}: obs has no column {column!r}; {fix}")
    name = next((c for c in SECTION_COLUMNS if c in obs), None)
    section = pd.Series("", index=obs.index) if name is None else _text(obs[name])
    label = _text(obs[column])
    return pd.DataFrame({"section": section.to_numpy(), "spot": obs.index.astype(str), "label": label.to_numpy()})


def _text(column: pd.Series) -> pd.Series:
    """Return a column as text, with "" for missing values."""
    return column.astype(object).where(column.notna(), "").astype(str).str.strip()


def _from_table(path: Path) -> pd.DataFrame:
    """Read section, spot and label from a table; section is "" if the table has no column of sections."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a table of labels or FILE.h5ad:COLUMN")
    sep = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    try:
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # a damaged .gz, and what pandas raises
        raise ValueError(f"{path}: cannot be read as a table ({error}); save it as UTF-8 .csv or .tsv") from error
    spot = next((c for c in SPOT_COLUMNS if c in table), None)
    if spot is None or "label" not in table:
        raise ValueError(
            f"{path}: has the columns {', '.join(table.columns)}; expected spot and label, and section if spots of several "
            "sections have the same id"
        )
    section = next((c for c in SECTION_COLUMNS if c in table), None)
    return pd.DataFrame(
        {
            "section": table[section].str.strip() if section else "",
            "spot": table[spot].str.strip(),
            "label": table["label"].str.strip(),
        }
    )
