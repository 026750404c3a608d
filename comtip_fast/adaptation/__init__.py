"""Adaptation of a trained model to one section: a correction of its linear readout in closed form, tested on apart blocks."""

from comtip_fast.adaptation.run import Adaptation, adapt

__all__ = ["Adaptation", "adapt"]
