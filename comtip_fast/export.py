"""Export of a model: weights, levels, readout, genes, config and model card; saved and loaded without pickle."""

from __future__ import annotations

import csv
import html
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comtip_shards.storage.atomic import atomic_folder
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from comtip_fast import export_checks
from comtip_fast._version import __version__
from comtip_fast.config.io import config_from_dict, config_to_dict
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.levels import LevelTable
from comtip_fast.export_checks import ExportError, ExportGene
from comtip_fast.export_checks.readout import check_readout, read_readout
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.lineage import FILE as LINEAGE_FILE
from comtip_fast.lineage import (
    LEARNING,
    Lineage,
    LineageRun,
    LineageSection,
    LineageVectors,
    names_of_uses,
    parse_section,
)
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.models.comtip import reshape_scalars
from comtip_fast.models.pretrained import fill_normalisation
from comtip_fast.models.readout.heads import Readout

EXPORT_FORMAT, EXPORT_VERSION, READABLE_VERSIONS = "comtip-export", 3, (1, 2, 3)
"""Version 1 has no readout, versions 1 and 2 have no lineage."""
SECTION_FIELDS = ("section_id", "dataset", "species", "tissue", "donor", "licence", "attribution", "split", "n_spots")
"""Fields of a section in ``config.json`` and ``Bundle.sections``."""


@dataclass
class Bundle:
    """Contents of an export: everything that evaluation and prediction need."""

    config: RunConfig
    sizes: ModelSizes
    model: CoMTIP
    levels: LevelTable
    """Edges, values and frequencies of the levels: one row per trained gene and a global row."""
    genes: list[ExportGene]
    """Trained genes, in the order of the rows of ``levels``, followed by the held-out genes."""
    sections: list[dict[str, Any]]
    """Sections of the run's shard set, each with :data:`SECTION_FIELDS`."""
    tile_um: float
    """Width of a tile in um."""
    min_mpp: float
    """um per px to which images of a higher resolution are resampled."""
    tokenizer_sha256: str
    """SHA-256 of the gene tokenizer that the model was trained with."""
    readout: Readout | None = None
    """Readout; None if expression is predicted from level sentences alone."""
    lineage: Lineage = field(default_factory=lambda: Lineage(parents_known=False))
    """The model's own run and its ancestors; by default, the ancestors are unknown."""
    vectors: GeneVectors | None = None
    """Gene vectors that the model was trained with (``text.gene_vectors``); None if it was trained without vectors."""
    initial_weights: str = ""
    """``vision.pretrained`` of the run; empty in the ``config`` of a loaded export, which holds all weights."""

    def __post_init__(self) -> None:
        self.initial_weights = self.initial_weights or self.config.vision.pretrained
        if not self.lineage.runs:
            own = LineageRun(
                name=self.config.name,
                sections=tuple(map(parse_section, self.sections)),
                trained_genes=tuple(g.key for g in self.genes if g.trained),
                held_out_genes=tuple(g.key for g in self.genes if g.held_out),
            )
            self.lineage = self.lineage.followed_by(own)

    @classmethod
    def from_training(
        cls,
        config: RunConfig,
        sizes: ModelSizes,
        model: CoMTIP,
        shards: Any,
        tables: Any,
        tokenizer: GeneTokenizer,
        parents: Lineage | None = None,
        vectors: GeneVectors | None = None,
    ) -> Bundle:
        """Build the bundle of a training task from its open shard set and training tables, without a readout.

        ``parents`` is the lineage of the model that the run started from; None without ``train.start_from``.
        ``vectors`` are the gene vectors of the run; None if it has none.
        """
        chosen = [(r, True) for r in tables.genes.trained] + [(r, False) for r in tables.genes.held_out]
        genes = []
        for row, trained in chosen:
            g = shards.genes[row]
            genes.append(ExportGene(g.key, g.symbol, g.ensembl, g.name, trained, not trained))
        sections = [LineageSection.of(s) for s in shards.manifest.sections]
        own = LineageRun(
            name=config.name,
            comtip_fast=__version__,
            shards=shards.manifest.digest,
            sets=tuple(shards.digests) if len(shards.digests) > 1 else (),
            sections=tuple(sections),
            trained_genes=tuple(g.key for g in genes if g.trained),
            held_out_genes=tuple(g.key for g in genes if g.held_out),
            vectors=None if vectors is None else vectors_record(vectors),
        )
        return cls(
            config,
            sizes,
            model,
            tables.table,
            genes,
            [{k: getattr(s, k) for k in SECTION_FIELDS} for s in sections],
            shards.manifest.tile.um,
            shards.manifest.tile.min_mpp,
            tokenizer.sha256,
            lineage=(parents or Lineage()).followed_by(own),
            vectors=vectors,
        )

    def save(self, folder: Path) -> None:
        """Write ``config.json``, ``model.safetensors``, ``levels.safetensors``, ``genes.tsv``, ``lineage.json``, ``README.md``.

        A readout is written to ``readout.safetensors``, and gene vectors to ``gene_vectors.safetensors``.
        ``SHA256SUMS`` contains the hashes of all files but the README. An earlier export in ``folder`` is replaced once the
        new one is complete.

        Raises
        ------
        FileExistsError
            ``folder`` contains a file that is not part of an export.
        """
        others = (
            sorted(p.name for p in folder.iterdir() if p.name not in export_checks.FILES) if folder.exists() else []
        )
        if others:
            raise FileExistsError(
                f"{folder}: contains files that are not part of an export ({', '.join(others[:3])}); move them elsewhere, or give "
                "another folder"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as tmp_path:
            self._write(tmp_path)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        vision = replace(self.config.vision, pretrained=self.initial_weights)
        meta = {
            "format": EXPORT_FORMAT,
            "version": EXPORT_VERSION,
            "comtip_fast": __version__,
            "config": config_to_dict(replace(self.config, vision=vision)),
            "sizes": asdict(self.sizes),
            "tile_um": self.tile_um,
            "min_mpp": self.min_mpp,
            "tokenizer_sha256": self.tokenizer_sha256,
            "sections": self.sections,
            "hashes": export_checks.SUMS,
            "readout": None if self.readout is None else export_checks.READOUT,
            "gene_vectors": None if self.vectors is None else self.vectors.sha256,
        }
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        save_arrays(self.levels.to_arrays(), folder / "levels.safetensors")
        if self.readout is not None:
            arrays, header = self.readout.to_arrays()
            save_arrays(arrays, folder / export_checks.READOUT, metadata={"header": json.dumps(header)})
        if self.vectors is not None:
            self.vectors.save(folder / export_checks.VECTORS)
        with (folder / "genes.tsv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, delimiter="\t", lineterminator="\n")
            out.writerow(["key", "symbol", "ensembl", "name", "trained", "held_out"])
            for g in self.genes:
                out.writerow([g.key, g.symbol, g.ensembl, g.name, int(g.trained), int(g.held_out)])
        weights = export_checks.sha256_of(folder / "model.safetensors")
        (folder / LINEAGE_FILE).write_text(self.lineage.with_own(weights=weights).to_json(), encoding="utf-8")
        (folder / "README.md").write_text(model_card(self), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        export_checks.write_sums(folder, export_checks.hashed_files(meta))

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Bundle:
        """Verify and read an export; reads no file outside of ``folder``.

        Parameters
        ----------
        folder
            Folder of the export.
        device
            Device of the weights; the model is returned in eval mode.

        Raises
        ------
        FileNotFoundError, ValueError
            The export is missing or has another format version, or a file is damaged, edited or belongs to another model.
        """
        meta = _read_meta(folder)
        sums = export_checks.verify_files(folder, export_checks.hashed_files(meta), hashed="hashes" in meta)
        where = folder / "config.json"
        try:
            config, sizes = config_from_dict(meta["config"], str(where)), ModelSizes(**meta["sizes"])
            rest = (meta["sections"], meta["tile_um"], meta["min_mpp"], meta["tokenizer_sha256"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{where}: {_fault_of(error)}; {export_checks.FIX}") from error
        initial_weights = config.vision.pretrained
        # The export holds all weights; the files of initial weights may no longer exist.
        config = replace(
            config, vision=replace(config.vision, pretrained=""), train=replace(config.train, start_from="")
        )
        genes = export_checks.read_genes(folder / "genes.tsv", sizes.n_identities)
        arrays = _read_tensors(load_arrays, folder / "levels.safetensors")
        export_checks.check_levels(arrays, folder / "levels.safetensors", sizes.n_identities, sizes.n_levels)
        weights = _read_tensors(load_file, folder / "model.safetensors")
        for encoder in ("vision.", "teacher."):  # absent in exports of earlier versions
            fill_normalisation(weights, encoder)
        reshape_scalars(weights)
        model = CoMTIP(config, sizes)
        export_checks.check_weights(weights, model.state_dict(), folder / "model.safetensors")
        model.load_state_dict(weights)
        readout = _read_readout(folder, model, config, genes) if meta.get("readout") else None
        lineage = _read_lineage(folder, meta, genes, sums.get("model.safetensors", ""))
        vectors = export_checks.read_vectors(
            folder / export_checks.VECTORS, meta.get("gene_vectors"), lineage.own, sizes.vector_dim
        )
        model = model.to(device).eval()
        levels = LevelTable(**arrays)
        return cls(config, sizes, model, levels, genes, *rest, readout, lineage, vectors, initial_weights)


def vectors_record(vectors: GeneVectors) -> LineageVectors:
    """Return hash, licence and names of the sources of gene vectors, as recorded in a lineage."""
    sources = vectors.header.get("sources")
    names = tuple(str(s.get("name", "")) for s in sources) if isinstance(sources, list) else ()
    return LineageVectors(sha256=vectors.sha256, licence=str(vectors.header.get("licence") or ""), sources=names)


def lineage_of(source: str | Path) -> Lineage:
    """Return the lineage of an export or of a finished run, without loading the weights.

    Raises
    ------
    FileNotFoundError, ValueError
        ``source`` has no export, the export has another format version, or a file is damaged or edited.
    """
    folder = Path(source)
    folder = folder / "export" if (folder / "export").is_dir() else folder
    meta = _read_meta(folder)
    sums = export_checks.verify_files(folder, export_checks.hashed_files(meta), hashed="hashes" in meta)
    sizes = meta.get("sizes")
    if not isinstance(sizes, dict) or not isinstance(sizes.get("n_identities"), int):
        raise ExportError(
            f"{folder / 'config.json'}: sizes.n_identities is missing or not an integer; {export_checks.FIX}"
        )
    genes = export_checks.read_genes(folder / "genes.tsv", sizes["n_identities"])
    return _read_lineage(folder, meta, genes, sums.get("model.safetensors", ""))


def _read_lineage(folder: Path, meta: dict[str, Any], genes: list[ExportGene], weights: str) -> Lineage:
    """Return the lineage of an export; for an export of version 1 or 2, its own run with unknown parents."""
    where = folder / "config.json"
    try:
        sections = [parse_section(s) for s in meta["sections"]]
        name = str(meta["config"]["name"])
    except (KeyError, TypeError) as error:
        raise ExportError(f"{where}: {_fault_of(error)}; {export_checks.FIX}") from error
    if meta["version"] >= export_checks.FIRST_WITH_LINEAGE:
        return export_checks.read_lineage(folder / LINEAGE_FILE, meta["sections"], genes, weights)
    own = LineageRun(
        name=name,
        comtip_fast=str(meta.get("comtip_fast", "")),
        weights=weights,
        sections=tuple(sections),
        trained_genes=tuple(g.key for g in genes if g.trained),
        held_out_genes=tuple(g.key for g in genes if g.held_out),
    )
    return Lineage(runs=(own,), parents_known=False)


def _fault_of(error: Exception) -> str:
    """Return what is wrong with a field of ``config.json``, from the error that reading it raised."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    return f"a field is missing, unknown or of the wrong type ({error})"


def _read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` after a check of format, version and name of the readout file."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no export (config.json is missing); give a finished run or its export")
    meta = export_checks.read_json(path)
    if meta.get("format") != EXPORT_FORMAT:
        raise ValueError(
            f"{path}: format {meta.get('format')!r}, expected {EXPORT_FORMAT!r}, so {folder} is no export; give a finished run or "
            "an export"
        )
    if meta.get("version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{path}: version {meta.get('version')!r}, but comtip-fast {__version__} reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}; load it with the release that wrote it"
        )
    if meta.get("readout") not in (None, export_checks.READOUT):
        raise ExportError(
            f"{path}: readout is {meta['readout']!r}, expected {export_checks.READOUT!r}; {export_checks.FIX}"
        )
    return dict(meta)


def _read_readout(folder: Path, model: CoMTIP, config: RunConfig, genes: list[ExportGene]) -> Readout:
    """Read the readout of an export and check that it fits the model and its genes."""
    path = folder / export_checks.READOUT
    arrays, header = read_readout(path)
    trained = [g.key for g in genes if g.trained]
    check_readout(arrays, header, path, trained, model=model, dim=config.align.dim)
    return Readout.from_arrays(arrays, header)


def model_card(bundle: Bundle) -> str:
    """Return the README of an export: training data of all runs, licences, attribution and permitted use."""
    prints = {s.section_id: (s.spots, s.picture) for s in bundle.lineage.own.sections}
    sections = []
    for section in map(parse_section, bundle.sections):
        spots, picture = prints.get(section.section_id, ("", ""))
        sections.append(replace(section, spots=spots, picture=picture))
    lineage = bundle.lineage.with_own(sections=tuple(sections))
    trained, held = sum(g.trained for g in bundle.genes), sum(g.held_out for g in bundle.genes)
    attributions = "\n".join(f"- {_markdown(a)}" for a in lineage.attributions())
    licences = "\n".join(f"- {_markdown(x)}" for x in lineage.licences()) or "- not stated"
    return (
        f"# {_markdown(bundle.config.name)}: a CoMTIP model\n\n"
        f"Trained with comtip-fast {lineage.own.comtip_fast or 'unknown'}. Tiles of {bundle.tile_um:g} um in "
        f"{bundle.sizes.tile_px} px; {trained} genes trained, {held} held out of training.\n\n"
        f"## Training data\n{_card_runs(lineage)}\n"
        "| run | section | split | species | tissue | donor | spots | licence |\n|---|---|---|---|---|---|---|---|\n"
        f"{_card_sections(lineage)}\n\n{_card_readout(bundle)}{_card_adaptation(bundle)}"
        f"## Licences\nOf the data that influenced the weights:\n{licences}\n\n"
        f"## Attribution\n{attributions}\n\n## Use\nResearch only; not a medical device. "
        "Load it with `comtip_fast.load(<this folder>)`; weights are safetensors, without pickle.\n"
    )


def _card_runs(lineage: Lineage) -> str:
    """Return the model card's text on unknown parents, all runs (oldest first) and test sections that influenced the weights."""
    lines = []
    if not lineage.parents_known:
        lines.append(
            f"**The parents of {_markdown(lineage.labels()[0])} are unknown**: it was exported without lineage. If it "
            "started from another model, that model's data also influenced the weights, and scores on donors and genes "
            "that are new here may not be scores on new donors and genes.\n"
        )
    lines.append(
        "Weights were trained on sections of split `train`; `val` was used for early stopping and for the choice of the "
        "readout; `test` was not used by its run.\n"
    )
    if lineage.ancestors:
        lines.append("Fine-tuned in several runs, oldest first; each started from the weights of the one before:")
    for label, run in zip(lineage.labels(), lineage.runs, strict=True):
        scores = ", ".join(f"{_markdown(c)} {v:.3f}" for c, v in run.validation.items())
        vectors = "" if run.vectors is None else f"; gene vectors {run.vectors.sha256[:16]}"
        licence = "" if run.vectors is None else f" (licence: {_markdown(run.vectors.licence or 'not stated')})"
        lines.append(
            f"- {_markdown(label)}: {len(run.trained_genes)} genes trained{vectors}{licence}{_card_extensions(run)}"
            + (f"; validation PCC: {scores}" if scores else "")
        )
    own = [s for s in lineage.own.sections if s.split == "test"]
    for section, uses in zip(own, lineage.uses(own), strict=True):
        runs = names_of_uses(uses, LEARNING)
        if runs:
            lines.append(
                f"\n**{_markdown(section.section_id)} is a test section of this run, but influenced the weights of "
                f"{_markdown(', '.join(runs))}.**"
            )
    return "\n".join(lines) + "\n"


def _card_extensions(run: LineageRun) -> str:
    """Return the model card's text on sets that a run did not start with; empty if there are none."""
    parts = [f"{len(e.sets)} from step {e.step + 1} on" for e in run.extensions]
    return f"; further shard sets: {', '.join(parts)} (genes and levels are those of the first sets)" if parts else ""


def _card_readout(bundle: Bundle) -> str:
    """Return the model card's text on the training spots whose features the readout contains; empty if there are none."""
    heads = [] if bundle.readout is None else bundle.readout.heads
    spots = {h.cohort: max((m.n_kernel_values for m in h.maps.values()), default=0) for h in heads}
    lines = [f"- {_markdown(cohort)}: {n} spots\n" for cohort, n in spots.items() if n]
    note = f"`{export_checks.READOUT}` contains image features (principal components) of training spots, and no tiles or counts of them:\n"
    return "## Training spots in the readout\n" + note + "".join(lines) + "\n" if lines else ""


def _card_adaptation(bundle: Bundle) -> str:
    """Return the model card's text on the tissue sections that the readout was adapted to; empty if there are none."""
    facts = [] if bundle.readout is None else [head.facts for head in bundle.readout.heads]
    lines = [
        f"- Section {_markdown(f['adapted_to'])} of donor {_markdown(f.get('adapted_donor') or 'not stated')}: the readout was "
        f"adapted to {_markdown(f.get('adapted_spots', 'some'))} of its spots; the encoders were not changed. Scores on this "
        "section and on other sections of this donor are not scores on new data.\n"
        for f in facts
        if "adapted_to" in f
    ]
    return "## Adaptation\n" + "".join(lines) + "\n" if lines else ""


def _card_sections(lineage: Lineage) -> str:
    """Return the rows of the model card's table of sections, one per run and section."""
    rows = []
    for label, run in zip(lineage.labels(), lineage.runs, strict=True):
        for s in run.sections:
            cells = (label, s.section_id, s.split, s.species, s.tissue, s.donor, s.n_spots, s.licence)
            rows.append("| " + " | ".join(_markdown("-" if c == "" else c) for c in cells) + " |")
    return "\n".join(rows)


def _read_tensors(read: Any, path: Path) -> Any:
    """Return ``read(path)``; raise ExportError if the file is not valid safetensors."""
    try:
        return read(path)
    except SafetensorError as error:
        raise ExportError(f"{path}: not a valid safetensors file ({error}); {export_checks.FIX}") from error


def _markdown(value: object) -> str:
    """Return a text as one cell of a Markdown table, with HTML and cell separators escaped."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")
