"""HEST-Benchmark: folder layout, recipe and labelled variants of the recipe."""
