"""A batch is copied to a device once, from one buffer, and equals the batch on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comtip_shards import ShardSet
from torch.utils._python_dispatch import TorchDispatchMode

from comtip_fast.config.io import load_config
from comtip_fast.data.batch import Batch
from comtip_fast.data.expression.training_tables import training_tables
from comtip_fast.data.loaders import factory
from comtip_fast.data.loaders.dali import Decoder
from comtip_fast.data.upload import ALIGNMENT, PackedTensors, can_pin
from comtip_fast.training.task import build_task

CPU, META = torch.device("cpu"), torch.device("meta")


class Copies(TorchDispatchMode):
    """Records the bytes of every copy from host memory to the device ``meta``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        to_device = str(kwargs.get("device", "")) == "meta" and tensors and tensors[0].device == CPU
        into = len(tensors) > 1 and tensors[0].is_meta and any(t.device == CPU and t.dim() for t in tensors[1:])
        if to_device or into:
            self.found.append(sum(t.nbytes for t in tensors if t.device == CPU))
        return func(*args, **kwargs)


def loader_of(overrides: list[str], device: torch.device, *more: str) -> Any:
    config = load_config(None, [*overrides, "data.workers=0", *more])
    shards = ShardSet(config.data.shards)
    return factory.make_loader(config, shards, training_tables(shards, config), rank=0, world=1, device=device)


def test_packed_tensors_come_back_unchanged():
    tensors = {
        "a": torch.arange(7, dtype=torch.uint8),
        "b": torch.randn(3, 5, dtype=torch.float64),
        "none": torch.zeros(0, 4, dtype=torch.int64),
        "c": torch.tensor([True, False]),
        "d": torch.randn(4, 6).T,
    }
    packed = PackedTensors.pack(tensors, CPU)
    found = packed.to(CPU)
    assert found.keys() == tensors.keys()
    assert all(offset % ALIGNMENT == 0 for offset, _, _ in packed.layout.values())
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert not can_pin(CPU)


@pytest.mark.parametrize("more", [(), ("data.zoom=0.3",), ("data.stain=none", "data.jitter=0", "data.flips=false")])
def test_a_batch_is_one_copy(more: tuple[str, ...], tiny_overrides: list[str]):
    loader = loader_of(tiny_overrides, META, *more)
    spots = loader.batches(0)[0]
    with Copies() as copies:
        batch = loader.batch(spots, 1, 0).to(META)
    assert {name: t.device for name, t in batch.tensors().items() if t.device != META} == {}
    assert len(copies.found) == 1
    assert copies.found[0] >= sum(t.nbytes for t in batch.tensors().values())


@pytest.mark.parametrize("more", [(), ("data.zoom=0.3",), ("data.stain=none", "data.jitter=0")])
def test_a_device_gets_the_batch_of_a_cpu(
    more: tuple[str, ...], tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    there, here = (loader_of(tiny_overrides, device, *more) for device in (META, CPU))
    monkeypatch.setattr(PackedTensors, "to", lambda self, device: self.split(self.buffer.clone()))
    for step, spots in enumerate(here.batches(0)[:2], start=1):
        a, b = (loader.batch(spots, step, 0).tensors() for loader in (there, here))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_features_of_a_frozen_stem_are_one_copy(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    config = load_config(None, [*tiny_overrides, "vision.stem=efficientnet_lite0", "data.workers=0"])
    task = build_task(config, CPU)
    spots = task.batches(0)[0]
    task.loader.batch(spots, 1, 0)  # the stem runs on the CPU
    monkeypatch.setattr(task.loader, "device", META)
    with Copies() as copies:
        batch: Batch = task.loader.batch(spots, 1, 0)
    assert len(copies.found) == 1
    assert batch.features is not None
    assert batch.features.device == META
    assert batch.panel_host is not None


def test_memory_of_dali_is_released_after_the_copy_is_complete(monkeypatch: pytest.MonkeyPatch):
    """A copy that is only queued would read what DALI decodes next; there is no GPU here, so streams are stand-ins."""
    done: list[str] = []
    streams: list[object] = []

    class Recorder:
        """A stream, a tensor or DALI's pipeline: every method that is called is recorded."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, method: str):
            return lambda *_args: done.append(f"{self.name}.{method}") or Recorder("copy")

    @contextmanager
    def stream(_stream: Recorder) -> Iterator[None]:
        done.append("begin")
        yield
        done.append("end")

    pipe = Recorder("dali")
    pipe.share_outputs = lambda: (Recorder("dali"),)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(device) or Recorder("stream"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Recorder("current"))
    monkeypatch.setattr(torch, "from_dlpack", lambda _tiles: Recorder("tiles"))
    decoder = Decoder.__new__(Decoder)
    decoder._settings, decoder._pipe = (4, 1, 0), pipe
    decoder.get()
    decoder.release()
    assert done == [
        "begin",
        "dali.as_tensor",
        "tiles.clone",
        "end",
        "stream.synchronize",
        "copy.record_stream",
        "dali.release_outputs",
    ]
    decoder.get()
    # Memory stays with the stream on which it was allocated: with a stream per batch, none would be used again for 32 batches.
    assert streams == [torch.device("cuda", 0)]
