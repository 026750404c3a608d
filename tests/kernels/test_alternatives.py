"""What the algorithms that were not chosen would cost."""

import itertools

import pytest
from comtip_kernels.ledger.alternatives import attention_tiles, gather, pooling_ways
from comtip_kernels.ledger.sizes import ROOFS, sizes


def test_a_gather_loads_the_row_of_each_spot_and_gene():
    """Counted spot by spot, for the sum, the gradient of the weights and that of the table."""
    B, G, Q, D = 3, 5, 4, 8
    loaded = flops = 0
    for _pass, _spot, _gene in itertools.product(range(3), range(B), range(G)):
        loaded += 2 * D
        flops += 2 * D
    loaded += B * G * (5 + 1 + 9) + 2 * B * D  # weights, levels, order; the vector of each spot once
    assert (gather(B, G, Q, D).loaded, gather(B, G, Q, D).flops) == (loaded, flops)


def test_the_chosen_way_is_that_of_the_ledger():
    way = pooling_ways(4096, 2048, 32, 512)[0]
    passes = [s for s in sizes() if s.op == "table_pool" and s.size.startswith("B = 4k")]
    assert way.moved.flops == sum(s.moved.flops for s in passes)
    assert way.moved.loaded == sum(s.moved.loaded for s in passes)


@pytest.mark.parametrize("spots", [1024, 4096])
def test_the_chosen_way_is_the_fastest_under_the_lowest_roof(spots: int):
    chosen, *others = (max(way.seconds(ROOFS["h100"]).values()) for way in pooling_ways(spots, 2048, 32, 512))
    assert chosen < min(others)


def test_tiles_of_attention_are_counted_sentence_by_sentence():
    window, _, own = attention_tiles(range(3, 17), 1000, 1)
    useful = 1000 * sum(n * n for n in range(3, 17))
    tiles = 0
    for n in range(3, 17):
        left = 16
        for _ in range(1000):
            if left < n or left == 16:
                tiles, left = tiles + 1, 16
            left -= n
    assert own.programs == tiles
    assert own.ratio == pytest.approx(tiles * 256 / useful)
    assert window.ratio > 3 * own.ratio
