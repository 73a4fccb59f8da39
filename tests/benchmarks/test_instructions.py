"""`python -m benchmarks instructions`: what is counted of a step's machine code, and the sources that are compiled."""

import pytest

from benchmarks.instructions import Kernel
from benchmarks.sass import StepCode, step_code

BEFORE = ["BAR.SYNC 0x0", "LDS R1, [R2]"]  # 00, 10
# 20 to d0: two ways to the product, a loop within, and a wait that spins behind the loop.
STEP = [
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",
    "@!P0 BRA 0xf0",
    "IMAD.WIDE.U32 R4, R5, R6, RZ",
    "@P1 BRA 0x90",
    "IADD3 R8, P2, R4, R9, RZ",
    "IADD3.X R9, RZ, R5, R3, P2, !PT",
    "NOP",
    "HMMA.16816.F32.BF16 R12, R4, R16, R12",
    "@P3 BRA 0x90",
    "STAS.128 [R4.64], R12",
    "STG.E desc[UR10][R26.64], R12",
    "@P4 BRA 0x20",
]
AFTER = ["EXIT", "@!P0 BRA 0xf0", "BRA 0x40"]


def sass(lines: list[str]) -> str:
    return "".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */\n" for i, line in enumerate(lines))


def test_the_way_of_a_step_ends_where_it_is_sent():
    # Behind the wait: 30, then f0 and 100, 40 to 80, and the product, 90.
    assert step_code(sass([*BEFORE, *STEP, *AFTER])) == StepCode(
        loop=14, way=11, addresses=3, products=1, first_product=8, state_store=10
    )


def test_within_a_cta_the_way_is_from_barrier_to_barrier():
    step = ["FFMA R1, R2, R3, R1", "STS [R4], R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "STG.E desc[UR4][R6.64], R1"]
    code = sass([*BEFORE, *step, "@P0 BRA 0x20", "EXIT"])
    assert step_code(code) == StepCode(loop=5, way=5, addresses=0, products=1, first_product=2, state_store=3)


def test_a_kernel_without_steps_has_none():
    assert step_code(sass([*BEFORE, "FFMA R1, R2, R3, R1", "EXIT"])) is None


@pytest.mark.parametrize("path", ["single_cta", "cluster", "persistent_grid"])
def test_a_source_compiles_one_kernel(path):
    source = Kernel(path, "lstm", "tf32", backward=True).source
    assert source.count("Parameters") == 1 and "Backward<" in source and "Cell::lstm, Tf32, true" in source
