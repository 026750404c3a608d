"""Variants of the benchmark's recipe; each changes one choice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Choices of the recipe; the defaults are the benchmark's own."""

    name: str
    meaning: str
    pca: bool = True
    """False also leaves out the standardisation, as the benchmark's code does without ``dimreduce``."""
    cross_validated: bool = False
    """Choose the penalty by leaving training sections out, instead of by the recipe's formula."""
    cp10k: bool = False
    """Predict log1p of counts per 10,000 instead of log1p of counts."""
    per_section: bool = False
    """Average the correlations of test sections instead of pooling their spots."""
    undefined_as_zero: bool = False


RECIPE = Variant("recipe", "HEST-Benchmark as published")
VARIANTS = {
    v.name: v
    for v in (
        RECIPE,
        Variant("no_pca", "raw features, neither standardised nor reduced", pca=False),
        Variant("alpha_cv", "penalty chosen by leaving training sections out", cross_validated=True),
        Variant("per_section", "correlation within each test section, averaged", per_section=True),
        Variant("cp10k", "log1p of counts per 10,000", cp10k=True),
        Variant("nan_as_zero", "undefined correlations count as 0", undefined_as_zero=True),
    )
}
