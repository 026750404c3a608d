"""Round fp32 to bf16 to nearest even in Triton's interpreter, as a GPU does; the interpreter itself truncates."""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def to_bf16(x: np.ndarray) -> np.ndarray:
        """Return the bit patterns (uint16) of fp32 numbers rounded to nearest even."""
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)

    @pytest.fixture(autouse=True)
    def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
        cast = InterpreterBuilder.cast_impl

        def rounding(self: InterpreterBuilder, src: TensorHandle, dst_type: object) -> TensorHandle:
            if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
                return TensorHandle(to_bf16(src.data), tl.bfloat16)
            return cast(self, src, dst_type)

        monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding)
