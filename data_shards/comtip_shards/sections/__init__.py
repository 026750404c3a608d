"""Sections, pooling of small spots, and checks for leakage between splits."""
