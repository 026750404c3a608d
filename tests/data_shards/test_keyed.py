"""Random numbers of sampling/rng.py are a contract: a change of these values would change the order of every run."""

import warnings
from hashlib import blake2b

import numpy as np
import pytest
from comtip_shards.sampling.rng import bits, generator, key, permutation, uniform


def test_golden_values_never_change():
    assert key(0, "order", 1, 2) == 0xE38BD671CC295041
    assert key(-5, "x") == 0x97E8B1AEAF70F679
    assert uniform(0, "view", index=np.arange(4)).tolist() == [
        0.5582348737133491,
        0.47016213047977096,
        0.9220501495551953,
        0.31652838631515534,
    ]
    assert uniform(7, "mask", 3, index=np.array([[0, 1], [2, -1]])).tolist() == [
        [0.7123284511253085, 0.9238886201303398],
        [0.17819529031866554, 0.2577555833215457],
    ]
    assert permutation(0, "p", n=8).tolist() == [5, 0, 4, 3, 6, 2, 7, 1]
    assert generator(0, "panel", 3).random(2).tolist() == [0.8465731610173957, 0.7891512597884575]


def _splitmix(k: int, index: int) -> float:
    mask = 2**64 - 1
    z = (k + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_uniform_matches_the_definition_in_plain_integers():
    parts = b"i\x01\0\0\0\x07" + b"s\x04\0\0\0mask" + b"i\x02\0\0\0\x2c\x01"
    k = int.from_bytes(blake2b(b"comtip-keyed-1\0" + parts, digest_size=8).digest(), "little")
    assert key(7, "mask", 300) == k
    index = np.array([0, 1, 12345678901, -3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = uniform(7, "mask", 300, index=index)
    assert got.tolist() == [_splitmix(k, int(i)) for i in index]


def test_different_questions_have_different_keys():
    asked = [
        (0, "a"),
        (0, "a", 0),
        (0, "a", 0, 0),
        (0, "a0"),
        (1, "a"),
        (0, "a", "0"),
        (0, "a", 256),
        (0, "a", 1, 0),
        (0, "a", 0, 1),
        (0, "a", -1),
        (0, "a", 255),
        (2**80, "a"),
    ]
    assert len({key(*q) for q in asked}) == len(asked)
    assert key(np.int64(3), "a", np.int32(4)) == key(3, "a", 4)


def test_uniform_is_uniform_and_keeps_the_shape():
    u = uniform(1, "flat", index=np.arange(200_000).reshape(2, -1))
    assert u.shape == (2, 100_000)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(u[0], u[1])[0, 1]) < 0.01
    assert np.shape(uniform(1, "flat", index=5)) == ()
    assert uniform(1, "flat", index=np.zeros((0, 3), int)).shape == (0, 3)
    assert np.unique(bits(1, "flat", index=np.arange(50_000))).size == 50_000


def test_what_is_not_an_integer_is_refused():
    with pytest.raises(TypeError):
        uniform(1, "a", index=np.array([0.5]))
    with pytest.raises(TypeError):
        key(1.5, "a")
