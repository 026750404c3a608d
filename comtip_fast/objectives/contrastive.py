"""Exact InfoNCE over the global batch; each logit is computed once, on one rank.

Image vectors are communicated, text vectors are not: rank w has b_w images and m_w >= b_w text columns (the first b_w
are true, the others mispaired) and computes the block [all B images, its m_w columns]. Communication is therefore
independent of the number of mispaired columns. There are two forms, equal up to rounding. Volumes are elements sent per
rank, for vectors of width D:

``gather``  All-gather the images (B D), reduce-scatter their gradients (B D), and exchange a few numbers per image.
``ring``    Pass blocks of images round a ring of W ranks, overlapped with the computation on the previous block; the backward
            pass also passes their gradients. It sends 3 B D instead of 2 B D, but holds only a few blocks of
            B / W images in memory.

Each rank returns its share of the loss and the gradient of the sum of shares, see :mod:`comtip_fast.collectives`. The
backward pass assumes that all ranks scale their share by the same factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comtip_kernels import infonce
from comtip_kernels.infonce import unit_vectors
from comtip_kernels.infonce.blocks import BlockIds, block_gradients, block_lse
from comtip_kernels.tl_common import operand_dtype
from torch import Tensor
from torch.nn import functional as F

from comtip_fast.collectives import Group

_SPLITMIX64 = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Increment and multipliers of the SplitMix64 generator, as signed integers."""


def same_text_hash(levels_XG: Tensor, measured_XG: Tensor) -> Tensor:
    """Return a hash of each spot's text, int64 (X,): spots with the same measured genes at the same levels have equal hashes.

    Two spots with the same text are not negatives of each other. The hash of a row does not depend on other rows, so
    ranks compute it without communication. Among 10^10 pairs of different texts, the probability of a collision is below 10^-9.

    Parameters
    ----------
    levels_XG, measured_XG
        Level of each gene of the panel in X spots, integers, and whether the gene is measured, bool.
    """
    # The sum over genes of SplitMix64(gene index, level); arithmetic wraps modulo 2^64.
    index_G = torch.arange(1, levels_XG.shape[1] + 1, device=levels_XG.device)
    word_XG = index_G * 512 + (levels_XG.long() + 1).masked_fill(~measured_XG, 0)
    return _splitmix64(word_XG).sum(1)


def _splitmix64(word: Tensor) -> Tensor:
    """Return the SplitMix64 hash of each integer, int64."""
    z = word * _SPLITMIX64[0]
    z = (z ^ _logical_shift(z, 30)) * _SPLITMIX64[1]
    z = (z ^ _logical_shift(z, 27)) * _SPLITMIX64[2]
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, n: int) -> Tensor:
    """Shift right by ``n`` bits without sign extension."""
    return (z >> n) & ((1 << (64 - n)) - 1)


@dataclass
class PairMetadata:
    """Metadata that define which pairs are negatives. The m columns are the texts of the rank's b images, then mispaired texts."""

    text_class_m: Tensor
    """int64 (m,); columns of equal class have the same text and are not negatives of each other."""
    section_m: Tensor
    """Integer section of each column, which ``negatives`` compares."""
    weight_b: Tensor
    """Weight of each spot (b,); 0 excludes the spot, also as a negative of others. Sent to other ranks in fp32."""
    negatives: str = "all"
    """``align.negatives`` of the config."""
    excluded_m: Tensor | None = None
    """bool (m,): True excludes a mispaired text as a negative; False for the first b columns. None excludes no text."""


def global_infonce(
    image_bD: Tensor,
    text_mD: Tensor,
    scale: Tensor,
    pairs: PairMetadata,
    group: Group,
    counts: Sequence[int],
    form: str = "gather",
) -> Tensor:
    """Return this rank's share of the symmetric InfoNCE of the global batch (:func:`comtip_kernels.infonce`).

    Parameters
    ----------
    image_bD, text_mD
        Vectors of this rank's images (b, D) and texts (m, D), not normalised.
    scale
        Inverse temperature, a scalar.
    pairs
        Text classes, sections and weights of this rank.
    group
        Ranks of the run.
    counts
        Number of images of each rank, in the order of ranks.
    form
        ``gather`` or ``ring``, see the module docstring.

    Raises
    ------
    ValueError
        ``form`` is neither ``gather`` nor ``ring``; there are fewer texts than images; or the entry of this rank in ``counts`` is
        not its number of images.
    """
    b = image_bD.shape[0]
    if form not in _FORMS:
        raise ValueError(f"global_infonce: form={form!r}: choose one of {', '.join(_FORMS)}")
    if text_mD.shape[0] < b or counts[group.rank] != b:
        raise ValueError(
            f"global_infonce: rank {group.rank} has {b} images, but {text_mD.shape[0]} texts and counts {list(counts)}; give at least "
            f"one text per image, and the number of images of every rank in counts ({b} at index {group.rank})"
        )
    if group.size == 1:
        return infonce(
            image_bD,
            text_mD,
            scale,
            negatives=pairs.negatives,
            group_rows=pairs.section_m[:b],
            group_columns=pairs.section_m,
            class_rows=pairs.text_class_m[:b],
            class_columns=pairs.text_class_m,
            weight_B=pairs.weight_b,
            excluded_further=None if pairs.excluded_m is None else pairs.excluded_m[b:],
        )
    # The kernels multiply bf16 operands under bf16 autocast, as on a single rank. Everything else runs in fp32: bf16 is
    # not precise enough for logits up to 100.
    dtype = operand_dtype(image_bD, text_mD)
    with torch.autocast(image_bD.device.type, enabled=False):
        x, y = unit_vectors(image_bD, text_mD, dtype=dtype)
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
        total = group.sum(pairs.weight_b.detach().to(wide).sum()).clamp_min(1e-12)
        metadata = _RowMetadata.gather(pairs, group, counts)
        context = _LossContext(group, list(counts), metadata, pairs, total, dtype)
        return _GlobalInfoNCE.apply(x, y, scale.to(wide), context, form)


@dataclass
class _RowMetadata:
    """Text class, section and weight of all B images, gathered to every rank: 16 bytes per image."""

    text_class: Tensor
    section: Tensor
    weight: Tensor

    @classmethod
    def gather(cls, pairs: PairMetadata, group: Group, counts: Sequence[int]) -> _RowMetadata:
        """All-gather the metadata of each rank's images in one message."""
        b = pairs.weight_b.shape[0]
        small = torch.stack([pairs.section_m[:b].int(), pairs.weight_b.detach().float().view(torch.int32)], dim=1)
        packed = torch.cat([pairs.text_class_m[:b].contiguous().view(torch.int32).view(b, 2), small], dim=1)
        gathered = group.gather_rows(packed, counts)
        text_class = gathered[:, :2].contiguous().view(torch.int64).squeeze(1)
        return cls(text_class, gathered[:, 2], gathered[:, 3].contiguous().view(torch.float32))


@dataclass
class _LossContext:
    """Inputs of the loss other than the vectors and the scale."""

    group: Group
    counts: list[int]
    row_metadata: _RowMetadata
    pairs: PairMetadata
    total: Tensor
    """Sum of the weights over the global batch."""
    dtype: torch.dtype
    """Dtype of the operands that the kernels multiply; vectors are rounded to it."""

    def rows(self, owner: int) -> slice:
        """Return the slice of the B images that belongs to rank ``owner``."""
        start = sum(self.counts[:owner])
        return slice(start, start + self.counts[owner])

    def ids(self, rows: slice) -> BlockIds:
        """Return the ids that define which pairs of the block [rows, own columns] are negatives."""
        r, p = self.row_metadata, self.pairs
        excluded = p.weight_b == 0
        b, m = excluded.shape[0], p.text_class_m.shape[0]
        mispaired = excluded.new_zeros(m - b) if p.excluded_m is None else p.excluded_m[b:]
        return BlockIds(
            p.negatives,
            r.section[rows],
            p.section_m,
            r.text_class[rows],
            p.text_class_m,
            r.weight[rows] == 0,
            torch.cat([excluded, mispaired]),
        )

    def row_weight(self, like: Tensor) -> Tensor:
        """Return each image's weight in one of the two directions of the loss, (B,)."""
        return self.row_metadata.weight.to(like.dtype) / (2 * self.total)


class _GlobalInfoNCE(torch.autograd.Function):
    """Maps unit vectors to this rank's share of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, context: _LossContext, form: str) -> Tensor:
        # Nothing is read on the host, not even the scale, because that would synchronise with the GPU.
        s, own, b = scale.detach(), context.rows(context.group.rank), x.shape[0]
        all_x, row_lse, column_lse = _FORMS[form][0](x, y, s, context)
        positive = s * torch.linalg.vecdot(x, y[:b])
        # The log-sum-exps cover all negatives; each rank adds its own positives.
        row_lse = torch.logaddexp(row_lse, positive)
        column_lse = torch.logaddexp(column_lse[:b], positive)
        ctx.save_for_backward(x if all_x is None else all_x, y, s, row_lse, column_lse)
        ctx.context, ctx.form = context, form
        weight = context.row_weight(x)[own]
        return (weight * (row_lse + column_lse - 2 * positive)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved_x, y, s, row_lse, column_lse = ctx.saved_tensors
        context: _LossContext = ctx.context
        own = context.rows(context.group.rank)
        x = saved_x[own] if ctx.form == "gather" else saved_x
        b = x.shape[0]
        weight = context.row_weight(x)[own]
        padding = (0, y.shape[0] - b)
        columns = F.pad(weight, padding), F.pad(column_lse, padding)
        dx, dy = _FORMS[ctx.form][1](saved_x, y, s, context, row_lse, columns)
        positive = s * torch.linalg.vecdot(x, y[:b])
        dpositive = (weight * ((positive - row_lse).exp() + (positive - column_lse).exp() - 2))[:, None]
        dx, dy[:b] = dx + dpositive * y[:b], dy[:b] + dpositive * x
        # Every logit is linear in x and in the scale; the scale's gradient is the sum over ranks of these shares.
        dscale = torch.linalg.vecdot(x, dx).sum() * grads[0]
        factor = s * grads[0]
        return dx * factor, dy * factor, dscale, None, None


Columns = tuple[Tensor, Tensor]
"""Weight and log-sum-exp of each of the rank's m columns; both are 0 for mispaired texts."""


def _gather_forward(x: Tensor, y: Tensor, s: Tensor, context: _LossContext) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return all images, and the log-sum-exp over negatives for each of this rank's images and columns."""
    all_x = context.group.gather_rows(x, context.counts)
    row, column = block_lse(all_x, y, s, context.ids(slice(None)), dtype=context.dtype)
    top = context.group.max(row).clamp_min(-1e30)  # a row without negatives is -inf on all ranks: avoid inf - inf
    row = context.group.scatter_rows((row - top).exp(), context.counts).log() + top[context.rows(context.group.rank)]
    return all_x, row, column


def _gather_backward(
    all_x: Tensor, y: Tensor, s: Tensor, context: _LossContext, row_lse: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Return the part of the gradients of this rank's images and columns that comes from negatives."""
    rows = context.group.gather_rows(row_lse, context.counts)
    weight, ids = context.row_weight(all_x), context.ids(slice(None))
    dx, dy = block_gradients(all_x, y, s, ids, weight, rows, *columns, dtype=context.dtype)
    return context.group.scatter_rows(dx, context.counts), dy


def _ring_forward(x: Tensor, y: Tensor, s: Tensor, context: _LossContext) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the results of :func:`_gather_forward`, but None instead of all images; image blocks are passed round the ring."""
    column = y.new_full((y.shape[0],), -torch.inf)

    def block_forward(block: Tensor, owner: int) -> Tensor:
        nonlocal column
        row, block_column = block_lse(block, y, s, context.ids(context.rows(owner)), dtype=context.dtype)
        column = torch.logaddexp(column, block_column)
        return row

    row = _ring_reduce(x, context, block_forward, torch.logaddexp)
    return None, row, column


def _ring_backward(
    x: Tensor, y: Tensor, s: Tensor, context: _LossContext, row_lse: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Return the results of :func:`_gather_backward`; image blocks and their gradients are passed round the ring."""
    dy, weight = torch.zeros_like(y), context.row_weight(x)

    def block_backward(block: Tensor, owner: int) -> Tensor:
        rows, vectors, row_lse = context.rows(owner), block[:, :-1], block[:, -1]
        dx, block_dy = block_gradients(
            vectors, y, s, context.ids(rows), weight[rows], row_lse, *columns, dtype=context.dtype
        )
        dy.add_(block_dy)
        return dx

    return _ring_reduce(torch.cat([x, row_lse[:, None]], dim=1), context, block_backward, torch.add), dy


def _ring_reduce(
    own: Tensor,
    context: _LossContext,
    compute: Callable[[Tensor, int], Tensor],
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Apply ``compute`` to this rank's block on every rank and return the reduced result.

    Blocks are passed round the ring. At step k, a rank computes on the block of rank - k while it receives the next block. The
    partial result of a block follows one step later and is reduced on every rank. In the last step it reaches the block's owner,
    which adds its own result. Each rank sends W - 1 blocks and W - 1 partial results.
    """
    group, W = context.group, context.group.size
    block, own_result, partial, wait_partial = own, own, own, _no_wait
    for step in range(W):
        owner = (group.rank - step) % W
        incoming_rows = context.counts[(owner - 1) % W]
        wait_block, incoming = _no_wait, block
        if step + 1 < W:
            incoming = own.new_empty(incoming_rows, *own.shape[1:])
            wait_block = group.ring_shift([block], [incoming])
        result = compute(block, owner)
        if step == 0:
            own_result = result
        else:
            wait_partial()
            result = (result if step == 1 else reduce(partial, result)).contiguous()
            partial = result.new_empty(incoming_rows, *result.shape[1:])
            wait_partial = group.ring_shift([result], [partial])
        wait_block()
        block = incoming
    wait_partial()
    return reduce(partial, own_result)


def _no_wait() -> None:
    """Do nothing: no transfer is in progress."""


_FORMS = {"gather": (_gather_forward, _gather_backward), "ring": (_ring_forward, _ring_backward)}
