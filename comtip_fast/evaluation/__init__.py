"""Scores that a critic would accept: correlations, nulls, baselines, and the report."""
