"""Gene-sentence encoder and sentence table.

The sentence "gene g at level q" is ``[GENE] name tokens ... [VALUE]``; its vector h(g, q) is the output at ``[GENE]``.
Tokens attend to tokens of their own sentence only. All sentences are encoded in parallel, packed without padding between them.

Shapes: N sentences of at most T tokens, S tokens in total, G genes drawn for the step (the panel), Q levels, d the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from comtip_kernels import (
    Impl,
    SentencePlan,
    SentenceSizes,
    copy_sentence_rows,
    first_tokens,
    gene_sentence_embedding,
    one_query_attention,
    operand_dtype,
    packed_attention_qkv,
    plan_panel,
    plan_sentences,
    sentence_start,
)
from comtip_kernels.one_query_attention import LONGEST, MOST_HEADS
from comtip_kernels.packed_attention import Attention, adds_bias
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.config.schema import TextConfig
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models.fused_blocks import Stream, after_attention, arguments, keep_biases, normed
from comtip_fast.models.recompute import run_block, run_recomputed
from comtip_fast.runtime import devices, torch_internals


class QKV(nn.Linear):
    """Projection to queries, keys and values, (3 d, d): of every token, or around attention with one query per sentence."""

    CASTS_TOGETHER = True
    """Read by :func:`comtip_fast.runtime.weight_casts.linear_parameters`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(
        self, x_Sd: Tensor, attend: Callable[..., Tensor] | None = None, first_Nd: Tensor | None = None
    ) -> Tensor:
        """Return queries, keys and values (S, 3 d) of S tokens or, with ``attend``, the attended values (N, d) of N tokens.

        The second form is part of this module, because engines make weights available when their module is called (ZeRO 3).

        Parameters
        ----------
        x_Sd
            Tokens.
        attend
            :func:`comtip_kernels.one_query_attention` with its lengths: a function of queries (N, H, d), tokens and ``scale``.
        first_Nd
            The N tokens with a query, one per sentence.
        """
        if attend is None or first_Nd is None:
            return super().forward(x_Sd)
        H, d = self.heads, x_Sd.shape[1]
        query_dd, key_dd, value_dd = self.weight.split(d)
        query_d, _, value_d = self.bias.split(d)
        q_Nd = F.linear(first_Nd, query_dd, query_d)
        # Heads are a batch of products: (H, N, E) times the head's rows (E, d) of the keys' projection.
        query_HNd = q_Nd.unflatten(1, (H, -1)).transpose(0, 1) @ key_dd.unflatten(0, (H, -1))
        mean_NHd = attend(query_HNd.transpose(0, 1), x_Sd, scale=(d // H) ** -0.5)
        value_HdE = value_dd.unflatten(0, (H, -1)).mT
        attended_HNE = torch.baddbmm(value_d.view(H, 1, -1), mean_NHd.transpose(0, 1), value_HdE)
        return attended_HNE.transpose(0, 1).flatten(1)


class SentenceBlock(nn.Module):
    """Pre-norm transformer block over packed sentences, without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention: Attention = "auto"
        self.fused = False
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = QKV(width, heads), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x_Sd: Tensor,
        length_M: Tensor,
        longest: int,
        first_N: Tensor | None = None,
        first_M: Tensor | None = None,
        first_S: Tensor | None = None,
        qkv_SC: Tensor | None = None,
        branch_Sd: Tensor | None = None,
        bias_d: Tensor | None = None,
    ) -> Tensor | Stream:
        """Return the output of the block, (S, d), or only its rows at the ``[GENE]`` tokens, (N, d).

        A fused block (:mod:`.fused_blocks`) returns it as a :class:`.fused_blocks.Stream`.

        Parameters
        ----------
        x_Sd
            Input of the S tokens.
        length_M, longest
            Number of tokens of each sentence, and an upper bound of these numbers.
        first_N
            Indices of the ``[GENE]`` tokens of the first N sentences, to compute only their rows; None computes all rows. Keys and
            values of all tokens are then not computed, if :meth:`one_query` is true.
        first_M
            Indices of the ``[GENE]`` tokens of all sentences, which attention for ``first_N`` needs on a GPU.
        first_S
            For each token, the index of the ``[GENE]`` token of its sentence, which attention for all tokens needs on a GPU.
        qkv_SC
            Result of :meth:`project` for the S tokens, (S, 3 d); None computes it.
        branch_Sd, bias_d
            The other fields of the stream that a fused block takes.
        """
        S, d = x_Sd.shape
        normed_Sd: Tensor | None = None
        if branch_Sd is not None and bias_d is not None:
            x_Sd, normed_Sd = normed(Stream(x_Sd, branch_Sd, bias_d), self.norm_attention)
        if first_N is not None and qkv_SC is None and self.one_query(longest):
            impl: Impl = "triton" if self.attention == "triton" else "auto"
            attend = partial(one_query_attention, length_M=length_M, longest=longest, first_M=first_M, impl=impl)
            first_Nd = x_Sd[first_N]
            # A second norm of N rows costs less than the gradient of selecting rows of the first one's result.
            every_Sd = self.norm_attention(x_Sd) if normed_Sd is None else normed_Sd
            attended = self.qkv(every_Sd, attend, self.norm_attention(first_Nd))
            x_Sd = first_Nd
        else:
            if qkv_SC is None:
                qkv_SC = self.project(x_Sd, longest, normed_Sd)
            qkv_S3HE = qkv_SC.view(S, 3, self.heads, d // self.heads)
            bias_C = self.qkv.bias if self._bias_is_added_later(qkv_SC, longest) else None
            attended = packed_attention_qkv(
                qkv_S3HE, length_M, longest=longest, first_S=first_S, bias_C=bias_C, impl=self.attention
            ).reshape(S, d)
            if first_N is not None:
                x_Sd, attended = x_Sd[first_N], attended[first_N]
        if self.fused:
            up, _, down = self.mlp
            return after_attention(x_Sd, [attended], (self.out, self.norm_mlp, up, down))  # type: ignore[arg-type]
        x_Sd = x_Sd + self.out(attended)
        return x_Sd + self.mlp(self.norm_mlp(x_Sd))

    def one_query(self, longest: int) -> bool:
        """Return whether the rows at the ``[GENE]`` tokens alone are computed by attention with one query per sentence.

        If ``text.attention`` names another package's kernel, that kernel computes attention in every block.
        """
        return self.attention in ("auto", "triton") and longest <= LONGEST and self.heads <= MOST_HEADS

    def project(self, x_Rd: Tensor, longest: int, normed_Rd: Tensor | None = None) -> Tensor:
        """Return queries, keys and values (R, 3 d) of any rows of sentences of up to ``longest`` tokens.

        ``normed_Rd`` is their norm, if it is known. A fused block leaves out the bias if attention adds it.
        """
        if normed_Rd is None:
            normed_Rd = self.norm_attention(x_Rd)
        later = self._bias_is_added_later(normed_Rd, longest)
        qkv_RC: Tensor = F.linear(normed_Rd, self.qkv.weight) if later else self.qkv(normed_Rd)
        return qkv_RC

    def _bias_is_added_later(self, rows: Tensor, longest: int) -> bool:
        """Return whether attention adds the bias of q, k and v, which costs less than the sum of its gradient by PyTorch."""
        return self.fused and adds_bias(rows.device, operand_dtype(rows), longest, impl=self.attention)


class GeneEncoder(nn.Module):
    """Encodes gene sentences; :meth:`forward` encodes all (gene, level) pairs of a panel.

    Parameters
    ----------
    config
        Settings of the encoder (``text``).
    n_levels, vocab_size, n_identities, longest, vector_dim
        Sizes, see :class:`comtip_fast.models.comtip.ModelSizes`.
    """

    def __init__(
        self,
        config: TextConfig,
        n_levels: int,
        vocab_size: int,
        n_identities: int,
        longest: int,
        vector_dim: int = 0,
    ) -> None:
        super().__init__()
        d = config.width
        self.n_levels, self.longest = n_levels, longest
        self.token_Vd = nn.Parameter(torch.randn(vocab_size, d) * 0.05)
        self.type_3d = nn.Parameter(torch.randn(3, d) * 0.02)
        self.position_Td = nn.Parameter(torch.randn(longest, d) * 0.02)
        # Levels are ordered, so adjacent levels are initialised to similar vectors (a line plus noise).
        ramp = torch.linspace(-1, 1, n_levels)[:, None] * torch.randn(1, d) * 0.5
        self.level_Qd = nn.Parameter(ramp + torch.randn(n_levels, d) * 0.1)
        self.identity_Id = nn.Parameter(torch.randn(n_identities + 1, d) * 0.05) if config.identity else None
        self.norm_in, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.blocks = nn.ModuleList(SentenceBlock(d, config.heads) for _ in range(config.depth))
        self.recompute = False
        self.project_vector: nn.Linear | None = None
        if vector_dim:
            # Without a bias, a vector of zeros adds nothing, as for a gene that has a name only.
            self.project_vector = nn.Linear(vector_dim, d, bias=False)
            self.vector_scale: Tensor
            self.register_buffer("vector_scale", torch.ones(1))

    def set_attention(self, name: Attention) -> None:
        """Select the implementation of attention in every block; the initial value is ``auto``."""
        for block in self.blocks:
            assert isinstance(block, SentenceBlock)
            block.attention = name

    def fuse(self) -> None:
        """Let every block compute the work between its products by few kernels (:mod:`.fused_blocks`)."""
        for block in self.blocks:
            assert isinstance(block, SentenceBlock)
            block.fused = True
            keep_biases(block.qkv, block.out, block.mlp[0], block.mlp[2])

    @property
    def fused(self) -> bool:
        """Whether the blocks are fused."""
        return all(isinstance(block, SentenceBlock) and block.fused for block in self.blocks)

    def forward(self, genes: GeneTokens, sentences: slice | None = None, counts: Sequence[int] | None = None) -> Tensor:
        """Return rows (N, d) of the sentence table h(g, q), in gene-major order.

        Parameters
        ----------
        genes
            Tokens of the G genes.
        sentences
            Slice of the G * Q rows; None returns all rows.
        counts
            Number of rows of every rank, from which padded sizes are computed; None if one rank has all rows.
        """
        G, Q, device = genes.length_G.shape[0], self.n_levels, genes.ids_GT.device
        first, stop, _ = (sentences or slice(None)).indices(G * Q)
        index_N = torch.arange(first, stop, device=device)
        gene_N = index_N // Q
        if genes.host is None or devices.reads_are_free(device):
            return self.encode(genes.rows(gene_N), index_N % Q)
        V, own, added = self.token_Vd.shape[0], slice(first, stop), 0
        if genes.host.padded is None:
            sizes = genes.host.sizes(Q, V, own)
        else:
            sizes, added = genes.host.padded_sizes(Q, V, own, [G * Q] if counts is None else counts)
        return self.encode(genes.rows(gene_N), index_N % Q, panel=(gene_N - first // Q, sizes), added=added)

    def encode(
        self,
        genes: GeneTokens,
        level_lo_N: Tensor,
        level_hi_N: Tensor | None = None,
        mix_N: Tensor | None = None,
        *,
        panel: tuple[Tensor, SentenceSizes] | None = None,
        added: int = 0,
    ) -> Tensor:
        """Encode N sentences to vectors (N, d).

        Parameters
        ----------
        genes
            Tokens of each sentence.
        level_lo_N, level_hi_N, mix_N
            Level of each sentence, int64. If ``level_hi_N`` and ``mix_N`` are given, the embeddings of both levels are interpolated
            linearly; ``mix_N``, in [0, 1], is the weight of ``level_hi_N``.
        panel
            Gene of each sentence, int64 (N,), and sizes in host memory, with which no size is read from the device.
        added
            Number of sentences to add, so that the number of tokens is that of ``panel``; their vectors are not returned.
        """
        # Sentences are sorted by length once, so that attention processes equal lengths together in every layer without
        # moving data.
        length_N, order_N = torch.sort(genes.length_G, stable=True)
        back_N = torch.argsort(order_N)
        if panel is not None and added:
            length_N, order_N = _with_padding(length_N, order_N, panel[1].tokens, added, genes.ids_GT.shape[1])
        genes = genes.rows(order_N)
        level_lo_N = level_lo_N[order_N]
        level_hi_N, mix_N = (None if x is None else x[order_N] for x in (level_hi_N, mix_N))
        plan = self._plan(
            genes, length_N, level_lo_N, mix_N is not None, None if panel is None else (panel[0][order_N], panel[1])
        )
        rows_Ud = gene_sentence_embedding(
            genes.ids_GT,
            length_N,
            level_lo_N,
            self.token_Vd,
            self.type_3d,
            self.position_Td,
            self.level_Qd,
            level_hi_N=level_hi_N,
            mix_N=mix_N,
            identity_N=genes.identity_G,
            identity_ID=self.identity_Id,
            gain_D=self.norm_in.weight,
            bias_D=self.norm_in.bias,
            eps=self.norm_in.eps,
            plan=plan,
            distinct=True,
        )
        longest, first_M = genes.ids_GT.shape[1], sentence_start(length_N)
        first_N = first_M[: back_N.shape[0]]
        if any(torch_internals.is_compiled(block) for block in self.blocks):
            # A number is a constant of compiled code, so each length of the longest sentence would compile another variant.
            longest = self.longest
        first_S = None if devices.reads_are_free(rows_Ud.device) else first_tokens(length_N, plan.row_S.shape[0])
        every = (length_N, longest, None, None, first_S)
        # After the last block only [GENE] is used.
        rest = [*(every for _ in self.blocks[1:]), (length_N, longest, first_N, first_M, first_S)]
        if self.project_vector is not None and genes.vector_GK is not None:
            # The vector of its gene belongs to each [GENE] token, so equal rows are equal tokens no longer.
            vector_Nd = self.project_vector(genes.vector_GK / self.vector_scale)
            x_Sd = copy_sentence_rows(rows_Ud, plan)
            x_Sd = x_Sd.index_add(0, first_N, vector_Nd.to(x_Sd.dtype))
            out = run_block(self.blocks[0], x_Sd, *rest[0], recompute=self.recompute)
        else:
            out = run_recomputed(self._first_block, rows_Ud, plan, *rest[0], recompute=self.recompute)
        for block, others in zip(self.blocks[1:], rest[1:], strict=True):
            x_Sd, *branch = arguments(out, recompute=self.recompute)
            out = run_block(block, x_Sd, *others, None, *branch, recompute=self.recompute)
        x_Nd = out.whole() if isinstance(out, Stream) else out
        return self.norm_out(x_Nd).index_select(0, back_N)

    def _first_block(self, rows_Ud: Tensor, plan: SentencePlan, *rest: Any) -> Tensor | Stream:
        """Return the output of the first block, whose queries, keys and values are computed once for equal tokens.

        A panel repeats each name once per level, so there are many times fewer rows than tokens.
        """
        block = self.blocks[0]
        assert isinstance(block, SentenceBlock)
        if len(self.blocks) == 1 and block.one_query(rest[1]):
            return run_block(block, copy_sentence_rows(rows_Ud, plan), *rest, recompute=False)
        qkv_SC = copy_sentence_rows(block.project(rows_Ud, rest[1]), plan)
        return run_block(block, copy_sentence_rows(rows_Ud, plan), *rest, qkv_SC, recompute=False)

    def _plan(
        self,
        genes: GeneTokens,
        length_N: Tensor,
        level_N: Tensor,
        mixed: bool,
        panel: tuple[Tensor, SentenceSizes] | None,
    ) -> SentencePlan:
        """Return which tokens of the sentences are equal; ``panel`` is that of :meth:`encode`, in the order of the sentences."""
        if panel is not None:
            return plan_panel(genes.ids_GT, length_N, level_N, *panel)
        identity_N = None if self.identity_Id is None else genes.identity_G
        return plan_sentences(genes.ids_GT, length_N, level_N, identity_N=identity_N, mixed=mixed)


def _with_padding(length_N: Tensor, order_N: Tensor, tokens: int, added: int, longest: int) -> tuple[Tensor, Tensor]:
    """Append copies of the last sentence, of other lengths, so that there are ``tokens`` tokens.

    Parameters
    ----------
    length_N, order_N
        Lengths of the sentences, and their indices.
    tokens
        Number of tokens of all sentences and copies.
    added
        Number of copies; if no tokens are left for the last copies, these have length 0.
    longest
        Largest length of a copy.
    """
    left = tokens - length_N.sum()
    used = torch.arange(0, added * longest, longest, device=length_N.device)
    length = torch.cat([length_N, (left - used).clamp(0, longest)])
    return length, torch.cat([order_N, order_N[-1:].expand(added)])
