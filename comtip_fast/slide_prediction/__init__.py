"""Prediction of slides without spots: find tissue, lay a grid of tiles, predict in resumable pieces, write and draw."""

from comtip_fast.slide_prediction.grid import GridOptions
from comtip_fast.slide_prediction.run import SlideRequest, predict_slide
from comtip_fast.slide_prediction.tiles import fit_tiles

__all__ = ["GridOptions", "SlideRequest", "fit_tiles", "predict_slide"]
