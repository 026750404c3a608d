"""Normalised values that were rounded to integers are no counts; down-sampled counts are, with a warning."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.counts import equal_totals
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sections.scaled_counts import scaled_total
from comtip_shards.sections.section import Section
from comtip_shards.sources import open_source
from comtip_shards.sources.anndata_parts.counts import raw_counts
from comtip_shards.sources.anndata_parts.store import MemoryStore
from scipy import sparse

SAMPLES = Path(__file__).parents[2] / "data_shards" / "samples"
KINDS = ("raw", "down-sampled", "to 10,000", "to 1,000,000", "to the median")


@pytest.fixture(scope="module")
def section() -> Section:
    return open_source(SAMPLES, samples=["her2st_C4"])[0].load()


def changed(counts: sparse.csr_matrix, kind: str) -> sparse.csr_matrix:
    totals = np.asarray(counts.sum(axis=1)).ravel()
    if kind == "raw":
        return counts
    if kind == "down-sampled":
        n, rng = int(np.percentile(totals, 30)), np.random.default_rng(0)
        rows = [counts[i] for i in np.flatnonzero(totals >= n)]
        drawn = [rng.choice(np.repeat(row.indices, row.data), n, replace=False) for row in rows]
        return sparse.csr_matrix(np.stack([np.bincount(d, minlength=counts.shape[1]) for d in drawn]))
    target = {"to 10,000": 1e4, "to 1,000,000": 1e6, "to the median": np.median(totals)}[kind]
    out = sparse.csr_matrix(counts.multiply((target / np.maximum(totals, 1))[:, None]))
    out.data = np.rint(out.data).astype(np.int32)
    out.eliminate_zeros()
    return out.astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_only_scaled_counts_are_refused(kind: str, section: Section):
    counts = changed(section.counts, kind)
    total = scaled_total(counts)
    assert (total is not None) == kind.startswith("to ")
    if total is not None:
        assert total == pytest.approx(np.median(np.asarray(counts.sum(axis=1))), rel=0.05)
    spots = counts.shape[0]
    part = section.keep(np.arange(len(section.spot_ids)) < spots, "cut")
    part.counts = counts
    finding = equal_totals(SectionContext(part, *[None] * 7))
    assert finding.status == ("warn" if kind != "raw" else "ok")
    assert ("down-sampled" in finding.advice) == (kind != "raw")
    if kind == "to 10,000":
        with pytest.raises(
            SourceError, match=r"section her2st_C4: every spot sums to about .* not raw counts; provide raw counts"
        ):
            part.check()


def test_raw_counts_elsewhere_in_an_anndata_are_found(section: Section):
    scaled = changed(section.counts, "to 10,000")
    var = pd.DataFrame(index=section.gene_ids)
    data = ad.AnnData(scaled.astype(np.float32), pd.DataFrame(index=section.spot_ids), var)
    store = MemoryStore(data, Path("a.h5ad"))
    for options in (CountOptions(), CountOptions(layer="X"), CountOptions(round_counts=True)):
        with pytest.raises(
            SourceError, match=r"a\.h5ad: X: every spot sums to about [\d,]+ .*; add raw counts to the file"
        ):
            raw_counts(store, Path("a.h5ad"), options)
    data.layers["umis"] = section.counts.astype(np.float32)
    store = MemoryStore(data, Path("a.h5ad"))
    found, _, notes = raw_counts(store, Path("a.h5ad"), CountOptions())
    assert (found != section.counts).nnz == 0
    assert re.search("counts are those of layers/umis", notes[0])


@pytest.mark.parametrize("level", [0.05, 1.0, 30.0])
def test_counts_of_equal_spots_are_accepted(level: float):
    """Spots of one mixture, whose totals differ by chance only, at low and at high depth."""
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(level, (200, 2000)))
    assert scaled_total(counts) is None


@pytest.mark.parametrize(("n_genes", "level", "seed"), [(20, 10.0, 6), (20, 30.0, 4), (40, 30.0, 2), (40, 100.0, 4)])
def test_counts_of_a_small_dense_panel_are_accepted(n_genes: int, level: float, seed: int):
    """No gene has one count, and a few genes share the smallest value of a spot by chance."""
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(rng.poisson(level * rng.gamma(2.0, 0.5, n_genes), (100, n_genes)))
    assert scaled_total(counts) is None
