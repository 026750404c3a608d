"""The implementation under test: the CPU path here, the Triton kernels in the interpreter or on a GPU.

``test_interpreted.py`` runs the shared test files again in a process with TRITON_INTERPRET=1. On a machine with a GPU
``pytest -m gpu tests/kernels`` runs the same cases on the compiled kernels.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Fast:
    """A fast implementation, where it runs, and how close to the reference in fp64 it must be."""

    impl: str
    device: torch.device
    dtype: torch.dtype
    """The widest dtype that it supports."""
    rtol: float
    atol: float

    @property
    def triton(self) -> bool:
        return self.impl == "triton"

    def scalar(self, value: float, dtype: torch.dtype) -> torch.Tensor:
        """Return a scale that requires a gradient: fp64 with fp64 vectors, else fp32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor(value, dtype=wide, device=self.device, requires_grad=True)


CPU = Fast("cpu", torch.device("cpu"), torch.float64, 1e-10, 1e-11)
TRITON = Fast("triton", torch.device("cpu" if INTERPRETING else "cuda"), torch.float32, 2e-5, 1e-5)
FAST = (
    [pytest.param(TRITON, id="triton")]
    if INTERPRETING
    else [
        pytest.param(CPU, id="cpu"),
        pytest.param(TRITON, id="triton", marks=pytest.mark.gpu),
    ]
)


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> Fast:
    return request.param


@pytest.fixture(autouse=True)
def skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def nan_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that a kernel leaves unwritten are NaN."""

    def filled(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> torch.Tensor:
            out = real(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    """fp32 products may use tf32, which the kernels support at more tile sizes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)
