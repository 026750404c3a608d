"""Adaptation of a trained model to one section: a closed-form correction of the readout, tested on separate blocks."""

from comtip_fast.adaptation.run import Adaptation, adapt

__all__ = ["Adaptation", "adapt"]
