"""The same global batches on 1, 2 and 4 processes (gloo, on CPUs) train the same networks, but for rounding.

So they do where two of them hold the generator in parts (`--fsdp`).

"The same" (docs/reliability.md): after six iterations, the distance between the weights that N processes and one have
trained is at most a hundredth of the way that they have come from the start, in float32 and over all weights together.
Only the order of sums differs, and Adam enlarges that where a gradient is nearly zero.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import write_inputs

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.01

# Draws are shared out as images are: every size-th of the batch's. The heads evaluate, as batch statistics and spectral
# norms are of the images that are together in a pass.
WORKER = """
import collections, pathlib, sys
import torch
from tiny_run import tiny_config, tiny_task
from gdd_fast.distill.pretraining import PretrainConfig, Pretraining
from gdd_fast.ranks import join
from gdd_fast.training.sharding import whole

BATCH, ITERATIONS = 8, 6
folder, kind, micro, fsdp = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "fsdp" in sys.argv

def pretraining(world):
    task = Pretraining(PretrainConfig(data=str(folder / "data.zip"), run_dir=folder / "run", model_channels=8,
                                      num_blocks=1, batch=BATCH, batch_gpu=micro, lr_rampup_kimg=0, ema_rampup=0.0,
                                      ema_halflife_mimg=2e-5, device="cpu", precision="fp32"), world)
    return task, (task.net, task.ema.net)

def distillation(world):
    task = tiny_task(tiny_config(folder, batch=BATCH, batch_gpu=micro, logit_reduction="heads", fsdp=fsdp), world)
    task.heads.eval()
    return task, (task.generator, task.ema.net, task.heads)

with join("cpu") as world:
    task, networks = {"pretrain": pretraining, "train": distillation}[kind](world)


    def weights():
        return [whole(p.detach()).clone() for net in networks for p in net.parameters()]

    start = weights()
    randn, waiting = torch.randn, collections.defaultdict(lambda: torch.empty(0))
    generators = collections.defaultdict(lambda: torch.Generator().manual_seed(1))

    def shared(shape, **_):
        count, *one = shape
        key = tuple(one)
        if not len(waiting[key]):
            waiting[key] = randn(BATCH, *one, generator=generators[key])[world.rank :: world.size]
        drawn, waiting[key] = waiting[key][:count], waiting[key][count:]
        return drawn

    torch.randn = shared
    for number in range(ITERATIONS):
        task.iteration(number * BATCH)
    change = [now - before for now, before in zip(weights(), start)]
    torch.save(change, folder / f"{kind}-{world.size}-{world.rank}.pt")
"""


def train(folder: Path, kind: str, processes: int, micro: int, *how: str) -> list[list[torch.Tensor]]:
    """By rank, how far each weight has come."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [folder / "worker.py", folder, kind, str(micro), *how]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{kind}-{processes}-{rank}.pt") for rank in range(processes)]


def length(tensors: list[torch.Tensor]) -> float:
    return torch.cat([t.double().flatten() for t in tensors]).norm().item()


@pytest.mark.parametrize(
    ("kind", "processes", "micro"),
    [
        ("train", (2,), 2),
        pytest.param("train", (4,), 2, marks=pytest.mark.slow),
        pytest.param("pretrain", (2, 4), 2, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_trains_the_same_networks(tmp_path, kind, processes, micro):
    write_inputs(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    [alone] = train(tmp_path, kind, 1, 8)
    assert length(alone) > 0
    for count in processes:
        for how in ([], ["fsdp"]) if (kind, count) == ("train", 2) else ([],):
            first, *others = train(tmp_path, kind, count, micro, *how)
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
            apart = length([a - b for a, b in zip(first, alone, strict=True)])
            print(f"{count} processes {how}: {apart / length(alone):.1e} of the way")
            assert apart <= TOLERANCE * length(alone), f"{count} processes {how}: {apart / length(alone):.1e}"
