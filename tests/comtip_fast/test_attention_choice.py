"""``text.attention``: each implementation runs a model step, and one that is not installed is refused at the start."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comtip_kernels import packed_attention, packed_attention_qkv
from comtip_kernels.packed_attention import attention_name, peers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from comtip_fast.config.io import load_config
from comtip_fast.doctor import _attention
from comtip_fast.models import comtip, gene_encoder, vit_blocks
from comtip_fast.runtime import devices
from comtip_fast.training import task
from comtip_fast.training.task import build_task

CPU = torch.device("cpu")


OFFSETS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "2": (
        f"q k v {OFFSETS}",
        "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    ),
    "3": (
        f"q k v {OFFSETS}",
        (
            "seqused_q seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap "
            "num_splits pack_gqa deterministic sm_margin return_attn_probs"
        ),
    ),
    "4": (
        "q k v",
        (
            f"qv {OFFSETS} min_seqlen_k seqused_q seqused_k gather_kv_indices page_table softmax_scale causal window_size "
            "learnable_sink softcap num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod block_sparse_tensors "
            "aux_tensors aux_scalars return_lse scheduler_metadata seqlen_k_per_split disable_scheduler_metadata "
            "gather_bwd_recompute_p gather_bwd_token_chunk"
        ),
    ),
}
"""Parameters of ``flash_attn_varlen_func`` without and with a default: flash-attn 2.8.3, ``hopper/flash_attn_interface.py`` and
flash-attn-4 4.0.0b36. Release 4 returns the log-sum-exp as well."""
MODULES = {"2": "flash_attn", "3": "flash_attn_interface", "4": "flash_attn.cute"}


def flash(release: str) -> Callable[..., Any]:
    """Return a stand-in with the signature of a release; it computes on any device and refuses what its kernels refuse."""
    required, optional = (names.split() for names in SIGNATURES[release])
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind) for n in required]
    signature = inspect.Signature([*parameters, *(inspect.Parameter(n, kind, default=None) for n in optional)])

    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        assert {*given} == {"q", "k", "v", *OFFSETS.split(), "deterministic"}
        assert given["deterministic"] is True
        assert given["cu_seqlens_q"] is given["cu_seqlens_k"]
        assert given["max_seqlen_q"] == given["max_seqlen_k"]
        out = _checked(given["q"], given["k"], given["v"], given["cu_seqlens_q"], given["max_seqlen_q"])
        return (out, None) if release == "4" else out

    flash_attn_varlen_func.__signature__ = signature  # type: ignore[attr-defined]
    return flash_attn_varlen_func


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


STAND_INS: dict[str, tuple[str, Callable[..., Any]]] = {
    **{f"flash {release}": ("flash_varlen", flash(release)) for release in SIGNATURES},
    "varlen": ("torch_varlen", varlen_attn),
}


def test_the_stand_in_has_the_signature_of_torchs_varlen():
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.skip("this torch has no varlen attention")
    real = list(inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters.values())
    ours = list(inspect.signature(varlen_attn).parameters.values())
    assert [p.name for p in real[: len(ours)]] == [p.name for p in ours]
    assert all(p.default is not inspect.Parameter.empty for p in real[len(ours) :])


@pytest.mark.parametrize("release", SIGNATURES)
def test_the_stand_in_has_the_signature_of_flash_attn(release: str):
    try:
        module = importlib.import_module(MODULES[release])
    except (ImportError, OSError, RuntimeError):
        pytest.skip(f"flash-attn {release} is not installed")
    real = inspect.signature(module.flash_attn_varlen_func).parameters
    required, optional = SIGNATURES[release]
    assert [n for n, p in real.items() if p.default is inspect.Parameter.empty] == required.split()
    assert [n for n, p in real.items() if p.default is not inspect.Parameter.empty] == optional.split()


def test_every_flash_module_has_a_signature():
    assert sorted(MODULES.values()) == sorted(peers.FLASH_MODULES)


def test_a_flash_attn_that_cannot_be_used_hides_no_older_one(monkeypatch: pytest.MonkeyPatch):
    """The early flash-attn 4 in wheels of flash-attn 2, and packages that raise when they are imported."""
    two = flash("2")

    def early(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        raise AssertionError

    def found_with(newer: Any) -> Callable[..., Any] | None:
        def load(name: str) -> Any:
            if name == MODULES["2"]:
                return SimpleNamespace(flash_attn_varlen_func=two)
            if isinstance(newer, Exception):
                raise newer
            return newer

        monkeypatch.setattr(peers.importlib, "import_module", load)
        peers.flash_varlen.cache_clear()
        return peers.flash_varlen()

    try:
        assert found_with(SimpleNamespace(flash_attn_varlen_func=early)) is two
        assert found_with(SimpleNamespace()) is two
        assert found_with(AttributeError("module 'cutlass' has no attribute 'cute'")) is two
        two = None
        assert found_with(SimpleNamespace(flash_attn_varlen_func=early)) is early  # refused by name when it is called
    finally:
        peers.flash_varlen.cache_clear()


@pytest.mark.parametrize("name", STAND_INS)
def test_views_of_one_projection_and_many_sentences(name: str, monkeypatch: pytest.MonkeyPatch):
    """The qkv form, forward and backward, beyond the sentences of one launch."""
    calls, (finder, function) = [], STAND_INS[name]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    counted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    monkeypatch.setattr(peers, finder, lambda: counted)
    monkeypatch.setattr(peers, "can_peer", lambda like: like.dtype == torch.bfloat16)
    monkeypatch.setattr(peers, "MAX_SENTENCES", 3)
    length = torch.tensor([3, 5, 2, 4, 6, 3, 4])
    start = torch.randn(int(length.sum()), 3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {}
    for impl in (name.split(maxsplit=1)[0], "reference"):
        qkv = start.clone().requires_grad_()
        out = packed_attention_qkv(qkv, length, longest=6, impl=impl)
        out.float().square().sum().backward()
        found[impl] = (out.detach().float(), qkv.grad.float())
    assert calls == [name] * 3
    for ours, want in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-2, atol=2e-2)


def step(overrides: list[str]) -> dict[str, Tensor]:
    """Run one step in bf16; return the loss and the gradients of the sentence encoder."""
    config = load_config(None, [*overrides, "train.precision=bf16", "text.depth=2", "loss.paat.adversary=random"])
    task = build_task(config, CPU)
    batch = task.batch(task.batches(0)[0], 1, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = task.losses(task.module.train(), batch)
    losses["loss"].backward()
    return {"loss": losses["loss"].detach()} | {n: p.grad for n, p in task.model.genes.named_parameters()}


@pytest.mark.parametrize("name", [*STAND_INS, "sdpa"])
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
    got = step([*tiny_overrides, f"text.attention={name.split(maxsplit=1)[0]}"])
    assert calls == [name] * (2 if name in STAND_INS else 0)  # one per block
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (got[key] - value).norm() <= 0.05 * value.norm(), key  # bf16 rounds differently


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "text.attention=flash: .*flash-attn, which cannot be imported.*set text.attention=auto"),
        (
            "varlen",
            "=varlen: varlen needs torch.nn.attention.varlen; install a newer PyTorch, or set text.attention=auto$",
        ),
        ("triton", "=triton: triton cannot run on cpu: it needs a CUDA device .*for tests.; set text.attention=auto$"),
    ],
)
def test_what_is_not_there_is_refused_before_training(
    name: str, message: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "flash_varlen", lambda: None)
    monkeypatch.setattr(peers, "torch_varlen", lambda: None)
    with pytest.raises(ValueError, match=message):
        build_task(load_config(None, [*tiny_overrides, f"text.attention={name}"]), CPU)


def test_the_fixes_of_the_kernels_become_settings() -> None:
    cast = "impl='flash' needs fp16 or bf16 on a CUDA device, not torch.float32 on cpu; cast the operands and move them, or use impl='auto'"
    assert task._in_settings(f"packed_attention: {cast}", "flash") == (
        "flash needs fp16 or bf16 on a CUDA device, not torch.float32 on cpu; train on a GPU with train.precision=bf16, or set "
        "text.attention=auto"
    )
    old = "Triton 3.6.0 cannot compile the kernels for sm_100; install a PyTorch with Triton 3.8 or newer, or use impl='reference'"
    assert task._in_settings(f"packed_attention: {old}", "auto") == old.removesuffix(", or use impl='reference'")


def test_flash_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "flash_varlen", lambda: flash("2"))
    with pytest.raises(ValueError, match=r"needs fp16 or bf16 on a CUDA device, not torch.float32 on cpu"):
        attention_name("flash", CPU, torch.float32, 18)


def test_doctor_and_log_name_the_implementation(tiny_overrides: list[str], caplog: pytest.LogCaptureFixture):
    text = "text.attention=auto runs cpu; sdpa can be chosen"
    assert _attention().detail == f"{text}; the image encoder runs sdpa (flash)"
    with caplog.at_level("INFO", "comtip_fast"):
        build_task(load_config(None, [*tiny_overrides, "text.attention=sdpa"]), CPU)
    assert "attention of the sentence encoder: sdpa" in caplog.messages
    assert "attention of the image encoder: sdpa (flash)" in caplog.messages
    assert not any("fused" in message for message in caplog.messages)


def test_doctor_and_log_name_fused_blocks(
    tiny_overrides: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    kernels = importlib.import_module("comtip_kernels.packed_attention")  # the package has a function of this name
    for module in (kernels, comtip):
        monkeypatch.setattr(module, "runs_kernels", lambda device: True)
    monkeypatch.setattr(kernels, "IMAGE_TOKENS", kernels.IMAGE_TOKENS | {"tf32x3": 64})
    text = "triton in fused blocks (images of up to 64 tokens), otherwise sdpa (flash)"
    assert _attention().detail.endswith(f"; the image encoder runs {text}")
    with caplog.at_level("INFO", "comtip_fast"):
        build_task(load_config(None, tiny_overrides), CPU)
    assert "blocks of the sentence encoder and the image encoder: fused" in caplog.messages
    assert "attention of the image encoder: triton" in caplog.messages


def test_the_backend_of_the_image_encoder_is_the_one_that_runs(tiny_overrides: list[str]):
    model = build_task(load_config(None, tiny_overrides), CPU).model
    x = torch.rand(2, model.vision.n_patches, model.vision.width)
    for backend, name in ((SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")):
        with sdpa_kernel(backend), torch.profiler.profile() as profile:
            assert model.vision.attention_name(CPU, torch.float32) == f"sdpa ({name})"
            model.vision.blocks[0](x)
        ran = {e.key for e in profile.key_averages()}
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (name == "flash")
        assert ("aten::_scaled_dot_product_attention_math" in ran) == (name == "math")
    model.vision.blocks[0].attn.fused_attn = False
    assert model.vision.attention_name(CPU, torch.float32) == "eager"
    assert vit_blocks.attention_name(torch.nn.Linear(2, 2), 4, CPU, torch.float32) == "timm"


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
    task = build_task(load_config(None, [*tiny_overrides, "text.depth=4"]), CPU)
    task.step.encode(task.model, task.batch(task.batches(0)[0], 1, 0))
    assert len(seen) == 3  # the last block has one query per sentence
    assert all(t is seen[0] for t in seen)
