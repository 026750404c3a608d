"""A training step of the whole model on the Triton kernels alone: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import prefer
from comtip_kernels.gene_sentence_embedding import triton_kernels as embedding
from comtip_kernels.infonce import triton_kernels as infonce
from comtip_kernels.one_query_attention import triton_kernels as one_query
from comtip_kernels.packed_attention import triton_kernels as attention
from comtip_kernels.sentence_table import triton_kernels as table

from comtip_fast.config.io import load_config
from comtip_fast.training.task import build_task

KERNELS = (
    (embedding, "make_rows"),
    (embedding, "copy_rows"),
    (embedding, "sum_pieces"),
    (embedding, "norm_grads"),
    (infonce, "lse_tiles"),
    (infonce, "grad_tiles"),
    (attention, "attention_forward"),
    (attention, "attention_grads"),
    (one_query, "one_query_forward"),
    (one_query, "one_query_grads"),
    (table, "sampled_dot"),
    (table, "level_gradient"),
    (table, "weighted_sum"),
    (table, "weighted_sum_transpose"),
)


def step(overrides: list[str], impl: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    more = ["panel.min_genes=12", "panel.max_genes=12", "data.batch_size=16", "text.depth=2"]
    task = build_task(load_config(None, [*overrides, *more]), torch.device("cpu"))
    task.module.train()
    with prefer(impl):
        losses, _ = task.losses(task.module, task.batch(task.batches(0)[0], 1, 0))
        losses["loss"].backward()
    return losses, {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}


def test_the_loss_and_every_gradient_are_those_of_the_reference(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    launched = set()
    for module, name in KERNELS:
        kernel = getattr(module, name)

        class Watched:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launched.add(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(module, name, Watched(kernel, name))
    losses, gradients = step(tiny_overrides, "triton")
    assert launched == {name for _, name in KERNELS}
    wanted, wanted_gradients = step(tiny_overrides, "reference")
    for part, value in wanted.items():
        torch.testing.assert_close(losses[part], value, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        error = float((gradients[name] - gradient).norm())
        assert error <= 1e-3 * float(gradient.norm()) + 1e-6, name
