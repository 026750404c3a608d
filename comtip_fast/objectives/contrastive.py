"""The alignment loss over the global batch, exact, with each logit computed once on one rank.

The images' features move, the texts stay where they are: rank w holds its b_w images and its m_w >= b_w text columns (the
first b_w true, the rest mispaired), and works out the block [all B images, its m_w columns]. So traffic does not grow with
mispaired columns. Two forms, equal up to rounding (D is the width, per rank, in numbers, W ranks):

``gather``  all images gathered (B D), their gradients reduce-scattered (B D), and a few numbers per image;
``ring``    blocks of images travel round the ring while the block before is worked on, in the backward pass with their
            gradients: three times (B D) instead of two, but only B/W images in memory.

Each rank returns its share of the loss and the gradient of the sum of shares, see :mod:`comtip_fast.collectives`; its
backward takes for granted that all ranks scale their share alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comtip_kernels import infonce
from comtip_kernels.infonce.blocks import BlockIds, block_gradients, block_lse
from torch import Tensor
from torch.nn import functional as F

from comtip_fast.collectives import Group

_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def same_text_hash(levels_XG: Tensor, measured_XG: Tensor) -> Tensor:
    """Give equal 64-bit integers to rows whose measured genes and levels are all equal; (X,) int64.

    Two spots with the same text are not each other's negatives. Each row by itself, so that other ranks' need not be seen.
    Among 10^10 pairs of different texts, two get the same hash with a chance of 1 in 10^9.
    """
    # SplitMix64's finaliser over (place of the gene, level), summed; all of it wraps modulo 2^64, as meant.
    place_G = torch.arange(1, levels_XG.shape[1] + 1, device=levels_XG.device)
    word_XG = place_G * 512 + torch.where(measured_XG, levels_XG.long() + 1, 0)
    return _mixed(word_XG).sum(1)


def _mixed(word: Tensor) -> Tensor:
    z = word * _MIX[0]
    z = (z ^ _shifted(z, 30)) * _MIX[1]
    z = (z ^ _shifted(z, 27)) * _MIX[2]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, n: int) -> Tensor:
    """Shift right without the sign."""
    return (z >> n) & ((1 << (64 - n)) - 1)


@dataclass
class PairMetadata:
    """What says who is whose negative: the rank's own images first, then its further texts, in this order everywhere."""

    text_class_m: Tensor
    """int64: equal ones are the same text; the first b are the images' own."""
    section_m: Tensor
    """Integers that ``negatives`` compares."""
    weight_b: Tensor
    """0 takes a spot out, also as a negative; travels as fp32."""
    negatives: str = "all"


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
        This rank's images and texts, any length.
    scale
        Inverse temperature, a scalar.
    pairs
        Classes, groups and weights of this rank.
    group
        The ranks.
    counts
        b of every rank.
    form
        ``gather`` or ``ring``.

    Raises
    ------
    ValueError
        Unknown form, fewer texts than images, or counts that do not fit.
    """
    b = image_bD.shape[0]
    if form not in _FORMS:
        raise ValueError(f"loss form {form!r}: choose one of {', '.join(_FORMS)}")
    if text_mD.shape[0] < b or counts[group.rank] != b:
        raise ValueError(f"global_infonce: {b} images, {text_mD.shape[0]} texts, counts {list(counts)}")
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
        )
    # Logits up to 100 cannot be kept in bf16: vectors come to full precision here, whatever autocast says.
    with torch.autocast(image_bD.device.type, enabled=False):
        wide = torch.promote_types(image_bD.dtype, torch.float32)
        x, y = (F.normalize(v.to(wide), dim=-1) for v in (image_bD, text_mD))
        total = group.sum(pairs.weight_b.detach().to(wide).sum()).clamp_min(1e-12)
        run = _Run(group, list(counts), _RowMetadata.gather_row_metadata(pairs, group, counts), pairs, total)
        return _GlobalInfoNCE.apply(x, y, scale.to(wide), run, form)


@dataclass
class _RowMetadata:
    """Integers and weights of all B images, on every rank: 16 bytes each."""

    text_class: Tensor
    section: Tensor
    weight: Tensor

    @classmethod
    def gather_row_metadata(cls, pairs: PairMetadata, group: Group, counts: Sequence[int]) -> _RowMetadata:
        b = pairs.weight_b.shape[0]
        small = torch.stack([pairs.section_m[:b].int(), pairs.weight_b.detach().float().view(torch.int32)], dim=1)
        packed = torch.cat([pairs.text_class_m[:b].contiguous().view(torch.int32).view(b, 2), small], dim=1)
        found = group.gather_rows(packed, counts)
        text_class = found[:, :2].contiguous().view(torch.int64).squeeze(1)
        return cls(text_class, found[:, 2], found[:, 3].contiguous().view(torch.float32))


@dataclass
class _Run:
    """All that one call knows besides its vectors."""

    group: Group
    counts: list[int]
    everyone: _RowMetadata
    pairs: PairMetadata
    total: Tensor
    """Sum of all weights."""

    def rows(self, owner: int) -> slice:
        """Return which of the B images are ``owner``'s."""
        start = sum(self.counts[:owner])
        return slice(start, start + self.counts[owner])

    def ids(self, rows: slice) -> BlockIds:
        """Say who is whose negative in the block [rows, own columns]."""
        e, p = self.everyone, self.pairs
        excluded = p.weight_b == 0
        more = excluded.new_zeros(p.text_class_m.shape[0] - excluded.shape[0])
        return BlockIds(
            p.negatives,
            e.section[rows],
            p.section_m,
            e.text_class[rows],
            p.text_class_m,
            e.weight[rows] == 0,
            torch.cat([excluded, more]),
        )

    def half(self, like: Tensor) -> Tensor:
        """Return every image's weight in one direction of the loss (B,)."""
        return self.everyone.weight.to(like.dtype) / (2 * self.total)


class _GlobalInfoNCE(torch.autograd.Function):
    """Unit vectors in, this rank's share of the loss out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, run: _Run, form: str) -> Tensor:
        # The scale stays where it is, as everything does: reading a number would make the host wait for the GPU.
        s, own, b = scale.detach(), run.rows(run.group.rank), x.shape[0]
        all_x, row_lse, column_lse = _FORMS[form][0](x, y, s, run)
        positive = s * torch.linalg.vecdot(x, y[:b])
        # The negatives' sums are whole now; a rank has both vectors of its own positives.
        row_lse = torch.logaddexp(row_lse, positive)
        column_lse = torch.logaddexp(column_lse[:b], positive)
        ctx.save_for_backward(x if all_x is None else all_x, y, s, row_lse, column_lse)
        ctx.run, ctx.form = run, form
        half = run.half(x)[own]
        return (half * (row_lse + column_lse - 2 * positive)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        held, y, s, row_lse, column_lse = ctx.saved_tensors
        run: _Run = ctx.run
        own = run.rows(run.group.rank)
        x = held[own] if ctx.form == "gather" else held
        b = x.shape[0]
        half = run.half(x)[own]
        more = (0, y.shape[0] - b)
        columns = F.pad(half, more), F.pad(column_lse, more)
        dx, dy = _FORMS[ctx.form][1](held, y, s, run, row_lse, columns)
        positive = s * torch.linalg.vecdot(x, y[:b])
        at_positive = (half * ((positive - row_lse).exp() + (positive - column_lse).exp() - 2))[:, None]
        dx, dy[:b] = dx + at_positive * y[:b], dy[:b] + at_positive * x
        # Every logit is linear in x and in the scale; the shares of all ranks add up to the scale's gradient.
        dscale = torch.linalg.vecdot(x, dx).sum() * grads[0]
        factor = s * grads[0]
        return dx * factor, dy * factor, dscale, None, None


Columns = tuple[Tensor, Tensor]


def _gather_forward(x: Tensor, y: Tensor, s: Tensor, run: _Run) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return all images, and the log-sum-exp over negatives of the own images and of the own columns."""
    all_x = run.group.gather_rows(x, run.counts)
    row, column = block_lse(all_x, y, s, run.ids(slice(None)))
    top = run.group.max(row).clamp_min(-1e30)  # a row without negatives has -inf everywhere, which must not make NaN
    row = run.group.scatter_rows((row - top).exp(), run.counts).log() + top[run.rows(run.group.rank)]
    return all_x, row, column


def _gather_backward(
    all_x: Tensor, y: Tensor, s: Tensor, run: _Run, row_lse: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Return the gradients of own images and columns, negatives only."""
    rows = run.group.gather_rows(row_lse, run.counts)
    dx, dy = block_gradients(all_x, y, s, run.ids(slice(None)), run.half(all_x), rows, *columns)
    return run.group.scatter_rows(dx, run.counts), dy


def _ring_forward(x: Tensor, y: Tensor, s: Tensor, run: _Run) -> tuple[Tensor | None, Tensor, Tensor]:
    """As :func:`_gather_forward`; images come by, and their running statistics follow one step behind them."""
    column = y.new_full((y.shape[0],), -torch.inf)

    def work(block: Tensor, owner: int) -> Tensor:
        nonlocal column
        row, more = block_lse(block, y, s, run.ids(run.rows(owner)))
        column = torch.logaddexp(column, more)
        return row

    row = _round_the_ring(x, run, work, torch.logaddexp)
    return None, row, column


def _ring_backward(
    x: Tensor, y: Tensor, s: Tensor, run: _Run, row_lse: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """As :func:`_gather_backward`; images come by once more, and their gradients follow them."""
    dy, half = torch.zeros_like(y), run.half(x)

    def work(block: Tensor, owner: int) -> Tensor:
        rows = run.rows(owner)
        dx, more = block_gradients(block[:, :-1], y, s, run.ids(rows), half[rows], block[:, -1], *columns)
        dy.add_(more)
        return dx

    return _round_the_ring(torch.cat([x, row_lse[:, None]], dim=1), run, work, torch.add), dy


def _round_the_ring(
    own: Tensor, run: _Run, work: Callable[[Tensor, int], Tensor], join: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Send every rank's block past every other rank; return what all ranks made of the own block, joined.

    At step k a rank works on the block of rank - k, while the next block is on its way. What is made of a block is
    joined from its second station on, follows it one step behind, also while there is work, and comes home with the
    last step, where the owner joins its own part: W - 1 messages of each kind in all.
    """
    group, W = run.group, run.group.size
    block, mine, carried, arrive = own, own, own, _nothing
    for step in range(W):
        owner = (group.rank - step) % W
        before = run.counts[(owner - 1) % W]
        wait, incoming = _nothing, block
        if step + 1 < W:
            incoming = own.new_empty(before, *own.shape[1:])
            wait = group.ring_shift([block], [incoming])
        made = work(block, owner)
        if step == 0:
            mine = made
        else:
            arrive()
            made = (made if step == 1 else join(carried, made)).contiguous()
            carried = made.new_empty(before, *made.shape[1:])
            arrive = group.ring_shift([made], [carried])
        wait()
        block = incoming
    arrive()
    return join(carried, mine)


def _nothing() -> None:
    """Wait for nothing."""


_FORMS = {"gather": (_gather_forward, _gather_backward), "ring": (_ring_forward, _ring_backward)}
