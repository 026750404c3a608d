"""Classes of instructions, and the programs that a multiprocessor holds."""

import pytest
from comtip_kernels.ledger.instructions import CLASSES, INTEGER, classes, resident_programs, tensor_kind, tensor_shape

CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0040*/                   LDSM.16.M88.4 R8, [R7] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   FADD R5, R5, R6 ;
        /*0090*/                   F2FP.BF16.F32.PACK_AB R5, R5, R6 ;
        /*00a0*/               @P1 BRA 0x10 ;
        /*00b0*/                   STL [R1], R5 ;
        /*00c0*/                   NOP ;
"""


def test_every_instruction_has_one_class():
    expected = dict.fromkeys((*CLASSES, INTEGER), 1) | {"memory": 2, "fp": 2, INTEGER: 2}
    assert classes(CODE) == expected
    assert sum(expected.values()) == 12  # NOP is not counted


SMALL_PRODUCT = "        /*00d0*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;\n"


def test_products_of_every_kind_are_counted():
    """A kernel whose large products are HGMMA or UTCMMA can have small ones that are HMMA."""
    assert classes(CODE + SMALL_PRODUCT * 3)["tensor"] == 4
    assert tensor_kind(CODE + SMALL_PRODUCT) == "HGMMA"
    assert tensor_kind(SMALL_PRODUCT) == "HMMA"
    assert tensor_kind(SMALL_PRODUCT + CODE.replace("HGMMA", "UTCHMMA")) == "UTCMMA"
    assert tensor_kind(CODE.replace("HGMMA", "FFMA")) == "-"


@pytest.mark.parametrize(
    ("code", "shape"),
    [
        (CODE, "64x128x16"),
        ("HMMA.16816.F32.BF16 R4, R8", "16x8x16"),
        ("HMMA.1688.F32.TF32 R4, R8", "16x8x8"),
        ("HGMMA.64x64x16.F32.BF16 R4 ;\n HGMMA.64x128x16.F32.BF16 R4", "64x128x16"),
        ("UTCHMMA gdesc[UR4]", "-"),
        ("FADD R1, R2, R3", "-"),
    ],
)
def test_shape_of_tensor_core_instructions(code: str, shape: str):
    assert tensor_shape(code) == shape


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "programs"),
    [
        (90, 128, 8, 96, 2),
        (90, 129, 8, 96, 1),  # registers are allocated in eights: 136
        (90, 64, 8, 76, 2),  # 77 KiB each
        (80, 64, 8, 76, 2),
        (80, 64, 8, 82, 1),
        (90, 16, 4, 0, 16),  # 64 warps
        (90, 16, 1, 0, 32),
    ],
)
def test_programs_of_a_multiprocessor(arch: int, registers: int, warps: int, shared: int, programs: int):
    assert resident_programs(arch, registers, warps, shared) == programs
