"""What runs with torch and numpy alone, as on a machine that is rented to measure on."""

import subprocess
import sys
from pathlib import Path

HIDDEN = ["safetensors", "tqdm", "tyro", "PIL", "diffusers", "timm", "torchvision", "scipy", "huggingface_hub"]
HIDE = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))\n"
GENERATOR = """
import torch
import benchmarks.exactness, benchmarks.peak_memory, gdd_fast.distill.loop, gdd_fast.distill.parts
from benchmarks.gpu_battery import cases_of
from benchmarks.training import Setup
from gdd_fast.inference.one_step import OneStepGenerator
from gdd_fast.models.precond import GDDPrecond

groups = [case.group for case in cases_of("inference", True)]
assert groups.count("generator") == 1, groups
assert Setup("demo", 2).generator(torch.device("cpu")).img_resolution == 16
net = GDDPrecond(8, 3, 5, model_type="SongUNet", model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[])
generator = OneStepGenerator.from_network(net)
assert generator(2, labels=3, seeds=[0, 1]).shape == (2, 8, 8, 3)
assert generator.run(torch.randn(2, 3, 8, 8), torch.eye(5)[:2]).shape == (2, 3, 8, 8)
"""


def test_a_generator_needs_torch_and_numpy_alone():
    done = subprocess.run(
        [sys.executable, "-c", HIDE + GENERATOR], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
