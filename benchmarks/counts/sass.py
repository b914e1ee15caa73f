"""What a compiled kernel does per tile, from its machine code (SASS): instructions, width of loads, loads in flight.

The tile loops of a kernel are its innermost loops that read global memory; a kernel without any works on one tile, and
counts as a whole. Counts are static: of the code of one thread, each instruction once.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LOADS = ("LDG", "LDGSTS")
_WITHOUT_RESULT = ("ST", "STG", "STS", "RED", "BRA", "EXIT", "LDGSTS")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """How many a load or store of one thread moves."""
        found = re.search(r"\.[USB]?(8|16|32|64|128)\b", self.name)
        return int(found[1]) // 8 if found else 4

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        return int(self.operands[-1], 16) if self.kind == "BRA" and self.operands[-1].startswith("0x") else None

    @property
    def written(self) -> range:
        """Registers that a load fills."""
        return _registers(self.operands[0], max(self.bytes // 4, 1))

    @property
    def read(self) -> set[int]:
        sources = self.operands if self.kind in _WITHOUT_RESULT else self.operands[1:]
        return {r for operand in sources for found in re.findall(r"\bR\d+(?:\.64)?", operand) for r in _named(found)}


@dataclass(frozen=True)
class Code:
    """`instructions` of the whole kernel; of its tile loops, all together, the instructions and the mean width of
    loads in bytes; and the most bytes that a thread has asked for before it needs the first of them."""

    instructions: int
    tile_instructions: int
    load_bytes: float
    outstanding: int


def code(instructions: Sequence[Instruction]) -> Code:
    loops = tile_loops(instructions)
    loads = [i.bytes for loop in loops for i in loop if i.kind in _LOADS]
    mean = sum(loads) / len(loads) if loads else 0.0
    return Code(len(instructions), sum(map(len, loops)), mean, max(map(outstanding, loops)))


def tile_loops(instructions: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The innermost loops with loads from global memory; all of the code if there is none."""
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    spans = [
        (place[i.target], place[i.address])
        for i in instructions
        if i.target is not None and i.target <= i.address and i.target in place
    ]
    spans = [(a, b) for a, b in spans if any(i.kind in _LOADS for i in instructions[a : b + 1])]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [instructions[a : b + 1] for a, b in sorted(set(inner))] or [instructions]


def outstanding(loop: Sequence[Instruction]) -> int:
    """The most bytes of loads that are under way when an instruction needs one of them."""
    pending: dict[range, int] = {}
    most = 0
    for instruction in loop:
        needed = instruction.read
        waited = [registers for registers in pending if needed.intersection(registers)]
        if waited:
            most = max(most, sum(pending.values()))
            for registers in waited:
                del pending[registers]
        if instruction.kind == "LDG":
            pending[instruction.written] = instruction.bytes
    return max(most, sum(pending.values()))


def disassemble(cubins: Sequence[bytes], architecture: int) -> list[list[Instruction]]:
    """The instructions of each cubin's one kernel, without the padding after the last, by Triton's own nvdisasm."""
    from triton import knobs

    texts = [_text(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")  # of all: the program takes longer to start than to read a kernel
        path.write_bytes(b"".join(texts))
        command = [knobs.nvidia.nvdisasm.path, "--binary", f"SM{architecture}", path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(int(a, 16), name, operands) for a, name, operands in _LINE.findall(listing)]
    kernels, start, taken = [], 0, 0
    for text in texts:
        count = len(text) // 16  # bytes of an instruction
        own = lines[taken : taken + count]
        assert len(own) == count and own[0][0] == start, "nvdisasm's listing is not of these kernels"
        kernels.append([_instruction(address - start, name, rest, start) for address, name, rest in own])
        start, taken = start + len(text), taken + count
    return [_trimmed(kernel) for kernel in kernels]


def _instruction(address: int, name: str, operands: str, start: int) -> Instruction:
    split = tuple(part.strip() for part in operands.split(",")) if operands else ("",)
    if name.startswith("BRA") and split[-1].startswith("0x"):
        split = (*split[:-1], hex(int(split[-1], 16) - start))
    return Instruction(address, name, split)


def _trimmed(kernel: list[Instruction]) -> list[Instruction]:
    """Without the branch to itself and the empty instructions that a kernel ends with."""
    end = len(kernel)
    while end and (kernel[end - 1].kind == "NOP" or kernel[end - 1].target == kernel[end - 1].address):
        end -= 1
    return kernel[:end]


def _registers(operand: str, count: int) -> range:
    first = int(found[1]) if (found := re.match(r"R(\d+)", operand)) else -1
    return range(first, first + count) if found else range(0)


def _named(register: str) -> range:
    return _registers(register, 2 if register.endswith(".64") else 1)


def _text(cubin: bytes) -> bytes:
    """The section .text.<kernel> of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    found = [s for s in sections if cubin.startswith(b".text.", strings + s[0])]
    assert len(found) == 1, "not a cubin of one kernel"
    return cubin[found[0][4] : found[0][4] + found[0][5]]


# What a multiprocessor has: registers, in so many partitions, and warps; programs, and what each takes of shared memory
# besides its own.
_REGISTERS, _PARTITIONS, _WARPS, _PROGRAMS, _OWN_SHARED = 65536, 4, 64, 32, 1024
_SHARED = {80: 164 * 1024, 90: 228 * 1024}


def resident_programs(architecture: int, registers: int, warps: int, shared: int) -> int:
    """How many programs of `warps` warps a multiprocessor holds at once, by CUDA's occupancy calculator's rules."""
    per_warp = -(-registers // 8) * 8 * 32  # registers are given to warps 256 at a time
    by_registers = _PARTITIONS * (_REGISTERS // _PARTITIONS // per_warp) // warps
    return min(by_registers, _WARPS // warps, _PROGRAMS, _SHARED[architecture] // (shared + _OWN_SHARED))
