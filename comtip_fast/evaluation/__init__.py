"""Evaluation: correlations, spatial null, supervised baselines, and the report."""
