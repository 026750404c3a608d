"""Gene vectors and their file format. :mod:`comtip_fast.data.coexpression` computes them from counts without images.

Co-expressed genes have similar vectors. A model with gene vectors can therefore predict genes that no training section
measured.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards.sections.duplicates import SHARED_SPOTS
from comtip_shards.storage.atomic import atomic_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import linalg

from comtip_fast._version import __version__
from comtip_fast.config.schema import TextConfig

FORMAT, VERSION = "comtip-gene-vectors", 1
MAX_CELLS = 1 << 16
"""Largest number of hashes of cells in a file."""
AXES_TOLERANCE = 1e-3
"""Two files have the same axes if the vectors of common genes differ by at most this, relative to the largest component."""


@dataclass(frozen=True)
class GeneVectors:
    """Vectors of genes, statistics of their expression, and a description of their sources.

    Attributes
    ----------
    keys
        Gene keys, ``species:symbol``.
    vector_GK
        float32 (G, K), one row per gene.
    moments_G4
        float32 (G, 4): mean and standard deviation of log1p CP10K, then of log1p raw counts, over the cells of the sources that
        measured the gene.
    detection_G
        float32 (G,), share of these cells with a positive count.
    header
        JSON-serialisable description: sources with species and hash, settings, licence, share of variance explained.
    cells
        uint64, sorted: the smallest hashes of the expression of cells of the sources
        (:func:`comtip_shards.sections.duplicates.spot_hashes`), at most :data:`MAX_CELLS`, by which a section is recognised in them.
        Empty if unknown, as in files of earlier versions and vectors from elsewhere.
    """

    keys: list[str]
    vector_GK: np.ndarray
    moments_G4: np.ndarray
    detection_G: np.ndarray
    header: dict[str, Any] = field(default_factory=dict)
    cells: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    @cached_property
    def row(self) -> dict[str, int]:
        """Row of each gene key in the arrays."""
        return {key: i for i, key in enumerate(self.keys)}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of keys, vectors, moments and detection, without header and cells."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        for array in (self.vector_GK, self.moments_G4, self.detection_G):
            digest.update(np.ascontiguousarray(array, np.float32).tobytes())
        return digest.hexdigest()

    def extended_by(self, other: GeneVectors) -> GeneVectors | None:
        """Return these vectors with the additional genes of ``other``, or None if the axes of the two differ.

        Axes are the same if both have the same number of components and at least 2 common genes, and the vectors of all common
        genes are equal up to :data:`AXES_TOLERANCE`.
        """
        shared = [k for k in self.keys if k in other.row]
        if len(shared) < 2 or self.vector_GK.shape[1] != other.vector_GK.shape[1]:
            return None
        own = self.vector_GK[[self.row[k] for k in shared]]
        if np.abs(own - other.vector_GK[[other.row[k] for k in shared]]).max() > AXES_TOLERANCE * np.abs(own).max():
            return None
        new = [i for i, k in enumerate(other.keys) if k not in self.row]
        header = self.header | {"extended_by": {"sha256": other.sha256, "licence": other.header.get("licence", "")}}
        licences = {str(h.get("licence") or "") for h in (self.header, other.header)} - {""}
        return GeneVectors(
            [*self.keys, *(other.keys[i] for i in new)],
            np.concatenate([self.vector_GK, other.vector_GK[new]]),
            np.concatenate([self.moments_G4, other.moments_G4[new]]),
            np.concatenate([self.detection_G, other.detection_G[new]]),
            header | {"licence": "; ".join(sorted(licences))},
            # With the cells of one file alone, a section of the other would not be recognised.
            smallest(self.cells, other.cells) if self.cells.size and other.cells.size else np.zeros(0, np.uint64),
        )

    def shares_cells(self, hashes: np.ndarray) -> bool | None:
        """Return whether the sources contain the section with these hashes of spots (uint64); None if it is unknown.

        They contain it if at least two, and a share of at least
        :data:`comtip_shards.sections.duplicates.SHARED_SPOTS`, of its spots that can be compared are among the cells.
        """
        if not self.cells.size:
            return None
        compared = hashes[hashes <= self.cells.max()] if self.cells.size == MAX_CELLS else hashes
        if compared.size < 2:
            return None
        shared = int(np.isin(compared, self.cells).sum())
        return shared >= 2 and shared >= SHARED_SPOTS * compared.size

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically; the header is stored as JSON in its metadata."""
        header = self.header | {"format": FORMAT, "version": VERSION, "sha256": self.sha256}
        arrays = {"vectors": self.vector_GK, "moments": self.moments_G4, "detection": self.detection_G}
        packed = {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}
        if self.cells.size:
            packed["cells"] = np.ascontiguousarray(self.cells, np.uint64)
        packed["keys"] = np.frombuffer("\n".join(self.keys).encode(), np.uint8)
        with atomic_path(path) as tmp_path:
            save_file(packed, tmp_path, metadata={"header": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> GeneVectors:
        """Read a file written by :meth:`save`; nothing is unpickled.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is not a file of gene vectors, has another version or invalid arrays, or does not match its hash.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; compute gene vectors with `comtip genes vectors`")
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("header", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: not a file of gene vectors (format {header.get('format')!r}, expected {FORMAT!r}); compute one with "
                    "`comtip genes vectors`"
                )
            if header.get("version") != VERSION:
                raise ValueError(
                    f"{path}: version {header.get('version')!r}, but comtip-fast {__version__} reads version {VERSION}; compute "
                    "the file again with `comtip genes vectors`"
                )
            keys = arrays["keys"].tobytes().decode().split("\n")
            cells = arrays.get("cells", np.zeros(0, np.uint64))
            vectors = cls(keys, arrays["vectors"], arrays["moments"], arrays["detection"], header, cells)
        except (
            SafetensorError,
            AttributeError,
            KeyError,
            RecursionError,
            UnicodeDecodeError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(
                f"{path}: not a file of gene vectors ({error}); compute one with `comtip genes vectors`"
            ) from error
        vectors.check(path)
        return vectors

    def check(self, path: Path) -> None:
        """Raise ValueError if keys, shapes or values are invalid, or do not match the hash; ``path`` is for messages."""
        G, vector = len(self.keys), self.vector_GK
        shapes = {"vectors": vector.shape[:1] == (G,) and vector.ndim == 2, "moments": self.moments_G4.shape == (G, 4)}
        shapes["detection"] = self.detection_G.shape == (G,)
        for name, array in zip(shapes, (vector, self.moments_G4, self.detection_G), strict=True):
            if not shapes[name] or array.dtype != np.float32:
                raise ValueError(
                    f"{path}: the array {name} has dtype {array.dtype} and shape {array.shape}, which does not fit {G} genes in "
                    "float32; copy or compute the file again"
                )
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{path}: the array {name} has values that are not finite; copy or compute the file again"
                )
        if self.cells.dtype != np.uint64 or self.cells.ndim != 1 or self.cells.size > MAX_CELLS:
            raise ValueError(
                f"{path}: the array cells has dtype {self.cells.dtype} and shape {self.cells.shape}, expected at most {MAX_CELLS} "
                "hashes in uint64; copy or compute the file again"
            )
        if len(self.row) < G:
            raise ValueError(f"{path}: {G - len(self.row)} of {G} gene keys are duplicates; compute the file again")
        if self.sha256 != self.header.get("sha256"):
            raise ValueError(
                f"{path}: the contents do not match the hash in the header; copy or compute the file again"
            )

    def describe(self) -> str:
        """Return a summary for the terminal: size, species, sources, explained variance if the header has it, licence and hash."""
        by_species = {
            s: sum(k.startswith(s + ":") for k in self.keys) for s in sorted({k.split(":")[0] for k in self.keys})
        }
        covers = ", ".join(f"{n} {s}" for s, n in by_species.items())
        lines = [f"{len(self.keys)} genes x {self.vector_GK.shape[1]} components ({covers})"]
        for source in self.header.get("sources", []):
            lines.append(f"  {source['name']}: {source['cells']} cells, {source['genes']} genes ({source['species']})")
        explained = self.header.get("explained")
        if explained is not None:
            lines.append(f"share of variance explained: {explained:.3f}")
        lines.append(f"licence: {self.header.get('licence') or 'not stated'}; sha256 {self.sha256[:16]}")
        return "\n".join(lines)


def join_vectors(parts: Sequence[GeneVectors]) -> GeneVectors:
    """Join vectors of different genes, such as those of two species, for a training that has both.

    The axes of each part stay its own: a gene has its vector on the axes of its part, and 0 on those of the others. Vectors are divided by
    the root mean square of their lengths in the part, so that no part outweighs another.

    Raises
    ------
    ValueError
        There are fewer than two parts, a gene is in two of them, or all vectors of a part are 0.
    """
    if len(parts) < 2:
        raise ValueError("there is one file of gene vectors; give the others that it is joined with")
    count = Counter(key for part in parts for key in part.keys)
    twice = [key for key, n in count.items() if n > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} genes are in two of the files ({', '.join(twice[:3])} ...), which join different genes, such as those of two "
            "species; compute one file from the counts of both instead"
        )
    lengths = [float(np.sqrt(np.square(part.vector_GK, dtype=np.float64).sum(1).mean())) for part in parts]
    if not all(lengths):
        raise ValueError("all vectors of one of the files are 0, so they distinguish no genes; leave this file out")
    vectors = linalg.block_diag(*(part.vector_GK / length for part, length in zip(parts, lengths, strict=True)))
    headers = [part.header for part in parts]
    header = {
        "comtip_fast": __version__,
        "sources": [source for h in headers for source in h.get("sources", [])],
        "joined": [{"sha256": p.sha256, "tissue": p.header.get("tissue", "")} for p in parts],
        "tissue": "; ".join(dict.fromkeys(str(h["tissue"]) for h in headers if h.get("tissue"))),
        "licence": "; ".join(dict.fromkeys(str(h["licence"]) for h in headers if h.get("licence"))),
    }
    # With the cells of some files alone, a section of the others would not be recognised.
    all_known = all(part.cells.size for part in parts)
    return GeneVectors(
        [key for part in parts for key in part.keys],
        vectors.astype(np.float32),
        np.concatenate([part.moments_G4 for part in parts]),
        np.concatenate([part.detection_G for part in parts]),
        header,
        smallest(*(part.cells for part in parts)) if all_known else np.zeros(0, np.uint64),
    )


def smallest(*hashes: np.ndarray) -> np.ndarray:
    """Return the (up to :data:`MAX_CELLS`) smallest distinct hashes, sorted."""
    return np.unique(np.concatenate(hashes))[:MAX_CELLS]


def load_vectors(text: TextConfig) -> GeneVectors | None:
    """Load the gene vectors that ``text.gene_vectors`` names; return None if this setting is empty.

    Raises
    ------
    FileNotFoundError, ValueError
        The file is missing or damaged, or the sum of ``text.vector_drop`` and ``text.name_drop`` exceeds 1.
    """
    if not text.gene_vectors:
        return None
    if text.vector_drop + text.name_drop > 1:
        raise ValueError(
            f"text.vector_drop={text.vector_drop} and text.name_drop={text.name_drop}: the sum is above 1; lower one"
        )
    return GeneVectors.load(text.gene_vectors)
