"""Ahead-of-time compilation of a Triton kernel without a GPU, and inspection of the machine code.

``triton.compile`` with an ``ASTSource`` and a ``GPUTarget`` needs no driver. The hints that the JIT would add (pointers and
sizes divisible by 16, strides of 1 as constants) are given explicitly: without them a different program is compiled. Registers and
stack come from ``cuobjdump``, instructions from ``nvdisasm``; both are part of the Triton wheel.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from comtip_kernels.ledger import instructions

SHARED_LIMIT_KIB = {80: 99, 90: 227, 100: 227}
"""Maximum shared memory of a block by architecture; a kernel that needs more compiles, but fails when it is loaded.

That of sm_80 is the limit of sm_86 and sm_89 (GeForce RTX 30 and 40, A10, L4, L40), which take the same tiles; an A100 has 163 KiB.
"""


INSTRUCTION_CLASSES = ("memory", "shared", "waiting", "branch", "fp", "integer")
"""Classes of instructions with a field of their own name in :class:`LedgerRow`."""


@dataclass(frozen=True)
class LedgerEntry:
    """One kernel in one configuration, as it is launched."""

    op: str
    name: str
    kernel: Any
    types: Mapping[str, str]
    """Type of every argument that is not a constant, such as ``*bf16``, ``*u8``, ``i32`` and ``fp32``."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Arguments that the JIT knows to be divisible by 16."""
    wants_tensor_cores: bool = True

    @property
    def signature(self) -> str:
        """The variant that the JIT compiles: ``name=type`` or ``name=constant``; ``:16`` marks a multiple of 16."""
        words = [self.kernel.__name__]
        for name in self.kernel.arg_names:
            if name in self.constants:
                words.append(f"{name}={plain_constant(self.constants[name])!r}")
            else:
                words.append(f"{name}={self.types[name]}{':16' if name in self.aligned else ''}")
        return " ".join([*words, f"warps={self.num_warps}", f"stages={self.num_stages}"])

    def source(self, arch: int) -> str:
        """Return a hash of all that the machine code depends on: the kernel's source, its signature, the architecture and the compiler."""
        facts = (self.kernel.cache_key, self.signature, str(arch), triton.__version__)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def plain_constant(value: Any) -> Any:
    """Return the value of a ``tl.constexpr``, and any other value as it is."""
    return value.value if isinstance(value, triton.language.constexpr) else value


@dataclass(frozen=True)
class LedgerRow:
    """One entry compiled for one architecture; instructions are counted in the code, not at run time."""

    op: str
    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    """Number of loads and stores of local memory."""
    shared_kib: int
    mma: str
    """``HGMMA``, ``UTCMMA``, ``HMMA`` or ``-``: the first of them that the code has."""
    mma_count: int
    """Tensor-core instructions of every kind: small products of a kernel can be HMMA while its large ones are not."""
    loads_128: int
    """Global loads of 128 bits, including asynchronous copies to shared memory."""
    async_copies: int
    special: int = 0
    """Special-function instructions (``MUFU``): exponentials, logarithms, reciprocals, square roots."""
    warps: int = 0
    """Warps of a program."""
    resident: int = 0
    """Programs that one multiprocessor holds at a time (:func:`comtip_kernels.ledger.instructions.resident_programs`)."""
    mma_shape: str = ""
    """M x N x K of the widest tensor-core instruction; ``-`` without any, and on sm_100, whose instructions do not show it."""
    memory: int = 0
    """Loads and stores of global memory, asynchronous copies included; this field and those below count by the classes of
    :data:`comtip_kernels.ledger.instructions.CLASSES`."""
    shared: int = 0
    """Loads and stores of shared and tensor memory, and exchanges between threads."""
    waiting: int = 0
    """Barriers and fences."""
    branch: int = 0
    fp: int = 0
    """Floating-point instructions but special functions and tensor cores."""
    integer: int = 0
    """All other instructions."""
    source: str = ""
    """Hash returned by :meth:`LedgerEntry.source`; an entry with the same hash need not be compiled again."""


def compile_entry(entry: LedgerEntry, arch: int) -> LedgerRow:
    """Compile one entry for ``sm_<arch>`` and count instructions.

    Raises
    ------
    RuntimeError
        If ``cuobjdump`` prints no resource usage.
    subprocess.CalledProcessError
        If ``cuobjdump`` or ``nvdisasm`` fails.
    """
    names = list(entry.kernel.arg_names)
    signature = {n: "constexpr" if n in entry.constants else entry.types[n] for n in names}
    constants = {(names.index(k),): v for k, v in entry.constants.items()}
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in entry.aligned}
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
        code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(
            f"{entry.op}/{entry.name}: cuobjdump printed no resource usage: {usage[:300]}; install another Triton"
        )
    of = instructions.classes(code)
    registers, shared_kib = int(found[1]), -(-int(built.metadata.shared) // 1024)
    return LedgerRow(
        entry.op,
        entry.name,
        arch,
        registers,
        int(found[2]),
        of["local"],
        shared_kib,
        instructions.tensor_kind(code),
        of["tensor"],
        len(re.findall(r"\bLD(?:G|GSTS)\.E\S*128", code)),
        len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
        of["special"],
        entry.num_warps,
        instructions.resident_programs(arch, registers, entry.num_warps, shared_kib),
        instructions.tensor_shape(code),
        **{name: of[name] for name in INSTRUCTION_CLASSES},
        source=entry.source(arch),
    )


def _tool(*words: object) -> str:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, check=True).stdout
