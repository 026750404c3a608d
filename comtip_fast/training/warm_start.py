"""Initialization from the weights of another model (``train.start_from``), which may have other genes and other data.

A tensor is copied if its name and shape agree; tensors that depend on the tokenizer or on gene vectors are copied only if both
models use the same ones. Rows of the identity embedding belong to genes and are copied by gene key. Level edges, frequencies and
expected values are not copied, because they are fitted to the new data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from comtip_shards import ShardSet

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.export import Bundle, lineage_of
from comtip_fast.lineage import FILE, LEARNING, Lineage, LineageSection, names_of_uses, symbol_of
from comtip_fast.models import CoMTIP
from comtip_fast.models.adapters import plain_name

log = logging.getLogger("comtip_fast")
IDENTITY = "genes.identity_Id"
"""Tensor with one row per trained gene, from row 1."""
VECTOR_TENSORS = ("genes.project_vector.weight", "genes.vector_scale")
"""Tensors that depend on the axes of the gene vectors; copied only if both models use the same vectors."""


@torch.no_grad()
def start_from(
    model: CoMTIP, source: str | Path, keys: Sequence[str], tokenizer_sha256: str, vectors_sha256: str = ""
) -> list[str]:
    """Copy the weights of an export into ``model``, where names and shapes agree.

    Parameters
    ----------
    model
        Model to train; changed in place.
    source
        An export folder, or the folder of a finished run.
    keys
        Keys of the trained genes, in the order of the identity rows from 1.
    tokenizer_sha256
        Hash of the current tokenizer.
    vectors_sha256
        Hash of the run's gene vectors; empty for none.

    Returns
    -------
    list of str
        ``name: reason`` of each tensor of either model that was not copied, sorted.

    Raises
    ------
    FileNotFoundError, ValueError
        The export in ``source`` is missing, damaged or of another format version, or none of its tensors fits.
    """
    folder = Path(source)
    bundle = Bundle.load(folder / "export" if (folder / "export").is_dir() else folder)
    old, new = bundle.model.state_dict(), model.state_dict()
    differing = _differing_inputs(bundle, tokenizer_sha256, vectors_sha256)
    left = [f"{name}: not in this model" for name in old.keys() - set(map(plain_name, new))]
    taken = 0
    for name, target in new.items():
        if name == IDENTITY:
            continue
        # If the source has no EMA teacher, the teacher starts as a copy of the encoder.
        plain = plain_name(name)  # an export has no adapters
        value = old.get(plain, old.get(plain.replace("teacher.", "vision.", 1)))
        if value is None:
            left.append(f"{name}: not in {folder}")
        elif value.shape != target.shape:
            left.append(f"{name}: shape {tuple(value.shape)} in {folder}, {tuple(target.shape)} in this model")
        elif name in differing:
            left.append(f"{name}: {differing[name]}")
        else:
            target.copy_(value)
            taken += 1
    if not taken:
        raise ValueError(
            f"{folder}: no tensor has the name and shape of a tensor of this model; use the vision, text and align settings of "
            "that run"
        )
    genes = _take_identities(old.get(IDENTITY), new.get(IDENTITY), [g.key for g in bundle.genes if g.trained], keys)
    log.info(
        "loaded %d of %d tensors and the identities of %d of %d genes from %s",
        taken,
        len(new),
        genes,
        len(keys),
        folder,
    )
    for reason in sorted(left):
        log.warning("not loaded: %s", reason)
    return sorted(left)


def _differing_inputs(bundle: Bundle, tokenizer_sha256: str, vectors_sha256: str) -> dict[str, str]:
    """Return ``{tensor: reason}`` for tensors of an export that depend on another tokenizer or on other gene vectors."""
    out = {} if bundle.tokenizer_sha256 == tokenizer_sha256 else {"genes.token_Vd": "the tokenizers differ"}
    if bundle.vectors is None or bundle.vectors.sha256 != vectors_sha256:
        out |= dict.fromkeys(VECTOR_TENSORS, "the gene vectors differ")
    return out


def _take_identities(
    old: torch.Tensor | None, new: torch.Tensor | None, old_keys: Sequence[str], keys: Sequence[str]
) -> int:
    """Copy row 0 and the identity rows of the genes that both models have; return the number of these genes.

    Nothing is copied if a model has no identities or if their widths differ.
    """
    if old is None or new is None or old.shape[1:] != new.shape[1:]:
        return 0
    old_rows = {key: row for row, key in enumerate(old_keys, start=1)}
    pairs = [(row, old_rows[key]) for row, key in enumerate(keys, start=1) if key in old_rows]
    new[0].copy_(old[0])
    for row, other in pairs:
        new[row].copy_(old[other])
    return len(pairs)


def parents_of(config: RunConfig, run_dir: Path | None = None, *, required: bool = True) -> Lineage:
    """Return the lineage of the model that a run starts from.

    Parameters
    ----------
    config
        Config of the run; without ``train.start_from`` there are no parents.
    run_dir
        Folder of a run that has already started; its ``lineage.json`` is used if it exists, because the parent may have been
        moved or replaced. Otherwise, and for None, the lineage is read from the parent.
    required
        Whether a missing parent is an error; otherwise the parents are recorded as unknown.

    Raises
    ------
    FileNotFoundError
        The parent does not exist and ``required`` is set.
    ValueError
        The parent's export or the run's ``lineage.json`` is damaged or of another format version.
    """
    if not config.train.start_from:
        return Lineage()
    if run_dir is not None and (run_dir / FILE).is_file():
        return Lineage.load(run_dir / FILE)
    try:
        return lineage_of(config.train.start_from)
    except FileNotFoundError:
        if required:
            raise
        log.warning(
            "train.start_from=%s: no run or export at this path, so the parents of this run are recorded as unknown; to record "
            "them, restore the export there, delete lineage.json in the run folder, and run this command again",
            config.train.start_from,
        )
        return Lineage(parents_known=False)


def parent_leaks(parents: Lineage, shards: ShardSet, tables: TrainingTables) -> list[str]:
    """Return a message for each validation or test section that influenced a parent's weights, or whose donor a parent trained on.

    There is one more message if the parents are not all known, and one if a parent trained on genes that this run holds out.

    Parameters
    ----------
    parents
        Lineage of the model that the run starts from.
    shards, tables
        Shard set and training tables of the run.
    """
    messages = []
    if not parents.parents_known:
        messages.append(
            "the lineage of the parent is not known: its weights may have been trained on further data; evaluate on donors that no "
            "earlier run can have used"
        )
    held_out = [LineageSection.of(s) for s in shards.manifest.sections if s.split in ("val", "test")]
    for section, uses in zip(held_out, parents.uses(held_out), strict=True):
        runs = names_of_uses(uses, LEARNING) or parents.runs_that_trained_on(section.donor)
        if runs:
            what = "section" if names_of_uses(uses, LEARNING) else f"donor {section.donor} of section"
            messages.append(
                f"{what} {section.section_id} (split {section.split}) influenced the weights of {', '.join(runs)}, which this "
                "run starts from: its scores are not scores on new data; use other sections for validation and test"
            )
    seen = {symbol_of(key) for run in parents.runs for key in run.trained_genes}
    known = [shards.genes[r].key for r in tables.genes.held_out if symbol_of(shards.genes[r].key) in seen]
    if known:
        messages.append(
            f"{len(known)} of {tables.genes.held_out.size} held-out genes were trained by a parent ({', '.join(known[:3])}"
            f"{' ...' if len(known) > 3 else ''}); they are not scored as unseen"
        )
    return messages
