"""Captured steps of two processes: what they exchange is in no capture, and each of them may capture or not."""

import json

import torch
from test_ranks import finished, torchrun
from tiny_run import write_inputs

# Each rank takes its steps as the command says, through R1 steps and an iteration that both skip, as weights of the
# second rank are infinite in it.
WORKER = """
import json, pathlib, sys
from unittest import mock
import torch
from rehearsal import Rehearsal
from tiny_run import tiny_config, tiny_task
from gdd_fast.layers.spectral_conv import SpectralConv2d
from gdd_fast.ranks import join
from gdd_fast.training.captured_steps import CapturedSteps
from gdd_fast.training.optimizer import AdamEma
from gdd_fast.training.trial import Trial

BATCH, SKIPPED = 8, 6
SpectralConv2d.divide_result = False  # as on a GPU: watched, a convolution of a CPU is another one

class Broken(Rehearsal):
    # it fails in the second part of a step, where the gradients lie in the buffer
    def record(self, step, inputs):
        with mock.patch.object(AdamEma, "step", side_effect=RuntimeError("not while capturing")):
            return super().record(step, inputs)

folder, kinds = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
with join("cpu") as world:
    task = tiny_task(tiny_config(folder, batch=BATCH, batch_gpu=2, r1_interval=3, r1_gamma=0.1, backend="torch"), world)
    recorder = {"eager": lambda **_: None, "recorded": Rehearsal, "broken": Broken}[kinds[world.rank]](warm_up=1)
    task.steps = CapturedSteps(recorder, Trial(task.changing, task.random) if recorder else None)
    for number in range(9):
        weight = next(p for p in task.generator.parameters() if p.requires_grad)
        kept = weight.detach().clone()
        if number == SKIPPED and world.rank:
            weight.detach().fill_(float("inf"))
        task.iteration(number * BATCH)
        if number == SKIPPED:
            weight.detach().copy_(kept)
    sections, values = task.state()
    if world.is_main:
        torch.save({f"{s}.{n}": t for s, tensors in sections.items() for n, t in tensors.items()}, folder / "state.pt")
    log = {name: value if value == value else None for name, value in task.averages.take().items()}
    replays = None if task.steps.recorder is None else recorder.replays
    found = {"replays": replays, "log": log, "skipped": values["skipped"]}
    (folder / f"found{world.rank}.json").write_text(json.dumps(found))
"""


def trained(folder, *kinds):
    """The state after it, what each rank found, and what was said."""
    folder.mkdir()
    write_inputs(folder)
    (folder / "worker.py").write_text(WORKER)
    code, _, err = finished(torchrun(folder / "worker.py", folder, ",".join(kinds)))
    assert code == 0, err
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]
    return torch.load(folder / "state.pt"), found, err


def test_two_processes_are_the_eager_ones_to_the_bit_whichever_of_them_captures(tmp_path):
    expected, eager, _ = trained(tmp_path / "eager", "eager", "eager")
    assert [one["skipped"] for one in eager] == [{"g": 1, "d": 1, "r1": 0}] * 2
    for kinds in (("recorded", "recorded"), ("recorded", "broken")):
        state, found, err = trained(tmp_path / "-".join(kinds), *kinds)
        assert state.keys() == expected.keys()
        assert [name for name in state if not same(state[name], expected[name])] == [], kinds
        for kind, one, other in zip(kinds, found, eager, strict=True):
            assert (one["log"], one["skipped"]) == (other["log"], other["skipped"])
            assert one["replays"] is None if kind != "recorded" else one["replays"] > 20
        assert ("Steps run eagerly, as a captured one failed its check" in err) == ("broken" in kinds)


def same(a, b):
    """To the bit; running statistics of heads, which nothing reads, are NaN after the skipped step."""
    return torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)
