"""``text.attention``: each implementation runs a model step, and one that is not installed is refused at the start."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comtip_kernels import packed_attention
from comtip_kernels.packed_attention import attention_name, peers
from torch import Tensor

from comtip_fast.config.io import load_config
from comtip_fast.doctor import _attention
from comtip_fast.models import gene_encoder
from comtip_fast.runtime import devices
from comtip_fast.training.task import build_task

CPU = torch.device("cpu")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """The signature of flash-attn 2.8; computes on any device and refuses what its kernels refuse."""
    assert deterministic
    return _checked(q, k, v, cu_seqlens_q, max_seqlen_q)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """The required arguments of torch.nn.attention.varlen.varlen_attn, which a test compares with the real ones."""
    return _checked(query, key, value, cu_seq_q, max_q)


def _checked(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the kernels read rows of E elements"
    assert offsets.dtype == torch.int32
    assert offsets.is_contiguous()
    assert longest >= int(offsets.diff().max())
    return packed_attention(q, k, v, offsets.diff().long(), impl="reference")


STAND_INS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "flash": ("flash_varlen", flash_attn_varlen_func),
    "varlen": ("torch_varlen", varlen_attn),
}


def test_the_stand_in_has_the_signature_of_torchs_varlen():
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.skip("this torch has no varlen attention")
    real = list(inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters.values())
    ours = list(inspect.signature(varlen_attn).parameters.values())
    assert [p.name for p in real[: len(ours)]] == [p.name for p in ours]
    assert all(p.default is not inspect.Parameter.empty for p in real[len(ours) :])


def test_the_stand_in_has_the_signature_of_flash_attn():
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    real = inspect.signature(importlib.import_module("flash_attn").flash_attn_varlen_func).parameters
    assert [*real] == [*inspect.signature(flash_attn_varlen_func).parameters]


def step(overrides: list[str]) -> dict[str, Tensor]:
    """Run one step in bf16; return the loss and the gradients of the sentence encoder."""
    config = load_config(None, [*overrides, "train.precision=bf16", "text.depth=2", "loss.paat.adversary=random"])
    task = build_task(config, CPU)
    batch = task.batch(task.batches(0)[0], 1, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = task.losses(task.module.train(), batch)
    losses["loss"].backward()
    return {"loss": losses["loss"].detach()} | {n: p.grad for n, p in task.model.genes.named_parameters()}


@pytest.mark.parametrize("name", ["flash", "varlen", "sdpa"])
def test_a_model_step_passes_through(name: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    want, calls = step(tiny_overrides), []
    if name in STAND_INS:
        finder, function = STAND_INS[name]

        # The signature is looked at.
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return function(*args, **kwargs)

        counted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        monkeypatch.setattr(peers, finder, lambda: counted)
        monkeypatch.setattr(peers, "can_peer", lambda like: like.dtype == torch.bfloat16)
    got = step([*tiny_overrides, f"text.attention={name}"])
    assert calls == [name] * (2 if name in STAND_INS else 0)  # one per block
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (got[key] - value).norm() <= 0.05 * value.norm(), key  # bf16 rounds differently


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "text.attention=flash: .*flash-attn, which is not installed.*text.attention=auto always runs"),
        ("varlen", "text.attention=varlen: .*upgrade torch"),
        ("triton", "text.attention=triton: .*needs a CUDA device"),
    ],
)
def test_what_is_not_there_is_refused_before_training(
    name: str, message: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "flash_varlen", lambda: None)
    monkeypatch.setattr(peers, "torch_varlen", lambda: None)
    with pytest.raises(ValueError, match=message):
        build_task(load_config(None, [*tiny_overrides, f"text.attention={name}"]), CPU)


def test_flash_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "flash_varlen", lambda: flash_attn_varlen_func)
    with pytest.raises(ValueError, match=r"needs fp16 or bf16 on a CUDA device, not torch.float32 on cpu"):
        attention_name("flash", CPU, torch.float32, 18)


def test_doctor_and_log_name_the_implementation(tiny_overrides: list[str], caplog: pytest.LogCaptureFixture):
    assert _attention().detail == "text.attention=auto runs cpu; sdpa can be chosen"
    with caplog.at_level("INFO", "comtip_fast"):
        build_task(load_config(None, [*tiny_overrides, "text.attention=sdpa"]), CPU)
    assert "attention of the sentence encoder: sdpa" in caplog.messages


def test_first_tokens_are_computed_once_for_all_layers(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)
    seen: list[Tensor] = []
    attend = gene_encoder.packed_attention_qkv

    def watched(qkv: Tensor, length: Tensor, *, first_S: Tensor, **more: Any) -> Tensor:
        start = length.cumsum(0) - length
        assert torch.equal(first_S, torch.repeat_interleave(start, length).to(torch.int32))
        seen.append(first_S)
        return attend(qkv, length, first_S=first_S, **more)

    monkeypatch.setattr(gene_encoder, "packed_attention_qkv", watched)
    task = build_task(load_config(None, [*tiny_overrides, "text.depth=3"]), CPU)
    task.step.encode(task.model, task.batch(task.batches(0)[0], 1, 0))
    assert len(seen) == 3
    assert all(t is seen[0] for t in seen)
