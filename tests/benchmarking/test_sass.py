"""Reading machine code: which loops count, how wide their loads are, how many are under way; programs that fit."""

import pytest

from benchmarks.counts.sass import Instruction, code, outstanding, resident_programs, tile_loops


def listing(text: str) -> list[Instruction]:
    """One instruction a line: name and operands, at addresses 16 bytes apart."""
    found = []
    for i, line in enumerate(text.strip().splitlines()):
        name, _, operands = line.strip().partition(" ")
        found.append(Instruction(16 * i, name, tuple(part.strip() for part in operands.split(","))))
    return found


LOOP = listing(
    """
    LDG.E R40, desc[UR4][R2.64]
    LDG.E.128 R4, desc[UR4][R2.64]
    LDG.E.128 R8, desc[UR4][R12.64]
    IADD3 R2, P0, R2, UR6, RZ
    FADD R16, R5, R16
    LDG.E.64 R20, desc[UR4][R12.64]
    FADD R17, R9, R21
    STG.E.64 desc[UR4][R12.64], R16
    BRA 0x10
    EXIT
    """
)


def test_a_loop_over_tiles_is_what_counts():
    assert [i.address for i in tile_loops(LOOP)[0]] == list(range(16, 9 * 16, 16))
    found = code(LOOP)
    assert (found.instructions, found.tile_instructions) == (10, 8)
    assert found.load_bytes == (16 + 16 + 8) / 3  # the load before the loop is none of a tile


def test_the_inner_of_two_loops_counts_and_loops_without_loads_do_not():
    nested = listing("LDG.E R4, desc[R2.64]\nFADD R4, R4, R4\nBRA 0x0\nFADD R5, R4, R4\nBRA 0x30\nBRA 0x0")
    assert [len(loop) for loop in tile_loops(nested)] == [3]
    straight = listing("LDG.E.U16 R4, desc[R2.64]\nSTG.E.U16 desc[R2.64], R4\nEXIT")
    assert tile_loops(straight) == [straight] and code(straight).load_bytes == 2


def test_loads_are_under_way_until_one_is_needed():
    """32 bytes before the first addition; then the second load's 16 and another's 8."""
    assert outstanding(tile_loops(LOOP)[0]) == 32
    one_by_one = listing("LDG.E.128 R4, desc[R2.64]\nFADD R8, R7, R7\nLDG.E.128 R4, desc[R2.64]\nFADD R8, R4, R7")
    assert outstanding(one_by_one) == 16
    stored = listing("LDG.E.64 R4, desc[R2.64]\nSTG.E.64 desc[R2.64], R4\nLDG.E.64 R6, desc[R2.64]")
    assert outstanding(stored) == 8


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        (128, 8, 2048, 2),  # 65,536 registers
        (129, 8, 0, 1),  # counted in eights
        (32, 8, 0, 8),  # 64 warps
        (32, 1, 0, 32),
        (40, 4, 100 * 1024, 1),
        (168, 4, 0, 3),  # 12 warps, 3 in each quarter
    ],
)
def test_programs_that_a_multiprocessor_holds(registers, warps, shared, programs):
    assert resident_programs(80, registers, warps, shared) == programs
