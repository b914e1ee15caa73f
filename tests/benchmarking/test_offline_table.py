"""docs/kernels_table.md: it holds every kernel that the networks launch, none spills, those that memory bounds use it
well, and it is what Triton makes."""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.cases.layer_calls import layers
from benchmarks.counts.launches import OPERATORS
from benchmarks.counts.offline import ROOT
from benchmarks.counts.offline_table import ARCHITECTURES, read, sources

TRITON, SOURCES, ROWS = read()
COMMAND = "run `python -m benchmarks.counts.offline_table`"

# Launches are recorded in a process of its own: this one's kernels may be the interpreter's.
_RECORD = """
import json
from dataclasses import asdict
from unittest import mock
from benchmarks.counts import launches
from benchmarks.counts.offline_table import ARCHITECTURES, all_rows, kernel_name, representative
from benchmarks.cases.layer_calls import layers
from benchmarks.counts.offline import _compile_triton_here

rows = all_rows(layers())
first = {}
for key, variants in rows.items():
    first.setdefault(kernel_name(variants[0]), (key, representative(variants)))
compiled = {
    key: _compile_triton_here(f"gdd_fast.kernels.{launch.operator}", [asdict(launch.case)], ARCHITECTURES)
    for key, launch in first.values()
}
with mock.patch.object(launches, "BATCHES", (256,)):
    of_a_full_gpu = all_rows(layers())
in_channels_last = lambda variants: any(" contiguous" not in launch.first for launch in variants)
filling = [key for key, variants in of_a_full_gpu.items() if in_channels_last(variants)]
print(json.dumps([{key: kernel_name(variants[0]) for key, variants in rows.items()}, compiled, filling]))
"""
_COMPILE = """
import json, sys
from benchmarks.counts.offline_table import all_rows, measure
from benchmarks.cases.layer_calls import layers
found = all_rows(layers())
print(json.dumps([str(row) for row in measure([found[key] for key in sys.argv[1:]])]))
"""


def run(script: str, *arguments: str):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_table_was_made_from_these_kernels():
    stale = [name for name, digest in sources().items() if SOURCES.get(name) != digest]
    assert not stale, f"the table is older than {', '.join(stale)}: {COMMAND}"


def test_digests_tell_code_from_comments(monkeypatch, tmp_path):
    import benchmarks.counts.offline_table as table

    for path in table.KERNELS.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(table, "KERNELS", tmp_path)
    before = table.sources()
    channels = tmp_path / "_channels.py"
    channels.write_text("# a comment\n" + channels.read_text().replace("Values (N, C) of sample n", "Values of n"))
    assert table.sources() == before
    channels.write_text(channels.read_text().replace("squares += d * d", "squares -= d * d"))
    after = table.sources()
    assert {name for name in before if before[name] != after[name]} == {"group_norm_silu", "residual"}
    tuned = tmp_path / "tuned.json"
    tuned.write_text(tuned.read_text().replace("4096", "2048").replace("{", '{"new": {"default": {"BLOCK": 1}}, ', 1))
    tuned_after = table.sources()
    assert {name for name in after if after[name] != tuned_after[name]} == {"group_norm_silu"}


def test_no_kernel_spills():
    assert not [row for row in ROWS.values() if row.spills]
    for row in ROWS.values():
        assert len(row.registers) == len(row.spilled) == len(row.shared) == len(ARCHITECTURES), row
        assert all(row.registers) and all(n <= 160 * 1024 for n in row.shared), row  # of an A100's 163 KiB


# Of the kernels that move more than they compute: the least mean width of their loads, in bytes, and the bytes that
# they move for each result in bfloat16. The backward pass of pooling reads places of 8 bytes beside gradients of 16 (of
# contiguous maps 4 beside 8), the mask single bytes of bits.
MEMORY_BOUND = {
    "group_norm_silu.statistics_kernel": (16, 2),
    "group_norm_silu.forward_kernel": (16, 4),
    "group_norm_silu.backward_sums_kernel": (16, 4),
    "group_norm_silu.backward_kernel": (16, 6),
    "residual.residual_kernel": (16, 6),
    "max_pool2x2.channels_last_kernel": (16, 11),
    "max_pool2x2.contiguous_kernel": (16, 11),
    "max_pool2x2.channels_last_backward_kernel": (12, 11),
    "max_pool2x2.contiguous_backward_kernel": (6, 11),
    "relu_bits.relu_bits_kernel": (16, 4.125),
    "relu_bits.mask_bits_kernel": (8.5, 4.125),
}
# Instructions for which an H200, of the GPUs with the most bandwidth for their clock, has time while a byte moves: 132
# multiprocessors of 128 lanes at 1.755 GHz, and 85 % of 4.8 TB/s.
INSTRUCTIONS_PER_BYTE = 132 * 128 * 1.755e9 / (0.85 * 4.8e12)


KB_IN_FLIGHT = 16
"""What a multiprocessor has asked for at once."""
KB_WITHOUT_SPILLS = 13
"""Of kernels in blocks of 256 channels: backward, tiles are half as large lest they spill; a pair's statistics take
registers too."""
KB_OF_SMALL_MAPS, INSTRUCTIONS_OF_SMALL_MAPS = 12, 36
"""Of the norms of 8x8 pixels, whose one tile is the whole map. Where it takes the statistics as well, reducing them is
shared by few results: 1/16 of what the norms of 32x32 pixels move."""


def check_floors(row, width: float, *, small: bool = False) -> None:
    moved = MEMORY_BOUND[row.kernel][1] * INSTRUCTIONS_PER_BYTE
    wide = "BLOCK_C 256" in row.constants
    assert min(row.load) >= width, row
    assert min(row.in_flight) >= (KB_OF_SMALL_MAPS if small else KB_WITHOUT_SPILLS if wide else KB_IN_FLIGHT), row
    assert max(row.per_result) <= (max(moved, INSTRUCTIONS_OF_SMALL_MAPS) if small else moved), row


def test_memory_bound_kernels_keep_memory_busy(recorded):
    """Loads of 16 bytes and enough of them at once, in the layout that networks have, where a batch fills the GPU.

    Single images and contiguous maps have narrower tiles; the table has their figures without a floor.
    """
    *_, filling = recorded
    rows = [ROWS[key] for key in filling if ROWS[key].kernel in MEMORY_BOUND]
    of_single_images = {"group_norm_silu.statistics_kernel", "group_norm_silu.backward_sums_kernel"}
    of_contiguous_maps = {name for name in MEMORY_BOUND if ".contiguous" in name}
    assert {row.kernel for row in rows} == MEMORY_BOUND.keys() - of_single_images - of_contiguous_maps
    assert {row.kernel for row in ROWS.values()} - MEMORY_BOUND.keys() == {
        "attention.forward_kernel", "attention.backward_q_kernel", "attention.backward_kv_kernel",  # products
    }  # fmt: skip
    for row in rows:
        small = row.kernel.startswith("group_norm_silu") and "x8² " in row.layer
        check_floors(row, MEMORY_BOUND[row.kernel][0], small=small)


def test_pooling_of_contiguous_maps_reads_runs_of_any_width():
    """VGG's maps of 56 and 28 pixels too, which 16 does not divide: rows of 28 half values begin at every 8 bytes."""
    for kernel in ("max_pool2x2.contiguous_kernel", "max_pool2x2.contiguous_backward_kernel"):
        rows = [row for row in ROWS.values() if row.kernel == kernel]
        assert {row.layer.split()[0] for row in rows} == {"64x224²", "128x112²", "256x56²", "512x28²"}
        for row in rows:
            check_floors(row, MEMORY_BOUND[kernel][0] / (2 if row.layer.startswith("512x28²") else 1))


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, str], dict[str, list[dict]], list[str]]:
    """Kernels by the rows that the table should have; what compiling the first of each kernel took, by row; and the
    rows that channels_last maps of 256 images have, whatever other batches share them."""
    return tuple(run(_RECORD))


def test_every_kernel_that_the_networks_launch_is_in_the_table(recorded):
    launched, *_ = recorded
    missing = sorted({name for key, name in launched.items() if key not in ROWS})
    assert not missing, f"not in the table, {COMMAND}: {missing}"
    assert not ROWS.keys() - launched.keys(), "the table has kernels that nothing launches"
    assert {name.partition(".")[0] for name in launched.values()} == set(OPERATORS)


def test_one_of_every_kernel_compiles_for_ampere_and_hopper(recorded):
    """Without spills, and no worse than the row says that it is one of."""
    launched, compiled, _ = recorded
    assert {launched[key] for key in compiled} == set(launched.values())
    for key, results in compiled.items():
        assert [result["architecture"] for result in results] == list(ARCHITECTURES)
        assert not any(result["spilled"] for result in results), results
        if version("triton") == TRITON:
            row = ROWS[key]
            most = [row.registers, row.shared]
            taken = [[result[name] for result in results] for name in ("registers", "shared")]
            assert all(a <= b for pair in zip(taken, most, strict=True) for a, b in zip(*pair, strict=True)), (
                taken,
                row,
            )


@pytest.mark.slow
def test_rows_of_every_kernel_are_what_triton_makes():
    if version("triton") != TRITON:
        pytest.skip(f"the table is Triton {TRITON}'s")
    last = {row.kernel: key for key, row in ROWS.items()}
    for row in run(_COMPILE, *last.values()):
        assert row == str(ROWS[row.split("|")[1].strip()])


def test_layers_are_those_of_the_papers_networks():
    """The widths, groups and tokens that are known of NCSN++ 32/64, ADM 64, VGG-16 and EfficientNet-lite0."""
    found = layers()
    assert {sum(c.channels) for c in found.norms} >= {128, 192, 256, 384, 576, 768, 960, 1152, 1536}
    assert {(c.resolution**2, c.channels // c.heads) for c in found.attentions} == {
        (256, 256), (64, 256), (1024, 64), (256, 64), (64, 64),
    }  # fmt: skip
    assert {(c.channels, c.resolution) for c in found.pools} == {(64, 224), (128, 112), (256, 56), (512, 28)}
    assert {c.ceiling for c in found.relus} == {6.0, float("inf")}


def test_launches_are_recorded_as_on_the_device_with_its_programs_and_options(monkeypatch):
    """Small batches are split over programs, large ones are not; kernels are put back afterwards."""
    from benchmarks.counts.launches import recording
    from gdd_fast.kernels import _launch

    module = importlib.import_module("gdd_fast.kernels.group_norm_silu")
    before = dict(vars(module))
    with recording(module, 90):
        maps = [torch.empty(n, 256, 32, 32, device="meta") for n in (1, 512)]
        partitions = [module.Partition("forward", x, 256, 32) for x in maps]
    assert partitions[0].parts > 1 and partitions[1].parts == 1
    entries = json.loads(json.dumps(_launch.table()))
    entries["group_norm_silu.forward"]["sm_90"] = {"num_warps": 2}
    monkeypatch.setattr(_launch, "table", lambda: entries)
    for architecture, warps in ((80, 8), (90, 2)):
        with recording(module, architecture):
            partition = module.Partition("forward", torch.empty(1, 256, 32, 32, device="meta"), 256, 32)
        assert partition.options["num_warps"] == warps
    assert dict(vars(module)) == before


# Shapes at which arguments become constants (1 is compiled in) and strides take 64 bits.
_ODD = """
import importlib, json
from dataclasses import asdict
import torch
from benchmarks.counts.launches import recording
from gdd_fast.ops._memory_format import statistics_parts
from benchmarks.counts.offline import _compile_triton_here

def far(n, c, h, w):
    return torch.empty(0, device="meta").as_strided((n, c, h, w), (2**32, 2**33, w * 2**34, 2**34))

def dense(*shape):
    return torch.empty(shape, device="meta")

def norm(module, new, n, c, skip, h, w):
    x, s, y = new(n, c, h, w), new(n, skip, h, w) if skip else None, new(n, c + skip, h, w)
    weight, bias = dense(2, c + skip)
    add, scale, shift = rows = [dense(n, c + skip) for _ in range(3)]
    mean, rstd = module.forward(
        x, s, 1, weight, bias, 1e-5, *rows, None, None, True, y, statistics_parts(h * w)
    )
    given = (y, x, s, weight, bias, *rows, mean, rstd, True)
    module.backward(*given, x, s, *(dense(n, c + skip) for _ in range(5)))
    module.backward(*given, *[None] * 4, dense(n, c + skip), None, None)

def residual(module, new, n, c, _, h, w):
    x = new(n, c, h, w)
    module.residual(x, x, dense(c), 1.0, x, dense(n, statistics_parts(h * w), 2, c))

SHAPES = ((dense, 1, 1, 0, 1, 1), (dense, 2, 1, 1, 1, 1), (dense, 1, 1, 0, 40, 1), (far, 1, 4, 2, 9, 1))
count = 0
for operator, launch in (("group_norm_silu", norm), ("residual", residual)):
    module = importlib.import_module(f"gdd_fast.kernels.{operator}")
    with recording(module, 90) as cases:
        for shape in SHAPES:
            launch(module, *shape)
    unique = {repr(case): asdict(case) for case in cases}
    results = _compile_triton_here(module.__name__, list(unique.values()), [90])
    assert not any(r["spilled"] for r in results), results
    assert any("i64" in case["signature"].values() for case in unique.values())
    count += len(results)
print(json.dumps(count))
"""


@pytest.mark.slow
def test_kernels_compile_for_odd_shapes_and_64_bit_strides():
    """What Triton's interpreter does not do: constants for arguments that are 1, types by the size of a number."""
    assert run("import sys; sys.path.append('tests')\n" + _ODD) > 10
