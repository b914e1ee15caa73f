"""Compiling kernels for GPUs that are not here, and reading what the assembler says of them.

`compile_triton` compiles @triton.jit functions for sm_80 and sm_90 in a process of its own, because the tests' process
has Triton's interpreter switched on, and returns a `Resources` per kernel and architecture;
`Resources.assert_no_spills` is the check that every kernel has to pass.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.counts.sass import Code, code, disassemble

ARCHITECTURES = (80, 90)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of one architecture: registers per thread, bytes of spills and of shared memory; and what
    its machine code does, where Triton made it."""

    kernel: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    code: Code | None = None

    def assert_no_spills(self) -> None:
        assert self.spilled == 0, f"{self.kernel} spills {self.spilled} bytes on sm_{self.architecture}"


@dataclass(frozen=True)
class TritonCase:
    """A kernel and one specialisation of it: types of its arguments ("*fp32", "i32"), constants, launch options."""

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    divisible: Sequence[str] = ()  # arguments known to be multiples of 16, as Triton's launcher would find out


def compile_triton(module: str, cases: Sequence[TritonCase], architectures: Sequence[int] = ARCHITECTURES):
    """Resources of every case on every architecture; `module` is an import name such as gdd_fast.kernels.residual."""
    pytest.importorskip("triton")
    request = {"module": module, "cases": [asdict(case) for case in cases], "architectures": list(architectures)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(request), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    entries = json.loads(done.stdout.splitlines()[-1])
    return [Resources(**entry | {"code": Code(**entry["code"])}) for entry in entries]


def _compile_triton_here(module: str, cases: list[dict[str, Any]], architectures: list[int]) -> list[dict[str, Any]]:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    # the assembler's words are those of Triton's own call, with its options; a kernel from the cache would have none
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    kernels = importlib.import_module(module)
    results, cubins = [], []
    for case in cases:
        kernel = getattr(kernels, case["kernel"])
        types = {**case["signature"], **dict.fromkeys(case["constants"], "constexpr")}
        signature = {name: types[name] for name in kernel.arg_names}
        hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case["divisible"]}
        for architecture in architectures:
            source = ASTSource(kernel, signature, constexprs=case["constants"], attrs=hints)
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=case["options"])
            registers, spilled, _ = parse_report(log.getvalue())[0]
            results.append(Resources(case["kernel"], architecture, registers, spilled, compiled.metadata.shared))
            cubins.append(compiled.asm["cubin"])
    for i, architecture in enumerate(architectures):
        every = slice(i, None, len(architectures))
        read = (code(kernel) for kernel in disassemble(cubins[every], architecture))
        results[every] = [replace(entry, code=found) for entry, found in zip(results[every], read, strict=True)]
    return [asdict(entry) for entry in results]


def parse_report(report: str) -> list[tuple[int, int, int]]:
    """(registers, spilled bytes, shared bytes) of every kernel in the output of `ptxas -v`."""
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)]
    used = re.findall(r"Used (\d+) registers(.*)", report)
    shared = [int(found[1]) if (found := re.search(r"(\d+) bytes smem", rest)) else 0 for _, rest in used]
    assert used, f"ptxas reported no kernel:\n{report}"
    return [(int(r), s, m) for (r, _), s, m in zip(used, spills, shared, strict=True)]


if __name__ == "__main__":
    print(json.dumps(_compile_triton_here(**json.load(sys.stdin))))
