"""Slots of tars: the batches are those of any number of nodes, and a node reads its own share of the tars."""

from __future__ import annotations

import numpy as np
import pytest
from comtip_shards.sampling.slots import slot_batches, slots

N, B, SLOTS = 20_011, 512, 16


@pytest.fixture(scope="module")
def layout() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tar, section and index of the spots of 60 sections in tars of at most 128."""
    sizes = np.random.default_rng(1).multinomial(N, np.ones(60) / 60)
    section = np.repeat(np.arange(60), sizes)
    within = np.concatenate([np.arange(n) // 128 for n in sizes])
    _, tar = np.unique(section * 1000 + within, return_inverse=True)
    return tar, section, np.arange(N)


def epoch(layout: tuple[np.ndarray, ...], number: int = 0, **more: object) -> list[np.ndarray]:
    settings = {"sections_per_batch": 32, "run": 8} | more
    tar, section, spots = layout
    return slot_batches(tar, section, spots, B, SLOTS, seed=3, epoch=number, **settings)


@pytest.mark.parametrize("more", [{}, {"sections_per_batch": None}, {"run": 1}])
def test_every_spot_is_in_one_batch_and_every_slot_in_all(layout: tuple[np.ndarray, ...], more: dict[str, object]):
    batches = epoch(layout, **more)
    assert [b.size for b in batches] == [B] * (N // B) + [N % B]
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(N))
    slot = np.empty(N, int)
    for s, at in enumerate(slots(layout[0], SLOTS, 3)):
        slot[at] = s
    for batch in batches[:-1]:
        assert np.array_equal(slot[batch], np.repeat(np.arange(SLOTS), B // SLOTS))
    assert np.ptp(np.bincount(slot[batches[-1]], minlength=SLOTS)) <= 1


def test_an_epoch_differs_from_the_next_in_all_but_the_slots(layout: tuple[np.ndarray, ...]):
    one, other = epoch(layout), epoch(layout, 1)
    assert np.mean(one[0] == other[0]) < 0.1
    part = B // SLOTS
    seen = [np.unique(layout[0][np.concatenate([b[:part] for b in e[:-1]])]) for e in (one, other)]
    assert np.array_equal(*seen), "slot 0 reads other tars in the next epoch"


@pytest.mark.parametrize("nodes", [2, 8, 16])
def test_a_node_reads_its_share_of_the_tars(layout: tuple[np.ndarray, ...], nodes: int):
    tar, n_tars = layout[0], int(layout[0].max()) + 1
    batches = epoch(layout)[:-1]
    read = [np.unique(tar[np.concatenate([b.reshape(nodes, -1)[n] for b in batches])]) for n in range(nodes)]
    # One tar at each of the cuts between nodes is read by both.
    assert sum(map(len, read)) <= n_tars + nodes - 1
    assert max(map(len, read)) <= 1.3 * n_tars / nodes + 2


def test_a_part_has_few_sections(layout: tuple[np.ndarray, ...]):
    section = layout[1]
    for batch in epoch(layout)[:-1]:
        for part in batch.reshape(SLOTS, -1):
            # k / S = 2 pieces, and one more where pieces of a section are shorter.
            assert np.unique(section[part]).size <= 4


def test_slots_must_divide_the_batch(layout: tuple[np.ndarray, ...]):
    tar, section, spots = layout
    with pytest.raises(ValueError, match="batch_size=500 must be divisible by n_slots="):
        slot_batches(tar, section, spots, 500, SLOTS, None, 0, 0)


def test_a_set_smaller_than_the_slots_is_one_batch():
    batches = slot_batches(np.zeros(5, int), np.zeros(5, int), np.arange(5), 32, 8, 8, 0, 0)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(5))
    assert len(batches) == 1
