"""Section: one image with its spots and raw counts, as returned by every source, and its validation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.names import check_section_id
from comtip_shards.sections.scaled_counts import not_raw, scaled_total
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import image_size, open_slide

SectionId = str
SectionNotes = Mapping[SectionId, str]
"""Notes by section id; sections without a note are absent."""
Split = Literal["train", "val", "test"]
StatedSplits = Mapping[SectionId, Split]
"""Splits stated by the user, by section id; other sections are absent."""
SPLITS = (*get_args(Split), "")
RENAME = "rename it to at most 100 ASCII letters, digits, '.', '_' and '-', the first of them a letter or digit"


MAX_TEXT = 4096
"""Maximum length of a spot's name or label, as in ``format.record``."""


@dataclass(frozen=True, kw_only=True)
class SectionMeta:
    """Metadata of a section; raises :class:`SourceError` if the section id is not allowed as a component of a path."""

    section_id: str
    dataset: str
    species: str
    """``human`` or ``mouse``."""
    tissue: str
    donor: str
    """Patient or animal: the unit of every split."""
    platform: str
    licence: str
    attribution: str
    mpp: float
    """um per px of the image that the positions belong to."""
    spot_diameter_um: float
    """Diameter of a spot, or width of a pseudo-spot."""
    spot_pitch_um: float
    """Distance between the centres of neighbouring spots."""
    split: str = ""
    """``train``, ``val``, ``test`` or empty."""
    pooling: str = ""
    """How bins, cells or transcripts were pooled to spots; empty if spots were not pooled."""

    def __post_init__(self) -> None:
        # Checked here for all readers, because the id becomes part of file names in builds and reports.
        check_section_id(self.section_id, self.dataset or "a section", SourceError, RENAME)


def meta_of(entry: object) -> SectionMeta:
    """Return the metadata in a section's entry of a manifest."""
    return SectionMeta(**{f.name: getattr(entry, f.name) for f in fields(SectionMeta)})


@dataclass
class Section:
    """Spots in tissue with their raw counts, and the image they belong to."""

    meta: SectionMeta
    image_path: Path
    """File of the image, or the file that contains it (see ``slide_opener``)."""
    counts: sparse.csr_matrix
    """int32 (n_spots, n_genes)."""
    gene_ids: list[str]
    gene_symbols: list[str]
    """Gene symbols stated by the source, "" or an empty list if it states none."""
    spot_ids: list[str]
    xy: np.ndarray
    """float64 (n_spots, 2), x (column) and y (row) of the spot's centre in px of the image."""
    array_xy: np.ndarray
    """float64 (n_spots, 2), position on the array; NaN if unknown."""
    labels: list[str]
    """Annotation of each spot, "" if it has none."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of spots left out, by reason."""
    notes: list[str] = field(default_factory=list)
    n_pooled: np.ndarray | None = None
    """int64 (n_spots,), number of bins, cells or transcripts in each pseudo-spot; None if spots are not pooled."""
    slide_opener: Callable[[], Slide] | None = None
    """Opens an image that is not the file ``image_path``: pixels inside an h5ad, precomputed patches."""

    def open_slide(self) -> Slide:
        """Open the image; the caller must close it, or use it as a context manager.

        Raises
        ------
        SourceError
            The image is missing, damaged or too large, or a required package is not installed.
        """
        return self.slide_opener() if self.slide_opener is not None else open_slide(self.image_path)

    def load_image(self) -> np.ndarray:
        """Return the complete image, uint8 (H, W, 3) RGB; raises SourceError if it is too large or cannot be read.

        Use :meth:`open_slide` for images too large for memory.
        """
        with self.open_slide() as slide:
            return slide.whole()

    def image_size(self) -> tuple[int, int]:
        """Return (width, height) of the image in px; raises the errors of :meth:`open_slide`."""
        if self.slide_opener is None:
            return image_size(self.image_path)
        with self.open_slide() as slide:
            return slide.size

    def keep(self, mask: np.ndarray, otherwise: str) -> Section:
        """Return a section with only the spots in ``mask``, bool (n_spots,); the others are counted in ``dropped[otherwise]``."""
        rows = np.flatnonzero(mask)
        lost = len(self.spot_ids) - rows.size
        return replace(
            self,
            counts=self.counts[rows],
            spot_ids=[self.spot_ids[i] for i in rows],
            xy=self.xy[rows],
            array_xy=self.array_xy[rows],
            labels=[self.labels[i] for i in rows],
            dropped={**self.dropped, **({otherwise: self.dropped.get(otherwise, 0) + lost} if lost else {})},
            n_pooled=None if self.n_pooled is None else self.n_pooled[rows],
        )

    def check(self) -> Section:
        """Validate the section and return it.

        Raises
        ------
        SourceError
            The section is inconsistent, has no spots, or has spots outside the image; the message names the section or the
            file, and the fix.
        """
        check_meta(self.meta, self.image_path)
        where = f"section {self.meta.section_id}"
        if not self.spot_ids:
            raise SourceError(
                f"{where}: no spot is in tissue and in the counts; check the in_tissue column and the ids"
            )
        check_unique(self.spot_ids, f"{where}: spot ids")
        check_unique(self.gene_ids, f"{where}: gene identifiers")
        if self.counts.shape != (len(self.spot_ids), len(self.gene_ids)):
            raise SourceError(
                f"{where}: counts have shape {self.counts.shape}, but there are {len(self.spot_ids)} spots and "
                f"{len(self.gene_ids)} genes; return one row per spot and one column per gene from the reader"
            )
        total = scaled_total(self.counts) if self.gene_ids else None
        if total is not None:
            raise SourceError(
                f"{where}: {not_raw(total)}; provide raw counts (if a layer of the AnnData has them, set `layer` to its name)"
            )
        self._check_texts(where)
        self._check_positions()
        return self

    def _check_texts(self, where: str) -> None:
        """Check the lengths of names and labels, which a record stores."""
        for what, values in (("spot id", self.spot_ids), ("label", self.labels)):
            longest = max(values, key=len, default="")
            if len(longest) > MAX_TEXT:
                raise SourceError(
                    f"{where}: a {what} of {len(longest):,} characters ({longest[:30]}...), but at most {MAX_TEXT:,} are "
                    "stored; shorten it, or leave the column out"
                )

    def _check_positions(self) -> None:
        width, height = self.image_size()
        x, y = self.xy[:, 0], self.xy[:, 1]
        if not np.isfinite(self.xy).all():
            raise SourceError(
                f"section {self.meta.section_id}: spots without a position: {int((~np.isfinite(self.xy)).any(1).sum())}; give their "
                "positions, or remove them from the source"
            )
        slack = 0.5 * self.meta.spot_diameter_um / self.meta.mpp
        outside = (x < -slack) | (y < -slack) | (x > width + slack) | (y > height + slack)
        if outside.any():
            raise SourceError(
                f"{self.image_path}: the image is {width} x {height} px, but {int(outside.sum())} of {len(x)} spots lie outside "
                f"(x {x.min():.0f} to {x.max():.0f}, y {y.min():.0f} to {y.max():.0f}); give the image that the positions "
                "belong to, or positions in px of this image"
            )


def check_meta(meta: SectionMeta, where: Path | str) -> None:
    """Check metadata before a build.

    Raises
    ------
    SourceError
        A field is missing or out of range; the message names the section and the fix.
    """
    check_section_id(meta.section_id, str(where), SourceError, RENAME)
    if meta.species not in ("human", "mouse"):
        raise SourceError(
            f"{where}: section {meta.section_id}: unknown species {meta.species!r}; state human or mouse (`species`)"
        )
    if not (np.isfinite(meta.mpp) and meta.mpp > 0):
        problem = "no scale" if np.isnan(meta.mpp) else f"the scale is {meta.mpp:g} um per px of the image"
        raise SourceError(
            f"{where}: section {meta.section_id}: {problem}; state a positive number of um per px (`mpp`, or mpp_um_per_px of a "
            "manifest.tsv)"
        )
    if not 0.05 <= meta.mpp <= 50:
        raise SourceError(
            f"{where}: section {meta.section_id}: {meta.mpp:g} um per px of the image is outside the range of 0.05 to 50; "
            "correct `mpp`, or give another image (`image`)"
        )
    if meta.split not in SPLITS:
        raise SourceError(
            f"{where}: section {meta.section_id}: unknown split {meta.split!r}; use train, val, test or leave it empty"
        )


def check_unique(names: list[str], what: str) -> None:
    """Check that names are unique.

    Raises
    ------
    SourceError
        There are duplicates; the message states ``what`` and up to three of them.
    """
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    twice = list(dict.fromkeys(n for n in names if n in seen or seen.add(n)))  # type: ignore[func-returns-value]
    raise SourceError(
        f"{what}: {len(twice)} {'occurs' if len(twice) == 1 else 'occur'} more than once, e.g. {', '.join(twice[:3])}; remove "
        "or rename the duplicates in the source"
    )


def cohort_of(species: str, tissue: str) -> str:
    """Return species and organ (the tissue up to the first comma) as one word: ``human_breast``."""
    organ = tissue.split(",", maxsplit=1)[0].strip().lower()
    return f"{species}_{re.sub(r'[^a-z0-9]+', '_', organ).strip('_') or 'unknown'}"
