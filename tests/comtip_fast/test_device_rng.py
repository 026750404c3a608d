"""Random numbers drawn on a device are bit-identical to NumPy's."""

import numpy as np
import pytest
import torch
from comtip_shards.sampling import rng
from torch._subclasses.fake_tensor import FakeTensorMode

from comtip_fast.runtime.device_rng import uniform, uniforms_of


@pytest.mark.parametrize("purpose", ["mask", "identity", "mispair-from"])
@pytest.mark.parametrize("counters", [(), (0,), (7, 2), (2**40, -3)])
def test_equal_to_numpy_to_the_bit(purpose: str, counters: tuple[int, ...]):
    edges = [0, 1, 2, 2**20, 2**31 - 1, 2**31, 2**40 + 17, 2**62, 2**63 - 2]
    spread = rng.bits(0, "test", index=np.arange(4000)).astype(np.int64) & (2**62 - 1)
    index = np.concatenate([edges, spread])
    for seed in (0, 1, 12345678901234567890):
        expected = rng.uniform(seed, purpose, *counters, index=index)
        found = uniform(seed, purpose, *counters, index=torch.from_numpy(index))
        assert found.dtype == torch.float64
        np.testing.assert_array_equal(found.numpy(), expected)


def test_shapes_and_narrow_integers():
    index = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_array_equal(uniform(1, "a", index=torch.from_numpy(index)), rng.uniform(1, "a", index=index))
    with pytest.raises(TypeError, match="float32"):
        uniform(1, "a", index=torch.zeros(2))


def test_draws_together_are_single_draws_to_the_bit():
    index = torch.tensor([[0, 1, 2**31], [2**40 + 17, 2**62, 2**63 - 2]])
    other = torch.tensor([5, 2**40], dtype=torch.int64)
    before = index.clone()
    keys = [rng.key(7, "mispair-from", 12, i) for i in range(3)]
    found, single = uniforms_of((keys, index), ([rng.key(7, "mispair-mode")], other))
    assert found.shape == (3, 2, 3)
    for i in range(3):
        expected = rng.uniform(7, "mispair-from", 12, i, index=index.numpy())
        np.testing.assert_array_equal(found[i].numpy(), expected)
        assert torch.equal(found[i], uniform(7, "mispair-from", 12, i, index=index))
    np.testing.assert_array_equal(single[0].numpy(), rng.uniform(7, "mispair-mode", index=other.numpy()))
    assert torch.equal(index, before)
    with pytest.raises(TypeError, match="bool"):
        uniforms_of(([1, 2], torch.zeros(2, dtype=torch.bool)))


def test_nothing_leaves_the_device():
    """On stand-in CUDA tensors: a copy to the host or an upload would raise or show as another device."""
    with FakeTensorMode():
        found = uniform(3, "mask", 5, index=torch.arange(6, device="cuda"))
    assert found.device.type == "cuda"
    assert found.dtype == torch.float64
