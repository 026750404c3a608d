"""comtip_kernels: the operations that dominate CoMTIP's step time, each with a readable reference.

Every operation is one function that takes ``impl="auto|triton|cpu|reference"`` (see :mod:`comtip_kernels.dispatch`).
"""

from comtip_kernels.block_pointwise import bias_gelu, residual_norm
from comtip_kernels.dispatch import Impl, prefer
from comtip_kernels.gene_sentence_embedding import (
    SentencePlan,
    SentenceSizes,
    copy_sentence_rows,
    first_tokens,
    gene_sentence_embedding,
    plan_panel,
    plan_sentences,
    sentence_start,
)
from comtip_kernels.infonce import infonce, unit_vectors
from comtip_kernels.level_cross_entropy import level_cross_entropy, level_scores, pair_scores, take_level
from comtip_kernels.modules import GeneSentenceEmbedding, InfoNCE
from comtip_kernels.one_query_attention import one_query_attention
from comtip_kernels.packed_attention import image_attention, packed_attention, packed_attention_qkv
from comtip_kernels.table_pool import pool_weights, table_pool
from comtip_kernels.tl_common import operand_dtype

__all__ = [
    "GeneSentenceEmbedding",
    "Impl",
    "InfoNCE",
    "SentencePlan",
    "SentenceSizes",
    "bias_gelu",
    "copy_sentence_rows",
    "first_tokens",
    "gene_sentence_embedding",
    "image_attention",
    "infonce",
    "level_cross_entropy",
    "level_scores",
    "one_query_attention",
    "operand_dtype",
    "packed_attention",
    "packed_attention_qkv",
    "pair_scores",
    "plan_panel",
    "plan_sentences",
    "pool_weights",
    "prefer",
    "residual_norm",
    "sentence_start",
    "table_pool",
    "take_level",
    "unit_vectors",
]
