"""`python -m benchmarks instructions`: what is counted of a step's machine code, and the sources that are compiled."""

import pytest

from benchmarks import __main__ as command
from benchmarks.instructions import PATHS, Kernel
from benchmarks.sass import StepCode, step_codes

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
    [[found]] = step_codes(sass([*BEFORE, *STEP, *AFTER]))
    assert found == StepCode(loop=14, way=11, addresses=3, products=1, first_product=8, state_store=10)


def test_within_a_cta_the_way_is_from_barrier_to_barrier():
    step = ["FFMA R1, R2, R3, R1", "STS [R4], R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "STG.E desc[UR4][R6.64], R1"]
    short = StepCode(loop=5, way=5, addresses=0, products=1, first_product=2, state_store=3)
    assert step_codes(sass([*BEFORE, *step, "@P0 BRA 0x20", "EXIT"])) == [[short]]
    # A loop around it, of tiles, is none of steps; another one of steps is.
    loops = ["NOP", *step, "@P0 BRA 0x30", "NOP", *step, "@P0 BRA 0x80", "@P1 BRA 0x20"]
    code = sass([*BEFORE, *loops, "EXIT"])
    longer = StepCode(loop=6, way=6, addresses=0, products=1, first_product=3, state_store=4)
    assert step_codes(code) == [[short], [longer]]


def test_code_for_several_numbers_of_sequences_counts_as_so_many_steps():
    product, store = "FFMA R1, R2, R3, R1", "STS [R4], R1"
    # 20: to the code for one sequence, 70; or for two, 40 to 60; or past both. What they have in common is at 80.
    step = ["@P1 BRA 0x70", "@P2 BRA 0x80", product, product, "BRA 0x80", product, product, store, "BAR.SYNC 0x0"]
    one = StepCode(loop=6, way=6, addresses=0, products=2, first_product=2, state_store=4)
    two = StepCode(loop=9, way=9, addresses=0, products=3, first_product=3, state_store=7)
    assert step_codes(sass([*BEFORE, *step, "@P0 BRA 0x20", "EXIT"])) == [[one, two]]


def test_a_kernel_without_steps_has_none():
    assert step_codes(sass([*BEFORE, "FFMA R1, R2, R3, R1", "EXIT"])) == []


@pytest.mark.parametrize("path", PATHS)
def test_a_source_compiles_one_kernel(path):
    source = Kernel(path, "lstm", "tf32", backward=True).source
    assert source.count("Parameters") == 1 and "Backward<" in source and "Cell::lstm, Tf32, true" in source
    assert ("OneSequence" in source) == (path == "one_sequence")


def test_a_kernel_that_there_is_not_is_refused(capsys):
    assert command.main(["instructions", "--path", "one_sequence", "--dtype", "bfloat16", "tf32"]) == 2
    assert "one_sequence has kernels in float32 alone: --dtype float32" in capsys.readouterr().err
