"""Classes of the instructions of a kernel's machine code, and the programs that one multiprocessor can hold."""

from __future__ import annotations

import re
from collections import Counter
from math import ceil

CLASSES = {
    "tensor": r"HMMA|HGMMA|IMMA|DMMA|QGMMA|UTC\w*MMA",
    "special": r"MUFU",
    "local": r"LDL|STL",
    "memory": r"LDG|STG|LD|ST|LDGSTS|UTMA\w*|UBLKCP|ATOM|ATOMG|RED",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|SHFL|LDTM|STTM",
    "waiting": r"BAR|DEPBAR|LDGDEPBAR|SYNCS|WARPGROUP|WARPSYNC|MEMBAR|FENCE|NANOSLEEP|UTCBAR|UTMACMDFLUSH",
    "branch": r"BRA|BRX|BSSY|BSYNC|BREAK|CALL|RET|EXIT|JMP",
    "fp": r"F\w+|H(?:ADD|MUL|FMA|SET|SETP|MNMX)\w*|I2F\w*",
}
"""{class: regular expression of its mnemonics}, tried in this order. Everything else is ``integer``: addresses, indices, comparisons,
moves and selections."""
INTEGER = "integer"
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_PATTERNS = {name: re.compile(pattern) for name, pattern in CLASSES.items()}
_SHAPES = (re.compile(r"\bHGMMA\.(\d+x\d+x\d+)"), re.compile(r"\bHMMA\.(\d+)"))
_KINDS = {"HGMMA": r"HGMMA", "UTCMMA": r"UTC\w*MMA", "HMMA": r"HMMA"}
_NOTHING = {"NOP"}

REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""Registers of a multiprocessor, and its most resident warps and programs, on sm_80, sm_90 and sm_100."""
SHARED_KIB = {80: 164, 90: 228, 100: 228}
"""Shared memory of a multiprocessor; each program occupies 1 KiB more than it uses."""


def classes(code: str) -> dict[str, int]:
    """Return {class: number of instructions} of a disassembly by ``nvdisasm``; instructions that only fill space are not counted."""
    counts = Counter(dict.fromkeys((*CLASSES, INTEGER), 0))
    for mnemonic in _LINE.findall(code):
        if mnemonic not in _NOTHING:
            counts[next((name for name, p in _PATTERNS.items() if p.fullmatch(mnemonic)), INTEGER)] += 1
    return dict(counts)


def tensor_kind(code: str) -> str:
    """Return the kind of the tensor-core instructions, ``HGMMA``, ``UTCMMA`` or ``HMMA``; of several, the first; ``-`` without any."""
    found = set(_LINE.findall(code))
    return next((kind for kind, pattern in _KINDS.items() if any(re.fullmatch(pattern, m) for m in found)), "-")


def tensor_shape(code: str) -> str:
    """Return the shape of the tensor-core instructions, M x N x K, as ``64x128x16``; if there are several, the widest.

    The instructions of sm_100 do not show theirs: the result is ``-``, as without tensor cores.
    """
    found = set()
    for shape in _SHAPES[0].findall(code):
        found.add(tuple(int(n) for n in shape.split("x")))
    for digits in _SHAPES[1].findall(code):  # 16816 is 16 x 8 x 16
        found.add((int(digits[:2]), int(digits[2]), int(digits[3:])))
    return "x".join(map(str, max(found))) if found else "-"


def resident_programs(arch: int, registers: int, warps: int, shared_kib: int) -> int:
    """Return how many programs of a kernel one multiprocessor holds at a time.

    Parameters
    ----------
    arch
        80, 90 or 100.
    registers
        Registers per thread, allocated in multiples of 8.
    warps
        Warps of a program.
    shared_kib
        Shared memory of a program in KiB.
    """
    by_registers = REGISTERS // (ceil(registers / 8) * 8 * 32 * warps)
    return min(by_registers, WARPS // warps, PROGRAMS, SHARED_KIB[arch] // (shared_kib + 1))
