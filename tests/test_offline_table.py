"""docs/kernels_table.md: it holds every kernel that the networks launch, none spills, and it is what Triton makes."""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.launches import PROGRAMS
from benchmarks.offline_table import ARCHITECTURES, read
from benchmarks.shapes import layers
from offline import ROOT

TRITON, ROWS = read()

# Launches are recorded in a process of its own: this one's kernels may be the interpreter's.
_RECORD = """
import json
from benchmarks.offline_table import all_launches
from benchmarks.shapes import layers
print(json.dumps({key: f"{l.operator}.{l.case.kernel}" for key, l in all_launches(layers()).items()}))
"""
_COMPILE = """
import json, sys
from benchmarks.offline_table import all_launches, measure
from benchmarks.shapes import layers
found = all_launches(layers())
print(json.dumps([str(row) for row in measure([found[key] for key in sys.argv[1:]])]))
"""


def run(script: str, *arguments: str):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_kernel_spills():
    spilling = [str(row) for row in ROWS.values() if any(row.spilled)]
    assert not spilling, "\n".join(spilling)
    assert all(len(row.registers) == len(row.shared) == len(ARCHITECTURES) for row in ROWS.values())
    assert all(size <= 160 * 1024 for row in ROWS.values() for size in row.shared)  # of an A100's 163 KiB


def test_every_kernel_that_the_networks_launch_is_in_the_table():
    launched = run(_RECORD)
    missing = sorted({name for key, name in launched.items() if key not in ROWS})
    assert not missing, f"not in the table, run `python -m benchmarks.offline_table --keep`: {missing}"
    assert not ROWS.keys() - launched.keys(), "the table has kernels that nothing launches"
    assert {name.partition(".")[0] for name in launched.values()} == {
        "group_norm_silu", "residual", "attention", "frozen_conv2d_relu", "max_pool2x2", "to_uint8",
    }  # fmt: skip


def _agree(keys: list[str]) -> None:
    if version("triton") != TRITON:
        pytest.skip(f"the table is Triton {TRITON}'s")
    for row in run(_COMPILE, *keys):
        key = row.split("|")[1].strip()
        assert row == str(ROWS[key])


def _first(kernels: int | None) -> list[str]:
    """Keys of the first row of each kernel."""
    first = {row.kernel: key for key, row in reversed(ROWS.items())}
    return list(first.values())[:kernels]


def test_a_sample_compiles_to_what_the_table_says():
    _agree(_first(2))


@pytest.mark.slow
def test_one_of_every_kernel_compiles_to_what_the_table_says():
    _agree(_first(None))


def test_layers_are_those_of_the_papers_networks():
    """The widths, groups and tokens that are known of NCSN++ 32/64, ADM 64, VGG-16 and EfficientNet-lite0."""
    found = layers()
    assert {sum(c.channels) for c in found.norms} >= {128, 192, 256, 384, 576, 768, 960, 1152, 1536}
    assert {(c.resolution**2, c.channels // c.heads) for c in found.attentions} == {
        (256, 256), (64, 256), (1024, 64), (256, 64), (64, 64),
    }  # fmt: skip
    assert {(c.channels, c.resolution) for c in found.pools} == {(64, 224), (128, 112), (256, 56), (512, 28)}
    assert {c.ceiling for c in found.relus} == {6.0, float("inf")}
    assert {(c.channels, c.resolution) for c in found.images} == {(3, 32), (3, 64)}


def test_launches_are_recorded_as_on_the_device_with_as_many_programs():
    """Small batches are split over programs, large ones are not; kernels are put back afterwards."""
    from benchmarks.launches import recording

    module = importlib.import_module("gdd_fast.kernels.group_norm_silu")
    before = dict(vars(module))
    with recording(module, PROGRAMS[90]):
        plans = [module.Plan("forward", torch.empty(n, 256, 32, 32, device="meta"), 256, 32) for n in (1, 512)]
    assert plans[0].parts > 1 and plans[1].parts == 1
    assert dict(vars(module)) == before
