"""Representations of genes: text, tokens and vectors."""

from comtip_fast.genes.text import gene_text
from comtip_fast.genes.tokenizer import GENE_ID, PAD_ID, VALUE_ID, GeneTokenizer

__all__ = ["GENE_ID", "PAD_ID", "VALUE_ID", "GeneTokenizer", "gene_text"]
