"""CoMTIP's losses. Each rank computes its share; the sum of the shares over ranks is the loss of the global batch.

L = w_nce L_nce + w_mfm L_mfm + w_pair L_pair + w_level L_level (docs/method.md). Random draws depend on the seed, step, spot and
gene only (:mod:`comtip_fast.training.draws`), and every mean divides by a count over the global batch. The loss therefore
does not depend on how spots are assigned to ranks.

Shapes: B spots of the global batch, b of this rank, G genes of the panel, Q levels, D width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from comtip_kernels import level_cross_entropy, pair_scores, pool_weights, table_pool
from torch import Tensor
from torch.nn import functional as F

from comtip_fast.collectives import Group, counts_of, share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch, pads_panels
from comtip_fast.genes.tokens import GeneTokens, drop_names_or_vectors, take_genes
from comtip_fast.models import CoMTIP, SentenceTable, StepOutput
from comtip_fast.objectives import (
    HEALTH,
    PairMetadata,
    choose_hardest,
    counted_swaps,
    feature_health,
    global_infonce,
    masked_feature_loss,
    pair_auc,
    pair_loss,
    permute_within_strata,
    same_text_hash,
    take_from_other_spots,
)
from comtip_fast.runtime import devices
from comtip_fast.training import draws
from comtip_fast.training.monitor.diagnostics import diagnostic, undefined

Parts = dict[str, Tensor]
Numbers = dict[str, Any]
"""Numbers to log: floats, or scalars on the device that are read when a row is logged."""
PARTS = ("nce", "mfm", "pair", "level")
PAIR_NUMBERS = ("pair_auc", "pair_auc_gain")


@dataclass
class LossInputs:
    """Inputs of all losses but L_mfm: vectors of the shared space, and the scales of logits."""

    vector_bD: Tensor
    """Image vectors of this rank's spots."""
    table: SentenceTable
    scale_nce: Tensor
    """Inverse temperature of InfoNCE, a scalar."""
    scale_level: Tensor
    """Inverse temperature of the level logits, a scalar."""

    @classmethod
    def of(cls, out: StepOutput) -> LossInputs:
        """Select the inputs from a model output that includes the sentence table."""
        assert out.table is not None
        return cls(out.image.vector_BD, out.table, out.scale_nce, out.scale_level)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        t = self.table
        return {
            "vector": self.vector_bD,
            "rows": t.rows_GQD,
            "unit": t.unit_GQD,
            "scores": t.scores_GQ,
            "pair": t.pair_GQD,
            "scale_nce": self.scale_nce,
            "scale_level": self.scale_level,
        }

    @classmethod
    def from_tensors(cls, t: dict[str, Tensor]) -> LossInputs:
        """Return the inputs from the dict of :meth:`tensors`."""
        table = SentenceTable(t["rows"], t["unit"], t["scores"], t["pair"])
        return cls(t["vector"], table, t["scale_nce"], t["scale_level"])


@dataclass(frozen=True)
class LossPart:
    """A part of the loss, and the inputs that have a gradient from it."""

    value: Tensor
    """This rank's share, a scalar."""
    reads: frozenset[str] = frozenset()
    """Names, as in :meth:`LossInputs.tensors`, of the inputs with a gradient; ``rows`` also stands for ``unit``, its function."""


class StepLosses:
    """Computes the losses of a training step.

    Parameters
    ----------
    config
        Config of the run.
    genes
        Tokens of all trained genes.
    log_prior
        Log frequency of each level of each trained gene, float (genes, Q).
    strata
        Stratum of each gene per section, within which mispairing permutes levels, int64 (sections, genes).
    group
        Ranks that share a global batch.
    """

    def __init__(self, config: RunConfig, genes: GeneTokens, log_prior: Tensor, strata: Tensor, group: Group) -> None:
        if pads_panels(config, genes.ids_GT.device):
            # One more gene, which pads panels, in a stratum of its own: no level of it reaches another gene.
            genes = genes.with_padding()
            log_prior, strata = F.pad(log_prior, (0, 0, 0, 1)), F.pad(strata, (0, 1), value=-1)
        self.config, self.genes, self.log_prior, self.strata, self.group = config, genes, log_prior, strata, group

    # -- model inputs -----------------------------------------------------------------------------------

    def encode(self, model: CoMTIP, batch: Batch, *, masked: bool = True, table: bool = True) -> StepOutput:
        """Run the model on a batch, optionally with the masked branch and the sentence table."""
        features = batch.features
        if features is None:
            assert batch.tiles is not None
            features = model.vision.stem_features(batch.tiles)
        visible, hidden = self._mask(batch, model.vision.n_patches) if masked else (None, None)
        genes = self._panel_genes(batch) if table else None
        group = self.group if self.config.engine.shard_table else None
        return model(features, visible, hidden, genes, group)

    def counts(self, batch: Batch) -> list[int]:
        """Return the number of spots of the global batch on each rank."""
        return counts_of(batch.global_size or batch.section.numel(), self.group.size)

    def _mask(self, batch: Batch, P: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the indices of visible and of hidden patches; (None, None) without masked feature modelling."""
        if self.config.loss.mfm <= 0:
            return None, None
        ratio = self.config.vision.mask_ratio
        return draws.masked_patches(self.config.train.seed, batch.step, batch.spot_index, P, ratio)

    def _panel_genes(self, batch: Batch) -> GeneTokens:
        """Return the tokens of the panel's genes after the random drops of identities, names and vectors."""
        rows = batch.panel_int64
        genes = take_genes(self.genes, rows, batch.panel_host)
        if self.config.text.identity_drop > 0:
            keep = draws.kept_identities(self.config.train.seed, batch.step, rows, self.config.text.identity_drop)
            genes = replace(genes, identity_G=genes.identity_G * keep)
        if genes.vector_GK is not None:
            seed, host = self.config.train.seed, batch.panel_host
            u_G = draws.vector_uniforms(seed, batch.step, rows)
            u_host_G = None if host is None else draws.vector_uniforms_on_host(seed, batch.step, host)
            genes = drop_names_or_vectors(genes, u_G, self.config.text, u_host_G)
        return genes

    # -- losses -----------------------------------------------------------------------------------------

    def embedding_losses(self, batch: Batch, heads: LossInputs) -> tuple[dict[str, LossPart], Numbers]:
        """Return this rank's shares of L_nce, L_pair and L_level (those with a weight above 0), and numbers to log.

        L_pair is absent for a panel of one gene, which has no mispairing.
        """
        weights, parts = self.config.loss, {}
        numbers: Numbers = {"genes": float(batch.n_genes), "scale": heads.scale_nce.detach()}
        numbers["tokens"] = self._tokens(batch) * self.config.levels.n_levels
        mispaired, counted = self._mispair(batch, heads)
        n_level, n_pair = self._shares(batch.measured, counted)
        if weights.nce > 0:
            value = self._nce(batch, heads, mispaired, counted)
            parts["nce"] = LossPart(value, frozenset({"vector", "rows", "scores", "scale_nce"}))
        if weights.pair > 0 and mispaired is not None and counted is not None:
            value, auc = self._pair(batch, heads, mispaired, counted)
            context = "vector" if weights.paat.context == "image" else "scores"
            parts["pair"] = LossPart(value * n_pair, frozenset({"pair", "rows", context}))
            numbers |= auc
        if weights.level > 0:
            value = n_level * level_cross_entropy(
                heads.vector_bD,
                heads.table.unit_GQD,
                batch.levels_int64,
                batch.measured,
                heads.scale_level,
                self.log_prior[batch.panel_int64],
            )
            parts["level"] = LossPart(value, frozenset({"vector", "rows", "scale_level"}))
        return parts, numbers

    def _tokens(self, batch: Batch) -> float:
        """Return the number of tokens of the panel's genes, without a device read if panel and lengths are in host memory."""
        if batch.panel_host is not None and self.genes.host is not None:
            return float(self.genes.host.length_G[batch.panel_host[: batch.n_genes]].sum())
        return float(self.genes.length_G[batch.panel_int64].sum())

    def masked(self, out: StepOutput, n_all: int) -> Tensor | None:
        """Return what the tiles in ``out`` add to L_mfm of a global batch of ``n_all`` tiles; None without the masked branch."""
        if self.config.loss.mfm <= 0 or out.predicted_BKd is None or out.target_BKd is None:
            return None
        n = out.predicted_BKd.shape[0]
        if n == 0:
            return out.predicted_BKd.sum()
        return masked_feature_loss(out.predicted_BKd, out.target_BKd, self.config.vision.distance) * (n / n_all)

    def weighted_total(self, parts: dict[str, LossPart], heads: LossInputs) -> Parts:
        """Return ``{"loss": weighted sum of the parts, part: ...}``.

        Inputs that no part of the step reads (e.g. those of the pair head, for a panel of one gene) get a gradient of 0 instead
        of None. Optimizers that flatten parameters into one buffer treat None as 0, so this makes all engines agree.
        """
        read = frozenset[str]().union(*(part.reads for part in parts.values()))
        values = {name: parts[name].value for name in PARTS if name in parts}
        unread = [t.sum() * 0 for name, t in heads.tensors().items() if name not in read and name != "unit"]
        total = sum((getattr(self.config.loss, name) * value for name, value in values.items()), heads.scale_nce * 0)
        return {"loss": sum(unread, total), **values}

    def logs(self, step: int) -> bool:
        """Return whether ``step`` computes the slower diagnostics, which are logged every ``train.log_every`` steps."""
        return step % self.config.train.log_every == 0

    def health(self, batch: Batch, out: StepOutput) -> Numbers:
        """Return statistics of patch-feature collapse, NaN on a rank without spots; empty in steps that are not logged."""
        if not self.logs(batch.step):
            return {}
        return diagnostic("feature health", lambda: feature_health(out.image.patches_BPd), undefined(HEALTH))

    def _shares(self, measured: Tensor, counted: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Return this rank's share of the measured and of the counted (spot, gene) pairs of the global batch."""
        if self.group.size == 1:
            return 1.0, 1.0
        own = torch.stack([measured.sum(), measured.new_zeros(()).sum() if counted is None else counted.sum()])
        every = self.group.sum(own).clamp_min(1)
        n_level, n_pair = (own.to(torch.float64) / every).to(self.log_prior.dtype).unbind()
        return n_level, n_pair

    @torch.no_grad()
    def _mispair(self, batch: Batch, heads: LossInputs) -> tuple[Tensor | None, Tensor | None]:
        """Return the levels (b, G) chosen by the adversary and a bool mask (b, G) of the counted swaps.

        Both are None for a panel of one gene, and if no loss uses mispairings.
        """
        paat = self.config.loss.paat
        wanted = self.config.loss.pair > 0 or paat.hard_columns
        if batch.n_genes < 2 or not wanted:
            return None, None
        levels = batch.levels_int64
        candidates = self._candidates(batch, levels)
        counted = counted_swaps(levels, candidates, batch.measured, paat.min_level_shift)
        if paat.adversary == "random" or candidates.shape[0] == 1:
            return candidates[0], counted[0]
        logits = torch.stack([self._pair_logits(batch, heads, c) for c in candidates])
        best = choose_hardest(logits, counted)
        rows = torch.arange(best.shape[0], device=best.device)
        return candidates[best, rows], counted[best, rows]

    def _candidates(self, batch: Batch, levels: Tensor) -> Tensor:
        """Draw C mispairings, levels (C, b, G): within strata, from other spots, or per spot either with probability 0.5."""
        paat, panel, section = self.config.loss.paat, batch.panel_int64, batch.section_int64
        purposes = {"strata": ("from", "to"), "spots": ("spot",), "mixed": ("from", "to", "spot")}[paat.mode]
        u, use_stratum = draws.mispairings(
            self.config.train.seed,
            batch.step,
            paat.candidates,
            batch.spot_index,
            panel,
            purposes,
            choose=paat.mode == "mixed",
        )
        if paat.mode == "spots":
            return self._from_other_spots(batch, levels, u["spot"])
        within = permute_within_strata(levels, self.strata[section][:, panel], u["from"], u["to"])
        if use_stratum is None:
            return within
        return torch.where(use_stratum[None, :, None], within, self._from_other_spots(batch, levels, u["spot"]))

    def _from_other_spots(self, batch: Batch, levels: Tensor, u: Tensor) -> Tensor:
        """Draw levels (C, b, G) from other spots of the same section, on any rank."""
        counts, group = self.counts(batch), self.group
        if group.size == 1:
            return take_from_other_spots(levels, batch.section_int64, u)
        # Sections are gathered too: a rank's loader may have replaced spots with damaged records.
        every_level = group.gather_rows(batch.levels, counts)
        every_section = group.gather_rows(batch.section, counts).long()
        own = share_of(sum(counts), group.rank, group.size)
        # The gathered levels stay uint8: as int64 they would take eight times the memory.
        return take_from_other_spots(every_level, every_section, u, own).long()

    def _pair_logits(self, batch: Batch, heads: LossInputs, levels: Tensor, roll: int = 0) -> Tensor:
        """Return the pair-head logits (b, G) of the sentences (gene, level) in the context of each spot.

        ``roll`` shifts the contexts by this number of spots, so that sentences meet the context of another spot.
        """
        table = heads.table
        if self.config.loss.paat.context == "image":
            return pair_scores(_rolled(heads.vector_bD, roll), table.pair_GQD, levels)
        true, measured = _rolled(batch.levels_int64, roll), _rolled(batch.measured, roll)
        weight = pool_weights(table.scores_GQ, true, measured)
        pooled = table_pool(table.unit_GQD, table.scores_GQ, true, measured)
        return pair_scores(
            pooled,
            table.pair_GQD,
            levels,
            true_levels_BG=true,
            projected_GQD=table.unit_GQD,
            weight_BG=weight,
        )

    def _nce(self, batch: Batch, heads: LossInputs, mispaired: Tensor | None, counted: Tensor | None) -> Tensor:
        """Return L_nce; mispaired texts with at least one counted swap are additional negatives."""
        table, levels, measured, section = heads.table, batch.levels_int64, batch.measured, batch.section_int64
        excluded = None
        weight = measured.any(1).to(heads.vector_bD.dtype)
        if mispaired is not None and counted is not None and self.config.loss.paat.hard_columns:
            further, excluded = hard_columns(counted.any(1))
            levels = torch.cat([levels, mispaired[further]])
            measured, section = torch.cat([measured, measured[further]]), torch.cat([section, section[further]])
        # Hashes identify equal texts across ranks without gathering the texts and without a device synchronization.
        text_class = same_text_hash(levels, measured)
        pairs = PairMetadata(text_class, section, weight, self.config.align.negatives, excluded)
        text = table_pool(table.rows_GQD, table.scores_GQ, levels, measured)
        form = self.config.engine.loss_form
        return global_infonce(heads.vector_bD, text, heads.scale_nce, pairs, self.group, self.counts(batch), form)

    def _pair(self, batch: Batch, heads: LossInputs, mispaired: Tensor, counted: Tensor) -> tuple[Tensor, Numbers]:
        """Return L_pair, the mean over this rank's counted swaps, and in logged steps the numbers of the pair head (else empty)."""
        levels = batch.levels_int64
        true, false = self._pair_logits(batch, heads, levels), self._pair_logits(batch, heads, mispaired)
        numbers = {}
        if self.logs(batch.step):
            numbers = diagnostic(
                "the AUC of the pair head",
                lambda: self._pair_numbers(batch, heads, mispaired, counted, true.detach(), false.detach()),
                undefined(PAIR_NUMBERS),
            )
        return pair_loss(true, false, counted), numbers

    @torch.no_grad()
    def _pair_numbers(
        self, batch: Batch, heads: LossInputs, mispaired: Tensor, counted: Tensor, true: Tensor, false: Tensor
    ) -> Numbers:
        """Return the AUC of the pair head, and its gain over contexts of other spots."""
        levels = batch.levels_int64
        true_elsewhere = self._pair_logits(batch, heads, levels, roll=1)
        false_elsewhere = self._pair_logits(batch, heads, mispaired, roll=1)
        auc = pair_auc(true, false, counted)
        # The gain over contexts of other spots is the part of the AUC that frequencies of levels do not explain.
        gain = auc - pair_auc(true_elsewhere, false_elsewhere, counted)
        return dict(zip(PAIR_NUMBERS, (auc, gain), strict=True))


def _rolled(x: Tensor, by: int) -> Tensor:
    """Return ``x`` with its rows shifted by ``by``; ``x`` itself, not a copy, for 0."""
    return x.roll(by, 0) if by else x


def hard_columns(use: Tensor) -> tuple[Tensor | slice, Tensor | None]:
    """Choose the mispaired texts that become additional columns (negatives) of InfoNCE.

    Parameters
    ----------
    use
        bool (b,): spots whose mispaired text has a counted swap.

    Returns
    -------
    tuple
        Index of the spots whose mispaired texts become columns, and a bool mask (2b,) of the columns to exclude, False for the
        b true texts. On a CPU, only texts with a counted swap become columns, and the mask is None. On other devices, where
        shapes must not depend on data, all texts become columns and those without a counted swap are excluded.
    """
    if devices.reads_are_free(use.device):
        return use, None
    return slice(None), torch.cat([torch.zeros_like(use), ~use])
