"""Modules of the two operations with parameters: InfoNCE, and the embedding of gene sentences."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from comtip_kernels.dispatch import Impl
from comtip_kernels.gene_sentence_embedding import SentencePlan, gene_sentence_embedding
from comtip_kernels.infonce import infonce


class InfoNCE(nn.Module):
    """Symmetric InfoNCE with a learnable temperature; see :func:`comtip_kernels.infonce`.

    Parameters
    ----------
    temperature
        Initial temperature.
    max_scale
        Maximum of 1 / temperature. The parameter itself is not modified; the clamp is applied when it is read.
    negatives, impl
        As in :func:`comtip_kernels.infonce`.

    Raises
    ------
    ValueError
        If ``temperature`` or ``max_scale`` is not positive.
    """

    def __init__(
        self, temperature: float = 0.07, max_scale: float = 100.0, *, negatives: str = "all", impl: Impl = "auto"
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"InfoNCE: temperature={temperature}; give a positive number, e.g. 0.07")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.max_log_scale, self.negatives, self.impl = math.log(max_scale), negatives, impl

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, at most ``max_scale``."""
        return self.log_scale.clamp(max=self.max_log_scale).exp()

    def forward(
        self,
        image_BD: Tensor,
        text_MD: Tensor,
        *,
        group_rows: Tensor | None = None,
        group_columns: Tensor | None = None,
        class_rows: Tensor | None = None,
        class_columns: Tensor | None = None,
        weight_B: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in nats; arguments and errors are those of :func:`comtip_kernels.infonce`."""
        return infonce(
            image_BD,
            text_MD,
            self.scale,
            negatives=self.negatives,
            group_rows=group_rows,
            group_columns=group_columns,
            class_rows=class_rows,
            class_columns=class_columns,
            weight_B=weight_B,
            impl=self.impl,
        )


class GeneSentenceEmbedding(nn.Module):
    """Embedding tables of gene sentences and their LayerNorm; see :func:`comtip_kernels.gene_sentence_embedding`.

    Parameters
    ----------
    vocabulary, longest, levels
        Number of rows of the token, position and level tables.
    width
        Width D of the rows.
    identities
        Number of genes with an identity row; identity 0 is "none". 0 creates no identity table.
    eps, impl
        As in :func:`comtip_kernels.gene_sentence_embedding`.
    """

    def __init__(
        self,
        vocabulary: int,
        longest: int,
        levels: int,
        width: int,
        *,
        identities: int = 0,
        eps: float = 1e-5,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()

        def table(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, width) * 0.02)

        self.token_VD, self.type_3D, self.position_TD, self.level_QD = map(table, (vocabulary, 3, longest, levels))
        self.identity_ID = table(identities + 1) if identities else None
        self.norm = nn.LayerNorm(width, eps=eps)
        self.impl = impl

    def forward(
        self,
        ids_NT: Tensor,
        length_N: Tensor,
        level_lo_N: Tensor,
        *,
        level_hi_N: Tensor | None = None,
        mix_N: Tensor | None = None,
        identity_N: Tensor | None = None,
        plan: SentencePlan | None = None,
    ) -> Tensor:
        """Return the embedded tokens (S, D) of the concatenated sentences.

        Arguments and errors are those of :func:`comtip_kernels.gene_sentence_embedding`. Identities are added only if
        ``identity_N`` is given and the module has an identity table.
        """
        identity_ID = None if identity_N is None else self.identity_ID
        return gene_sentence_embedding(
            ids_NT,
            length_N,
            level_lo_N,
            self.token_VD,
            self.type_3D,
            self.position_TD,
            self.level_QD,
            level_hi_N=level_hi_N,
            mix_N=mix_N,
            identity_N=identity_N,
            identity_ID=identity_ID,
            gain_D=self.norm.weight,
            bias_D=self.norm.bias,
            eps=self.norm.eps,
            plan=plan,
            impl=self.impl,
        )
