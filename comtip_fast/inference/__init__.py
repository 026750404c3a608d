"""Prediction of expression from tiles with a trained model.

For an image vector z and gene g, the prediction is the expected value over expression levels q:

    p(q | z, g) = softmax_q( scale * <z, h(g, q)> + log_prior[g, q] )        x[g] = sum_q p(q | z, g) value[g, q]

h(g, q) is the vector of a level sentence, the text of gene g with level q, and log_prior is the log frequency of the gene's levels,
both as in training. Genes that were not trained are predicted in the same way, with the frequencies and values of the global row
of the level table.

If the export has a readout (:mod:`comtip_fast.models.readout.heads`), the prediction of a trained gene is a mixture of this
expected value and the prediction of the readout. With gene vectors, the readout also predicts genes that were not trained.

Tiles, spots and genes are processed in chunks, so that only the features and the output grow with the section;
:mod:`comtip_fast.inference.section` keeps large features in a temporary file.
"""

from comtip_fast.inference.levels import GeneQuery, expected_values, predict_trained
from comtip_fast.inference.predictor import ImageFeatures, Predictor
from comtip_fast.inference.section import SectionFeatures, SectionPrediction, predict_section

__all__ = [
    "GeneQuery",
    "ImageFeatures",
    "Predictor",
    "SectionFeatures",
    "SectionPrediction",
    "expected_values",
    "predict_section",
    "predict_trained",
]
