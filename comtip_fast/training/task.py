"""CoMTIP as a training task: data, model, validation and export behind :class:`.protocol.TrainingTask`.

The losses are in :mod:`comtip_fast.training.losses`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comtip_kernels.packed_attention import attention_name
from comtip_shards import ShardSet, open_sets
from torch import Tensor, nn

from comtip_fast.collectives import Group, SingleProcessGroup, share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.expected_tile import check_expected_tile
from comtip_fast.data.expression.further_sets import count_of_first, extended_tables, without_further_validation
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders.factory import make_loader
from comtip_fast.data.loaders.torch import TorchLoader
from comtip_fast.export import Bundle
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import gene_tokens, vector_rows
from comtip_fast.genes.vectors import GeneVectors, load_vectors
from comtip_fast.inference import Predictor
from comtip_fast.lineage import Lineage, LineageExtension
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.models.adapters import merged_state
from comtip_fast.models.image_encoder import check_mask, patches_per_side
from comtip_fast.runtime.devices import in_bf16
from comtip_fast.training.checkpoint.run_state import GENES
from comtip_fast.training.checkpoint.set_changes import FIRST, SETS
from comtip_fast.training.distributed.process_group import on_rank_zero
from comtip_fast.training.losses import LossInputs, LossPart, Numbers, Parts, StepLosses
from comtip_fast.training.protocol import Extension, ValidationResult
from comtip_fast.training.readout.fit import fit_readout
from comtip_fast.training.validation import SectionScore, Validation, validation_scores
from comtip_fast.training.warm_start import parent_leaks, parents_of, start_from

log = logging.getLogger("comtip_fast")


def build_task(
    config: RunConfig,
    device: torch.device,
    group: Group | None = None,
    *,
    initialise: bool = True,
    parents: Lineage | None = None,
    first_sets: Sequence[str] = (),
) -> CoMTIPTask:
    """Open the shard set, compute the training tables and build the model from the config; the same on all ranks.

    Parameters
    ----------
    config
        Config of the run.
    device
        Device of the model.
    group
        Ranks of the run; None is a single process.
    initialise
        Whether to load the initial weights that the config names (``vision.pretrained``, ``train.start_from``). False if a
        checkpoint will be loaded, because the files of the initial weights may no longer exist. The weights of a frozen stem
        are always loaded from their package.
    parents
        Lineage of the model that the run starts from; None reads it from ``train.start_from``.
    first_sets
        Digests of the sets that the run started with, if further sets were appended since; genes are selected and levels fitted on
        these. Empty: all sets.

    Raises
    ------
    ValueError, FileNotFoundError
        The shard set, a further set, the settings, the gene vectors or the initial weights cannot be used.
    """
    torch.manual_seed(config.train.seed)
    shards = open_sets(config.data.shards)
    shards.read_by_ranges(config.data.fetch == "ranges")
    n_first = count_of_first(shards, first_sets)
    without_further_validation(shards, n_first)
    check_expected_tile(config, shards)
    if config.vision.backbone == "small":  # before the tables, which can take minutes
        check_vision(config, patches_per_side(config.vision, config.vision.patch_px, shards.manifest.tile.px) ** 2)
    vectors = load_vectors(config.text)
    # On one rank, because the statistics read tens of thousands of spots of all shards.
    tables = on_rank_zero(lambda: _tables(shards, n_first, config), group or SingleProcessGroup())
    tokenizer = GeneTokenizer.load()
    sizes = ModelSizes(
        tile_px=shards.manifest.tile.px,
        n_levels=config.levels.n_levels,
        vocab_size=tokenizer.vocab_size,
        n_identities=tables.genes.trained.size,
        longest=config.text.max_tokens + 2,
        vector_dim=0 if vectors is None else vectors.vector_GK.shape[1],
    )
    model = _build_model(config, device, sizes, initialise)
    parents = parents_of(config, required=initialise) if parents is None else parents
    group = group or SingleProcessGroup()
    task = CoMTIPTask(config, shards, tables, tokenizer, model.to(device), sizes, group, parents, vectors, n_first)
    if config.train.start_from and initialise:
        # Loaded after the task has set the stem's output scale: the encoder was trained on the scale of its source run.
        keys = [shards.genes[row].key for row in tables.genes.trained]
        sha256 = "" if vectors is None else vectors.sha256
        start_from(task.model, config.train.start_from, keys, tokenizer.sha256, sha256)
    return task


def _tables(shards: ShardSet, n_first: int, config: RunConfig) -> TrainingTables:
    """Return the training tables, with genes and levels of the first ``n_first`` sets."""
    whole = n_first == len(shards.digests)
    return training_tables(shards, config) if whole else extended_tables(shards, n_first, config)


def _build_model(config: RunConfig, device: torch.device, sizes: ModelSizes, initialise: bool) -> CoMTIP:
    """Build the model on the CPU, and load the weights of a frozen stem and, if ``initialise``, of ``vision.pretrained``."""
    vision = config.vision if initialise else replace(config.vision, pretrained="")
    model = CoMTIP(replace(config, vision=vision), sizes)
    check_vision(config, model.vision.n_patches)
    if model.vision.stem is not None:
        model.vision.stem.load_pretrained()
    # Not in the model's constructor: an export is loaded on machines that may lack the implementation of its training.
    attention = check_attention(config, device, sizes.longest)
    model.genes.set_attention(config.text.attention)
    log.info("attention of the sentence encoder: %s", attention)
    model.fuse_blocks(config.engine, device)
    if model.genes.fused:
        log.info("blocks of the sentence encoder%s: fused", " and the image encoder" if model.vision.fused else "")
    dtype = torch.bfloat16 if in_bf16(config.train.precision, device) else torch.float32
    log.info("attention of the image encoder: %s", model.vision.attention_name(device, dtype))
    if config.loss.mfm > 0:
        passes = "one pass" if model.vision.in_one_pass else "two passes"
        log.info("image encoder: all patches and the visible ones in %s", passes)
    if config.engine.compile:
        model.compile_blocks()
    return model


def check_vision(config: RunConfig, n_patches: int) -> None:
    """Raise ValueError if masked feature modelling is on and ``vision.mask_ratio`` hides none of a tile's patches."""
    if config.loss.mfm > 0:
        check_mask(config.vision, n_patches)


def check_attention(config: RunConfig, device: torch.device, longest: int) -> str:
    """Return the name of the implementation that ``text.attention`` selects for ``device`` and sentences of ``longest`` tokens.

    Raises
    ------
    ValueError
        The implementation is not installed, or does not support the device, the precision or the length.
    """
    dtype = torch.bfloat16 if in_bf16(config.train.precision, device) else torch.float32
    try:
        return attention_name(config.text.attention, device, dtype, longest)
    except ValueError as error:
        raise ValueError(
            f"text.attention={config.text.attention}: {_in_settings(str(error), config.text.attention)}"
        ) from error


def _in_settings(message: str, choice: str) -> str:
    """Return an error message of the attention kernels, reworded to name settings of the config instead of kernel arguments."""
    problem, _, fix = message.removeprefix("packed_attention: ").partition("; ")
    problem = re.sub(r"impl='(\w+)'", r"\1", problem)
    fix = re.sub(r"(^|,? or )use impl='\w+'", "", fix)
    fix = fix.replace("cast the operands and move them", "train on a GPU with train.precision=bf16")
    fixes = [*filter(None, [fix]), *([] if choice == "auto" else ["set text.attention=auto"])]
    return f"{problem}; {', or '.join(fixes)}"


def _as_model(module: nn.Module) -> CoMTIP:
    assert isinstance(module, CoMTIP)
    return module


class CoMTIPTask:
    """Model, data and losses of CoMTIP; implements :class:`comtip_fast.training.protocol.TrainingTask`."""

    def __init__(
        self,
        config: RunConfig,
        shards: ShardSet,
        tables: TrainingTables,
        tokenizer: GeneTokenizer,
        model: CoMTIP,
        sizes: ModelSizes,
        group: Group,
        parents: Lineage,
        vectors: GeneVectors | None = None,
        n_first: int | None = None,
    ) -> None:
        self._n_first = len(shards.digests) if n_first is None else n_first
        self._extensions: tuple[Extension, ...] = ()
        self.config, self.shards, self.tables, self.sizes, self.group = config, shards, tables, sizes, group
        self.parents, self.vectors = parents, vectors
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        stem = self._stem if model.vision.stem is not None else None
        if model.vision.stem is not None:
            self._standardise_stem()
        self.loader = make_loader(
            config, shards, tables, rank=group.rank, world=group.size, device=self.device, frozen_stem=stem
        )
        rows = tables.genes.trained
        names = [(shards.genes[r].symbol, shards.genes[r].name) for r in rows]
        vector_GK = None if vectors is None else self._vectors_of_trained(vectors)
        identity = np.arange(1, rows.size + 1)
        self.genes = gene_tokens(tokenizer, names, identity, config.text, vector_GK).to(self.device)
        self.step = StepLosses(
            config,
            self.genes,
            torch.from_numpy(tables.table.log_prior).to(self.device),
            tables.strata.to(self.device),
            group,
        )
        self.validation = Validation(model, shards, tables, self.loader, self.genes, config)

    @property
    def module(self) -> nn.Module:
        """The model with all parameters."""
        return self.model

    def describe(self) -> str:
        """Return a summary of parameters, spots and genes for the log."""
        genes, count = self.tables.genes, sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lines = [
            (
                f"{count / 1e6:.2f} M trainable parameters, {self.tables.spots.size} spots; "
                f"{genes.trained.size} genes trained, {genes.held_out.size} held out"
            )
        ]
        if self.genes.vector_GK is not None:
            known = int((self.genes.vector_GK != 0).any(dim=1).sum())
            lines.append(f"  gene vectors of {known} of {genes.trained.size} trained genes")
        for cohort, rows in genes.eligible.items():
            lines.append(f"  {cohort}: {rows.size} genes pass genes.min_detection{self._not_validated(cohort)}")
        return "\n".join(lines)

    def _not_validated(self, cohort: str) -> str:
        """Return the part of :meth:`describe` on a cohort without a section of split ``val``; empty text if there is one."""
        shards = self.shards
        split = {s.split for i, s in enumerate(shards.manifest.sections) if shards.cohort_of_section(i) == cohort}
        return "" if "val" in split else "; no section of split val, so its scores do not decide when training stops"

    def leaks(self) -> list[str]:
        """Return warnings of leakage: the messages of :func:`comtip_fast.training.warm_start.parent_leaks`."""
        return parent_leaks(self.parents, self.shards, self.tables)

    def note_extensions(self, extensions: Sequence[Extension]) -> None:
        """Take note of the extensions of the run, which :meth:`bundle` records in the lineage."""
        self._extensions = tuple(extensions)

    def prepare(self) -> None:
        """Compute the frozen-stem features of all training tiles, if the loader keeps such features in memory."""
        self.loader.prepare()

    def close(self) -> None:
        """Stop the loader's workers."""
        self.loader.close()

    def metrics(self) -> dict[str, float]:
        """Return loader statistics over all ranks; a collective call.

        ``loader_wait_s`` is the time in seconds spent waiting for batches since the last call (maximum over ranks), ``faults`` the
        number of damaged records so far (sum over ranks), and ``faults_KIND`` the number of one kind, if it is not zero.
        """
        own = self.loader.metrics()
        wait = self.group.max(torch.tensor(own.pop("loader_wait_s"), device=self.device))
        counts = self.group.sum(torch.tensor(list(own.values()), device=self.device)).tolist()
        faults = {name: n for name, n in zip(own, counts, strict=True) if n or name == "faults"}
        return {"loader_wait_s": float(wait), **faults}

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches as spot indices, a pure function of (seed, epoch)."""
        return self.loader.batches(epoch)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Load this rank's share of a global batch to the task's device; ``spot_index`` has the spots of all ranks."""
        batch = self.loader.batch(spot_index, step, epoch).to(self.device)
        batch.global_size = len(spot_index)
        return batch

    def losses(self, module: nn.Module, batch: Batch) -> tuple[Parts, Numbers]:
        """Return this rank's shares of the losses, ``{"loss": total, part: ...}``, scalars with gradients, and numbers to log."""
        out = self.step.encode(_as_model(module), batch)
        heads = LossInputs.of(out)
        parts, numbers = self.step.embedding_losses(batch, heads)
        mfm = self.step.masked(out, sum(self.step.counts(batch)))
        if mfm is not None:
            parts["mfm"] = LossPart(mfm)
        return self.step.weighted_total(parts, heads), numbers | self.step.health(batch, out)

    # -- gradient caching, see comtip_fast.training.grad_cache --------------------------------------------

    def pieces(self, batch: Batch, n: int) -> list[Batch]:
        """Split this rank's share into ``n`` pieces, or fewer if a rank has fewer spots; the same number on every rank."""
        b, n = batch.section.numel(), max(1, min(n, *self.step.counts(batch)))
        return [batch.select(share_of(b, i, n)) for i in range(n)]

    def embed(self, module: nn.Module, piece: Batch, table: bool) -> dict[str, Tensor]:
        """Return the piece's image vectors and, with ``table``, the sentence table and scales."""
        out = self.step.encode(_as_model(module), piece, masked=False, table=table)
        return LossInputs.of(out).tensors() if table else {"vector": out.image.vector_BD}

    def join(self, embedded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenate the image vectors of all pieces; the other tensors come from the piece that has the table."""
        joined: dict[str, Tensor] = {}
        for tensors in embedded:
            joined |= tensors
        joined["vector"] = torch.cat([tensors["vector"] for tensors in embedded])
        return joined

    def losses_of(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Parts, Numbers]:
        """Return this rank's shares of all losses but L_mfm from the tensors of :meth:`join`, and numbers to log."""
        heads = LossInputs.from_tensors(tensors)
        parts, numbers = self.step.embedding_losses(batch, heads)
        return self.step.weighted_total(parts, heads), numbers

    def replay(
        self, module: nn.Module, batch: Batch, piece: Batch, gradients: dict[str, Tensor], table: bool
    ) -> tuple[Tensor, Parts, Numbers]:
        """Return the scalar <gradients, recomputed tensors> + w_mfm L_mfm, this piece's shares of losses, and numbers to log.

        The shares are ``mfm`` and the part of ``loss`` due to L_mfm; without L_mfm, there are none.
        """
        out = self.step.encode(_as_model(module), piece, table=table)
        again = LossInputs.of(out).tensors() if table else {"vector": out.image.vector_BD}
        scalar = torch.stack([(again[name] * gradients[name]).sum() for name in again]).sum()
        mfm = self.step.masked(out, sum(self.step.counts(batch)))
        if mfm is None:
            return scalar, {}, self.step.health(piece, out)
        weighted = self.config.loss.mfm * mfm
        return scalar + weighted, {"mfm": mfm, "loss": weighted}, self.step.health(piece, out)

    def cut(self, gradients: dict[str, Tensor], pieces: list[Batch]) -> list[dict[str, Tensor]]:
        """Return, for each piece, its rows of the gradients of the image vectors, and the gradients of all other tensors."""
        vectors = gradients["vector"].split([p.section.numel() for p in pieces])
        return [gradients | {"vector": v} for v in vectors]

    def after_step(self, module: nn.Module, step: int, good: Tensor | None = None) -> None:
        """Update the EMA teacher; see :meth:`.protocol.TrainingTask.after_step`."""
        _as_model(module).update_teacher(self.config.vision.ema_decay, good)

    def validate(self) -> ValidationResult:
        """Return the result of a validation in this process alone."""
        return self.validation.score()

    def is_validated(self, name: str) -> bool:
        """Return whether a validation reads the parameter: False for the EMA teacher and the mask feature generator."""
        return name.partition(".")[0] not in ("teacher", "generator")

    def validation_share(self, progress: Callable[[str], None]) -> list[SectionScore]:
        """Score this rank's share of the validation sections; not a collective call."""
        return self.validation.share(self.group.rank, self.group.size, progress)

    def validation_result(self, shares: list[list[SectionScore]]) -> ValidationResult:
        """Return the mean zero-shot PCC over cohorts, the mean of each cohort, and statistics of the shared space."""
        return self.validation.result(shares)

    def export(self, folder: Path) -> None:
        """Write an export of the current weights, with scores on split ``val``.

        Unless ``readout.kind`` is ``levels``, the export has a readout that is fitted on the training split.
        """
        model = self._copy_of_model()
        bundle = replace(self.bundle(), model=model, config=self._plain_config())
        if self.config.readout.kind != "levels":
            bundle.readout = fit_readout(model, self.config, self.shards, self.tables, self.loader)
        predictor = Predictor(bundle, self.device)
        per_cohort, per_gene = validation_scores(
            predictor, self.shards, self.tables, self.loader, self.config.train.seed
        )
        bundle.lineage = bundle.lineage.with_own(validation=per_cohort, gene_scores=per_gene)
        bundle.save(folder)

    def _copy_of_model(self) -> CoMTIP:
        """Return a copy of the model in eval mode, with merged adapters and without the hooks of the engine.

        Under ZeRO 3, these hooks call collectives, but only one rank exports.
        """
        plain = self._plain_config()
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
            model = CoMTIP(replace(plain, vision=replace(plain.vision, pretrained="")), self.sizes)
        model.load_state_dict(merged_state(self.model))
        model.fuse_blocks(plain.engine, self.device, trains=False)  # as a loaded export, whose readout is fitted here
        return model.to(self.device).eval()

    def _plain_config(self) -> RunConfig:
        """Return the config without adapters, because an export contains merged weights."""
        lora = replace(self.config.vision.lora, rank=0)
        return replace(self.config, vision=replace(self.config.vision, lora=lora))

    def bundle(self) -> Bundle:
        """Return the contents of an export: config, model, levels, genes, sections and lineage; without a readout."""
        bundle = Bundle.from_training(
            self.config,
            self.sizes,
            self.model,
            self.shards,
            self.tables,
            self.tokenizer,
            self.parents,
            self.vectors,
        )
        further = tuple(LineageExtension(step=e.step, sets=tuple(e.sets)) for e in self._extensions)
        return replace(bundle, lineage=bundle.lineage.with_own(extensions=further))

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of the shard sets, tokenizer, gene vectors (if any) and trained genes, which must not change on resume."""
        vectors = {} if self.vectors is None else {"gene vectors": self.vectors.sha256}
        genes = hashlib.sha256("\n".join(self.shards.genes[r].key for r in self.tables.genes.trained).encode())
        inputs = {"shards": self.shards.manifest.digest, "tokenizer": self.tokenizer.sha256}
        inputs[SETS] = " ".join(self.shards.digests)
        if self._n_first < len(self.shards.digests):
            inputs[FIRST] = " ".join(self.shards.digests[: self._n_first])
        return inputs | vectors | {GENES: genes.hexdigest()}

    def _vectors_of_trained(self, vectors: GeneVectors) -> np.ndarray:
        """Return the vectors of the trained genes (G, K), 0 for genes without a vector, and set their scale in the model."""
        keys = [self.shards.genes[r].key for r in self.tables.genes.trained]
        vector_GK = vector_rows(vectors, keys)
        known = (vector_GK != 0).any(1)
        if known.sum() < 2:
            raise ValueError(
                f"text.gene_vectors={self.config.text.gene_vectors}: the file has vectors of {int(known.sum())} of the {len(keys)} "
                "trained genes, but at least 2 are needed; give a file with vectors of more of them (of the same species)"
            )
        self.model.genes.vector_scale.fill_(float(np.sqrt((vector_GK[known] ** 2).mean())))
        return vector_GK

    # -- frozen stem ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _stem(self, tiles: Tensor) -> Tensor:
        """Return the features of the frozen stem for uint8 tiles (N, 3, S, S), in CPU memory."""
        return self.model.vision.stem_features(tiles.to(self.device)).cpu()

    @torch.no_grad()
    def _standardise_stem(self) -> None:
        """Set the mean and standard deviation of the stem's output, so that channels have equal scale.

        They are computed from 256 to 511 evenly spaced training tiles, or from all tiles if there are fewer.
        """
        stem = self.model.vision.stem
        assert stem is not None
        spots = self.tables.spots[:: max(1, self.tables.spots.size // 256)]
        loader = TorchLoader(self.shards, self.tables, self.config)
        _, tiles = loader.tiles(spots, np.zeros(spots.shape, np.int64))
        raw = torch.cat([stem.raw(self.model.vision.cut(t.to(self.device)).flatten(0, 1)) for t in tiles.split(64)])
        stem.out_mean.copy_(raw.mean(0))
        stem.out_std.copy_(raw.std(0).clamp_min(1e-4))
