"""Settings of the model that are checked when a task is built: masking, gene vectors and attention."""

from __future__ import annotations

import torch
from comtip_kernels.packed_attention import attention_name

from comtip_fast.config.schema import RunConfig
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.models.image_encoder import check_mask
from comtip_fast.runtime.devices import in_bf16


def check_vision(config: RunConfig, n_patches: int) -> None:
    """Raise ValueError if the masking ratio hides no patch."""
    if config.loss.mfm > 0:
        check_mask(config.vision, n_patches)


def load_vectors(config: RunConfig) -> GeneVectors | None:
    """Load the gene vectors that the config names; None without.

    Raises
    ------
    FileNotFoundError, ValueError
        The file is missing or damaged, or the drop probabilities sum to more than 1.
    """
    text = config.text
    if not text.gene_vectors:
        return None
    if text.vector_drop + text.name_drop > 1:
        raise ValueError(
            f"text.vector_drop={text.vector_drop:g} and text.name_drop={text.name_drop:g}: the sum is above 1; lower one"
        )
    return GeneVectors.load(text.gene_vectors)


def check_attention(config: RunConfig, device: torch.device, longest: int) -> str:
    """Return which implementation of attention ``text.attention`` runs on this device.

    Raises
    ------
    ValueError
        It cannot run here.
    """
    dtype = torch.bfloat16 if in_bf16(config.train.precision, device) else torch.float32
    try:
        return attention_name(config.text.attention, device, dtype, longest)
    except ValueError as error:
        raise ValueError(f"text.attention={config.text.attention}: {error}; text.attention=auto always runs") from error
