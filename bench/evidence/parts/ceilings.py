"""Part ``ceilings``: versions, and maximum rates of this GPU, with which the other parts are compared."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
import triton
import triton.language as tl

from bench.evidence.bare import replace_pydantic
from bench.evidence.rows import Row, Rows
from bench.evidence.timing import Time, time_call, time_products

PACKAGES = (
    "numpy",
    "timm",
    "torchvision",
    "deepspeed",
    "flash-attn",
    "liger-kernel",
    "open-clip-torch",
    "nvidia-dali-cuda130",
    "nvidia-nccl-cu13",
    "nvidia-cublas",
    "pydantic",
    "pytest",
)


@triton.jit
def read_again(x_ptr, out_ptr, n_blocks, reads, BLOCK: tl.constexpr):
    """Read ``reads`` blocks of a buffer, beginning at another one in each program; ``.cg`` passes the first-level cache."""
    pid = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(reads):
        block = (pid * 97 + i) % n_blocks
        total += tl.load(x_ptr + block * BLOCK + at, cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + at, total)


def run(rows: Rows, dry: bool) -> None:
    """Send versions and ceilings."""
    device = "cpu" if dry else "cuda"
    versions(rows, dry)
    tflop, time, n = matrix_products(dry)
    rows.add(_rate("matrix product", tflop, time, "TFLOP/s", size=f"{n}^3", dtype="bf16"))
    tf32_product(rows, n, device)
    copy(rows, 2**20 if dry else 2**30, device)
    read_l2(rows, device)


def tf32_product(rows: Rows, n: int, device: str) -> None:
    """Send the rate of one large matrix product in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    time = time_call(lambda: a @ b, device)
    torch.set_float32_matmul_precision(before)
    rows.add(_rate("matrix product", 2.0 * n**3 * 1e-12, time, "TFLOP/s", size=f"{n}^3", dtype="tf32"))


def copy(rows: Rows, size: int, device: str) -> None:
    """Send the rate of a copy of ``size`` bytes in device memory."""
    x = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    time = time_call(lambda: y.copy_(x), device, cold=False)
    rows.add(_rate("copy", 2.0 * size * 1e-12, time, "TB/s", size=f"{size >> 20} MiB", note="read and written"))


def matrix_products(dry: bool) -> tuple[float, Time, int]:
    """Return the TFLOP, the time and the side of one large square matrix product in bf16."""
    n = 64 if dry else 8192
    return 2.0 * n**3 * 1e-12, time_products(((n, n, n),), "cpu" if dry else "cuda", budget_ms=300), n


def read_l2(rows: Rows, device: str) -> None:
    """Send the rate of reads that hit the L2 cache."""
    if device == "cpu":
        size, programs, reads, block = 2**14, 2, 3, 256
    else:
        properties = torch.cuda.get_device_properties(0)
        size, programs = properties.L2_cache_size // 4, 8 * properties.multi_processor_count
        reads, block = 2048, 2048
    n_blocks = size // (4 * block)
    x = torch.randn(n_blocks * block, device=device)
    out = torch.empty(programs * block, device=device)
    time = time_call(lambda: read_again[(programs,)](x, out, n_blocks, reads, BLOCK=block), device, cold=False)
    moved = 4.0 * programs * reads * block
    if device == "cpu":  # in the interpreter, check that it has read the counted bytes
        first = torch.stack([x[((i) % n_blocks) * block :][:block] for i in range(reads)]).sum(0)
        torch.testing.assert_close(out[:block], first)
    rows.add(_rate("L2 read", moved * 1e-12, time, "TB/s", size=f"{4 * n_blocks * block >> 10} KiB, {reads} times"))


def _rate(name: str, amount: float, time: Time, unit: str, **where: str) -> Row:
    low, high = amount / (time.high * 1e-3), amount / (time.low * 1e-3)
    return Row(name, "rate", amount / time.seconds, unit, low=low, high=high, **where)  # type: ignore[arg-type]


def versions(rows: Rows, dry: bool) -> None:
    """Send the versions of installed packages, and the properties of the GPU."""
    rows.add(Row("python", "version", platform.python_version()))
    if replace_pydantic():
        rows.add(Row("pydantic", "replaced", "yes", note="configs are read without checks"))
    rows.add(Row("CUDA of PyTorch", "version", str(torch.version.cuda)))
    for name in PACKAGES:
        try:
            rows.add(Row(name, "version", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.add(Row(name, "version", "not installed"))
    if dry:
        return
    properties = torch.cuda.get_device_properties(0)
    for name in ("total_memory", "multi_processor_count", "L2_cache_size", "major", "minor"):
        rows.add(Row(f"device {name}", "property", str(getattr(properties, name, "unknown"))))
    if torch.distributed.is_nccl_available():
        rows.add(Row("NCCL", "version", ".".join(map(str, torch.cuda.nccl.version()))))
