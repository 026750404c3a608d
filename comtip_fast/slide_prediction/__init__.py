"""Prediction of slides without spots: tissue mask, grid of tiles, resumable pieces, output and drawings."""

from comtip_fast.slide_prediction.grid import GridOptions
from comtip_fast.slide_prediction.run import SlideRequest, predict_slide
from comtip_fast.slide_prediction.tiles import fit_tiles

__all__ = ["GridOptions", "SlideRequest", "fit_tiles", "predict_slide"]
