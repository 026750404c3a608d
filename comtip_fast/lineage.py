"""Lineage of a model: the runs that its weights come from, oldest first.

A run that starts from the weights of another model (``train.start_from``) has indirectly been trained on that model's data.
Every export therefore lists its own run and all ancestors in ``lineage.json``: sections, donors, trained genes, gene vectors,
licences, attributions and validation scores. Scores on new donors and unseen genes, split checks and the model card use all
runs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from comtip_shards.format.manifest import ManifestSection
from comtip_shards.sections.duplicates import duplicate_pairs
from comtip_shards.sections.splits import donor_name
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from comtip_fast._version import __version__

FILE = "lineage.json"
"""In an export: all runs, the export's own run last. In a run folder: the ancestors of the run."""
FORMAT, VERSION = "comtip-lineage", 4
"""Version 2 has ``sets``, version 3 ``platform`` and ``scored_on``, version 4 ``extensions``. A lineage without them is written as an
earlier version, which earlier releases read."""
OPTIONAL = {"sets": 2, "scored_on": 3, "extensions": 4}
"""{field of a run that is written only if it has a value: first version with it}."""
WITH_PLATFORM = 3
"""First version with the platforms of sections."""
MAX_BYTES, MAX_RUNS = 1 << 28, 1000
_FIX = (
    "copy the file again, or write the export from a checkpoint of the run (`comtip export` with the option checkpoint)"
)
_FIX_OF_RUN = "copy it again, or delete it: the parents are then read from the export that train.start_from names"
LEARNING = ("train", "val")
"""Splits that influence the weights; ``val`` does so by selecting the step to export."""
USE_ORDER = ("train", "val", "test", "")
"""Splits, from the strongest influence on the weights to the weakest."""

_strict = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
Text = Annotated[str, Field(max_length=1 << 16)]
GeneKey = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Split = Literal["train", "val", "test", ""]


def _check_spots(text: str) -> str:
    """Return the sketch of spots ``text``; raise ValueError unless it is base64 of 64-bit hashes. Callers add file, field and fix."""
    size = len(base64.b64decode(text, validate=True))
    if size % 8:
        raise ValueError(f"expected 64-bit hashes in base64, found {size} bytes, which is not a multiple of 8")
    return text


def _check_picture(text: str) -> str:
    """Return the sketch of an image ``text``; raise ValueError unless it is empty or base64 of 256 bits. Callers add the rest."""
    size = len(base64.b64decode(text, validate=True))
    if text and size != 32:
        raise ValueError(f"expected 256 bits in base64, found {8 * size}")
    return text


@_strict
@dataclass(frozen=True, kw_only=True)
class LineageSection:
    """A section of a run's shard set: fields of :class:`comtip_shards.format.manifest.ManifestSection`, and its fingerprint.

    The fingerprint consists of the sketches ``spots`` and ``picture``.
    """

    section_id: Annotated[str, Field(min_length=1, max_length=1000)]
    dataset: Text = ""
    species: Text = ""
    tissue: Text = ""
    donor: Text = ""
    licence: Text = ""
    attribution: Text = ""
    split: Split = ""
    n_spots: Annotated[int, Field(ge=0)] = 0
    platform: Text = ""
    """Assay, e.g. Visium; empty if unknown, as in lineages of version 1 and 2."""
    spots: Annotated[str, Field(max_length=1 << 12), AfterValidator(_check_spots)] = ""
    """Sketch of the spots' counts, which identifies the section under another id; empty in exports without lineage."""
    picture: Annotated[str, Field(max_length=1 << 8), AfterValidator(_check_picture)] = ""
    """Sketch of the image, for the same purpose."""

    @classmethod
    def of(cls, section: ManifestSection) -> LineageSection:
        """Return the lineage entry of a section of a manifest."""
        own = {f: getattr(section, f) for f in cls.__dataclass_fields__ if f not in ("spots", "picture")}
        return cls(**own, **section.source.get("print", {}))


@_strict
@dataclass(frozen=True, kw_only=True)
class LineageVectors:
    """Gene vectors that a run was trained with."""

    sha256: Sha256
    licence: Text = ""
    sources: Annotated[tuple[Text, ...], Field(max_length=10_000)] = ()
    """Names of the count matrices that the vectors were computed from."""


@_strict
@dataclass(frozen=True, kw_only=True)
class LineageExtension:
    """Shard sets that were appended to the data of a run when it resumed."""

    step: Annotated[int, Field(ge=0)]
    """Last step without these sets."""
    sets: Annotated[tuple[Sha256, ...], Field(min_length=1, max_length=10_000)]
    """Digest of each set's manifest; :attr:`LineageRun.sets` has them too."""


@_strict
@dataclass(frozen=True, kw_only=True)
class LineageRun:
    """One run that contributed to the weights: its data, genes, gene vectors and validation scores."""

    name: Text
    comtip_fast: Annotated[str, Field(max_length=100)] = ""
    """Version that trained the run; empty if unknown."""
    shards: Sha256 = ""
    """Digest of the shard set's manifest, or of those of all sets; empty if unknown."""
    sets: Annotated[tuple[Sha256, ...], Field(max_length=10_000)] = ()
    """Digest of each set's manifest, in the order of ``data.shards``; empty for a single set, and if unknown."""
    extensions: Annotated[tuple[LineageExtension, ...], Field(max_length=10_000)] = ()
    """Sets that the run did not start with, oldest first. Their sections of split ``val`` have no split here: the run used none of
    them."""
    weights: Sha256 = ""
    """SHA-256 of the exported ``model.safetensors``; empty if unknown."""
    sections: Annotated[tuple[LineageSection, ...], Field(max_length=1_000_000)] = ()
    trained_genes: Annotated[tuple[GeneKey, ...], Field(max_length=1_000_000)] = ()
    held_out_genes: Annotated[tuple[GeneKey, ...], Field(max_length=1_000_000)] = ()
    vectors: LineageVectors | None = None
    validation: dict[Text, float] = field(default_factory=dict)
    """Mean PCC of the (up to 50) most variable trained genes on the validation sections, by cohort."""
    gene_scores: dict[GeneKey, float] = field(default_factory=dict)
    """Mean PCC by gene key: on the validation sections, or where :attr:`scored_on` says."""
    scored_on: dict[GeneKey, Text] = field(default_factory=dict)
    """What a gene of :attr:`gene_scores` was scored on, if not on the validation sections of this run. An adapted model has the scores
    of its comparison, and those of its parent for genes that the section did not measure."""

    def scores_with_origin(self) -> dict[str, tuple[float, str]]:
        """Return the score of every scored gene, and what it was scored on."""
        own = f"validation sections of {self.name}"
        return {key: (score, self.scored_on.get(key, own)) for key, score in self.gene_scores.items()}


@dataclass(frozen=True)
class SectionUse:
    """One run's use of a section."""

    run: str
    """Label of the run, see :meth:`Lineage.labels`."""
    split: str


@_strict
@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The runs behind a model, oldest first; the last run is the model's own.

    Attributes
    ----------
    runs
        The known runs.
    parents_known
        False if an ancestor was exported without lineage: further runs may have contributed to the weights.
    """

    runs: Annotated[tuple[LineageRun, ...], Field(max_length=MAX_RUNS)] = ()
    parents_known: bool = True

    @property
    def own(self) -> LineageRun:
        """The model's own run."""
        return self.runs[-1]

    @property
    def ancestors(self) -> tuple[LineageRun, ...]:
        """All runs except the model's own."""
        return self.runs[:-1]

    def followed_by(self, run: LineageRun) -> Lineage:
        """Return the lineage of ``run``, which started from this model: these runs and then ``run``."""
        return replace(self, runs=(*self.runs, run))

    def with_own(self, **changes: Any) -> Lineage:
        """Return a copy in which the given fields of :attr:`own` are replaced."""
        return replace(self, runs=(*self.ancestors, replace(self.own, **changes)))

    def labels(self) -> list[str]:
        """Return a label per run: its name; if several runs have this name, its position among all runs is added."""
        names = [run.name for run in self.runs]
        return [n if names.count(n) == 1 else f"{n} ({i} of {len(names)})" for i, n in enumerate(names, start=1)]

    # -- sections and donors ----------------------------------------------------------------------------------

    def uses(self, sections: Sequence[LineageSection]) -> list[list[SectionUse]]:
        """Return, for each section, which runs used it and in which split, in the order of runs.

        Two sections are the same if their datasets and ids are equal, or if their fingerprints show the same counts or image
        (:func:`comtip_shards.sections.duplicates.duplicate_pairs`). If one of them has no fingerprint, as in exports without
        lineage, ids alone are compared.
        """
        known = [(label, s) for label, run in zip(self.labels(), self.runs, strict=True) for s in run.sections]
        same = same_sections(sections, [s for _, s in known])
        return [
            [SectionUse(label, s.split) for j, (label, s) in enumerate(known) if (i, j) in same]
            for i in range(len(sections))
        ]

    def runs_that_trained_on(self, donor: str) -> list[str] | None:
        """Return the labels of the runs with a section of ``donor`` in split ``train``; names are compared by :func:`donor_name`.

        The result is None if it is unknown: ``donor`` is not stated, or no section of it is known, but the parents or the donor of a
        training section are unknown.
        """
        return self._runs_that_trained(donor_name(donor), lambda s: donor_name(s.donor))

    def runs_that_trained_on_platform(self, platform: str) -> list[str] | None:
        """Return the labels of the runs with a section of ``platform``, in any case of letters, in split ``train``.

        The result is None if it is unknown, as for :meth:`runs_that_trained_on`.
        """
        return self._runs_that_trained(platform.strip().lower(), lambda s: s.platform.strip().lower())

    def _runs_that_trained(self, name: str, name_of: Callable[[LineageSection], str]) -> list[str] | None:
        """Return the labels of the runs with a training section of this name, or None if it is unknown; names may be empty."""
        train = [
            (label, name_of(s))
            for label, run in zip(self.labels(), self.runs, strict=True)
            for s in run.sections
            if s.split == "train"
        ]
        found = list(dict.fromkeys(label for label, other in train if other == name))
        unknown = not name or not self.parents_known or any(not other for _, other in train)
        return None if not name or (unknown and not found) else found

    def merged_sections(self) -> list[LineageSection]:
        """Return the distinct sections of all runs.

        If runs used a section in different splits, its split is the first of train, val and test that occurs.
        """
        merged: list[LineageSection] = []
        for run in self.runs:
            same = same_sections(run.sections, merged)
            found = [next((j for j in range(len(merged)) if (i, j) in same), None) for i in range(len(run.sections))]
            for section, j in zip(run.sections, found, strict=True):
                if j is None:
                    merged.append(section)
                elif USE_ORDER.index(section.split) < USE_ORDER.index(merged[j].split):
                    merged[j] = replace(merged[j], split=section.split)
        return merged

    # -- genes ------------------------------------------------------------------------------------------------

    def genes_of_ancestors(self) -> set[str]:
        """Return the upper-case symbols of the genes that an ancestor trained on; orthologues share a symbol."""
        return {symbol_of(key) for run in self.ancestors for key in run.trained_genes}

    # -- licences ---------------------------------------------------------------------------------------------

    def licences(self) -> list[str]:
        """Return the distinct stated licences of all sections that influenced the weights, and of all gene vectors, sorted."""
        stated = {s.licence for run in self.runs for s in run.sections if s.split in LEARNING}
        stated |= {run.vectors.licence for run in self.runs if run.vectors is not None}
        return sorted(stated - {""})

    def attributions(self) -> list[str]:
        """Return the distinct stated attributions of all sections of all runs, sorted."""
        return sorted({s.attribution for run in self.runs for s in run.sections} - {""})

    # -- file -------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the text of ``lineage.json``, in the earliest version that has its fields."""
        lineage, version = asdict(self), 1
        for run in lineage["runs"]:
            for name, since in OPTIONAL.items():
                if run[name]:
                    version = max(version, since)
                else:
                    del run[name]
            for section in run["sections"]:
                if section["platform"]:
                    version = max(version, WITH_PLATFORM)
                else:
                    del section["platform"]
        return json.dumps({"format": FORMAT, "version": version, "lineage": lineage}, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Lineage:
        """Read ``lineage.json``.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is too large, has another format or version, or a field is missing, unknown or out of bounds.
        """
        fix = _FIX if (path.parent / "config.json").is_file() else _FIX_OF_RUN  # a run folder has a config.yaml
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"{path}: larger than the limit of {MAX_BYTES >> 20} MiB; {fix}")
        try:
            found = json.loads(raw)
        except (RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); {fix}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            what = f"format {found.get('format')!r}" if isinstance(found, dict) else f"a JSON {type(found).__name__}"
            raise ValueError(f"{path}: {what}, expected format {FORMAT!r}; {fix}")
        if found.get("version") not in range(1, VERSION + 1):
            raise ValueError(
                f"{path}: version {found.get('version')!r}, but comtip-fast {__version__} reads versions 1 to {VERSION}; read it with "
                "the release that wrote it"
            )
        try:
            return _LINEAGE.validate_json(json.dumps(found.get("lineage")))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where or 'lineage'}: {first['msg']}; {fix}") from error


_LINEAGE = TypeAdapter(Lineage)
_SECTION = TypeAdapter(LineageSection)


def parse_section(found: Mapping[str, Any]) -> LineageSection:
    """Validate and return a section of an export's ``config.json``; unknown fields are ignored.

    Raises
    ------
    TypeError
        ``found`` is not a mapping, or a field is missing, has the wrong type or is out of bounds.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"sections: expected objects, found {type(found).__name__}")
    own = {k: v for k, v in found.items() if k in LineageSection.__dataclass_fields__}
    try:
        return _SECTION.validate_json(json.dumps(own))
    except ValidationError as error:
        first = error.errors()[0]
        raise TypeError(f"sections: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def symbol_of(key: str) -> str:
    """Return the upper-case symbol of a gene key such as ``mouse:Krt14``."""
    return (key.partition(":")[2] or key).upper()


def names_of_uses(uses: Iterable[SectionUse], splits: Collection[str]) -> list[str]:
    """Return the labels of the runs that used a section in one of ``splits``, each once."""
    return list(dict.fromkeys(use.run for use in uses if use.split in splits))


def same_sections(a: Sequence[LineageSection], b: Sequence[LineageSection]) -> set[tuple[int, int]]:
    """Return the pairs (index in ``a``, index in ``b``) that are the same section, by the rule of :meth:`Lineage.uses`."""
    by_id: dict[str, list[int]] = {}
    for j, s in enumerate(b):
        by_id.setdefault(s.section_id, []).append(j)
    named = {(i, j) for i, s in enumerate(a) for j in by_id.get(s.section_id, []) if _same_id(s, b[j])}
    return _duplicates(a, b) | named


def _same_id(a: LineageSection, b: LineageSection) -> bool:
    """Return whether two sections have the same id and, if both have fingerprints, the same dataset."""
    fingerprints = bool(a.picture and b.picture)
    return a.section_id == b.section_id and (a.dataset == b.dataset or not fingerprints)


def _duplicates(new: Sequence[LineageSection], known: Sequence[LineageSection]) -> set[tuple[int, int]]:
    """Return the pairs (index in ``new``, index in ``known``) whose fingerprints show the same counts or image."""
    left = [i for i, s in enumerate(new) if s.picture]
    right = [j for j, s in enumerate(known) if s.picture]
    if not left or not right:
        return set()
    prints = [{"spots": s.spots, "picture": s.picture} for s in (*(new[i] for i in left), *(known[j] for j in right))]
    pairs = duplicate_pairs(prints)
    return {(left[i], right[j - len(left)]) for i, j in pairs if i < len(left) <= j}
