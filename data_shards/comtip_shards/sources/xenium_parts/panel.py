"""Genes of a Xenium panel, and the feature names of its transcripts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.opening import reading
from comtip_shards.sources.files.table_batches import batches
from comtip_shards.sources.tenx.features import GENE_KIND, Features
from comtip_shards.sources.tenx.run import read_json
from comtip_shards.sources.xenium_parts.files import TRANSCRIPTS, XeniumFiles

CONTROL = re.compile(r"(NegControl|BLANK|antisense|Unassigned|Deprecated|Intergenic)", re.IGNORECASE)


def panel_of(files: XeniumFiles) -> tuple[Features, list[str]]:
    """Return the features of the panel and notes; undetected genes are included, because their zeros are measurements.

    Without a matrix and ``gene_panel.json``, the genes are those of the transcripts, and a note says so.

    Raises
    ------
    SourceError
        None of these files exists, or one is invalid.
    """
    if files.matrix is not None:
        return files.matrix.features(), []
    if files.panel is not None:
        return _gene_panel(files.panel), []
    if files.transcripts is None:
        raise SourceError(
            f"{files.root}: neither {TRANSCRIPTS} nor cell_feature_matrix.h5 exists; copy one of them from the Xenium output"
        )
    names: set[str] = set()
    for batch in batches(files.transcripts, ["feature_name"], dictionary=["feature_name"]):
        names |= set(feature_words(batch, files.transcripts)[0])
    genes = sorted(n for n in names if not CONTROL.match(n))
    note = "no cell_feature_matrix.h5 or gene_panel.json: undetected genes of the panel are treated as not measured"
    return Features(genes, genes, [GENE_KIND] * len(genes)), [note]


def _gene_panel(path: Path) -> Features:
    try:
        targets = [t["type"] for t in read_json(path, "gene panel")["payload"]["targets"]]
        genes = [t["data"] for t in targets if t["descriptor"] == "gene"]
        return Features(
            [str(g.get("id", g["name"])) for g in genes], [str(g["name"]) for g in genes], [GENE_KIND] * len(genes)
        )
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: no payload.targets with type and data ({error}); copy gene_panel.json from the Xenium output again"
        ) from error


def feature_words(batch: pa.RecordBatch, path: Path) -> tuple[list[str], np.ndarray]:
    """Return the distinct feature names of a batch, and the index of each row's name, int64 (n,), -1 if it is missing.

    Raises SourceError if a name is not UTF-8 text.
    """
    column = batch.column("feature_name")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words = texts_of(column.dictionary, path)
    return words, column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def texts_of(column: pa.Array, path: Path) -> list[str]:
    """Return values as text, because Xenium version 1 wrote bytes or numbers; raises SourceError for bytes that are not UTF-8."""
    with reading(path, "Parquet"):
        return [v.decode() if isinstance(v, bytes) else str(v) for v in column.to_pylist()]
