"""Modules: image encoder, mask feature generator, gene encoder, and the CoMTIP model."""

from comtip_fast.models.comtip import CoMTIP, ImageOutput, ModelSizes, SentenceTable, StepOutput
from comtip_fast.models.gene_encoder import GeneEncoder
from comtip_fast.models.image_encoder import VisionEncoder
from comtip_fast.models.mask_generator import MaskFeatureGenerator

__all__ = [
    "CoMTIP",
    "GeneEncoder",
    "ImageOutput",
    "MaskFeatureGenerator",
    "ModelSizes",
    "SentenceTable",
    "StepOutput",
    "VisionEncoder",
]
