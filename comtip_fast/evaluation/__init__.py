"""Evaluation of a trained model: correlations, spatial null, supervised baselines, downstream tasks, and the report."""
