"""Pooling loses nothing, assigns everything to the right square, and does not depend on row order."""

import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.sections import pooling
from comtip_shards.sections.pooling import Pooler, squares_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

N_GENES = 5
units = st.lists(
    st.tuples(
        st.floats(-1e5, 1e5, allow_subnormal=False),
        st.floats(-1e5, 1e5, allow_subnormal=False),
        st.lists(st.integers(0, 9), min_size=N_GENES, max_size=N_GENES),
    ),
    min_size=1,
    max_size=60,
)
widths = st.floats(0.5, 5_000)


def pool(rows, width: float, min_units: int = 1, batches: int = 1):
    pooler = Pooler(N_GENES, "x")
    for part in np.array_split(np.arange(len(rows)), batches):
        squares = squares_of(np.array([rows[i][:2] for i in part]).reshape(-1, 2), width, "x")
        pooler.add_units(squares)
        pooler.add_counts(squares, sparse.csr_matrix(np.array([rows[i][2] for i in part]).reshape(-1, N_GENES)))
    return pooler.result(min_units=min_units)


def slowly(rows, width: float):
    """Sum with dictionaries: {square: [units, counts]}."""
    out: dict = {}
    for x, y, counts in rows:
        key = tuple(squares_of(np.array([[x, y]]), width, "x")[0].tolist())
        n, total = out.get(key, (0, np.zeros(N_GENES, int)))
        out[key] = (n + 1, total + counts)
    return out


@given(units, widths, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_nothing_is_lost(rows, width, min_units, batches):
    pooled = pool(rows, width, min_units, batches)
    truth = slowly(rows, width)
    kept = {k: v for k, v in truth.items() if v[0] >= min_units}
    got = {
        tuple(s.tolist()): (n, c)
        for s, n, c in zip(pooled.square_N2, pooled.n_units, pooled.counts.toarray(), strict=True)
    }
    assert got.keys() == kept.keys()
    for key, (n, counts) in kept.items():
        assert got[key][0] == n
        np.testing.assert_array_equal(got[key][1], counts)
    assert pooled.dropped_squares == len(truth) - len(kept)
    assert int(pooled.n_units.sum()) + pooled.dropped_units == len(rows)
    assert int(pooled.counts.sum()) + pooled.dropped_counts == sum(sum(r[2]) for r in rows)


@given(st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=40), widths)
@settings(max_examples=150, deadline=None)
def test_no_position_lies_outside_its_square(values, width):
    # Positions on the edges, and just off them, are where a plain floor division fails.
    edges = np.round(np.array(values) / width) * width
    xy = np.concatenate([values, edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf)])
    xy = np.stack([xy, xy[::-1]], axis=1)
    square = squares_of(xy, width, "x")
    assert (square * width <= xy).all()
    assert (xy < (square + 1) * width).all()


@given(units, widths, st.randoms(use_true_random=False), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_order_of_rows_does_not_matter(rows, width, random, batches):
    shuffled = list(rows)
    random.shuffle(shuffled)
    a, b = pool(rows, width), pool(shuffled, width, batches=batches)
    np.testing.assert_array_equal(a.square_N2, b.square_N2)
    np.testing.assert_array_equal(a.n_units, b.n_units)
    np.testing.assert_array_equal(a.counts.toarray(), b.counts.toarray())


def test_transcripts_are_units_and_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pooling, "_COMPACT", 7)  # with intermediate sums, as for a large section
    rng = np.random.default_rng(0)
    xy, genes = rng.uniform(0, 300, (200, 2)), rng.integers(0, N_GENES, 200)
    pooler = Pooler(N_GENES, "x")
    for part in np.array_split(np.arange(200), 9):
        pooler.add_transcripts(squares_of(xy[part], 100.0, "x"), genes[part])
    pooled = pooler.result()
    want = np.zeros((3, 3, N_GENES), int)
    np.add.at(want, ((xy[:, 1] // 100).astype(int), (xy[:, 0] // 100).astype(int), genes), 1)
    np.testing.assert_array_equal(pooled.counts.toarray(), want.reshape(9, N_GENES))
    np.testing.assert_array_equal(pooled.n_units, want.sum(2).ravel())
    assert pooled.ids()[:4] == ["000x000", "000x001", "000x002", "001x000"]


def test_a_sum_that_does_not_fit_is_refused():
    pooler, square = Pooler(1, "counts.h5"), np.zeros((1, 2), np.int64)
    for _ in range(2):
        pooler.add_units(square)
        pooler.add_counts(square, sparse.csr_matrix([[2**30]]))
    with pytest.raises(SourceError, match=r"^counts.h5: a pseudo-spot .* smaller `pool_um`"):
        pooler.result()


def test_absurd_positions_are_refused():
    with pytest.raises(SourceError, match=r"^cells.csv: a position .* check the positions, their unit"):
        Pooler(1, "cells.csv").add_units(np.array([[2**40, 0]]))
    with pytest.raises(SourceError, match=r"^cells.csv: a position .* check the positions, their unit"):
        squares_of(np.array([[1e300, 0.0]]), 100.0, "cells.csv")
