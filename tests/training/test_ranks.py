"""Several processes: exchanges, weights that stay equal, and the images each one sees. On CPUs, over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_run import tiny_config, tiny_flags, tiny_task, write_inputs

from gdd_fast.device import pick_device
from gdd_fast.errors import ConfigError
from gdd_fast.ranks import World, join
from gdd_fast.training import checkpoint, loop
from gdd_fast.training.batches import chunks, split_batch
from gdd_fast.training.random_state import RandomState

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
ALONE = World(0, 1, torch.device("cpu"))


def torchrun(*command, processes=2, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
    )  # fmt: skip


def finished(process, timeout=180):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


# What each process does in the one test that starts several in a world of their own; what it finds goes to a file.
WORKER = """
import json, pathlib, sys
import torch
from tiny_run import tiny_config, tiny_task
from gdd_fast.ranks import join
from gdd_fast.training.exchange import GradientExchange

folder = pathlib.Path(sys.argv[1])
with join("cpu") as world:
    mine = torch.full((2, 2), float(world.rank)), torch.arange(3.0) * (world.rank + 1)
    mine = [*mine, torch.tensor([float("nan") if world.rank else 1.0])]
    weights = [torch.nn.Parameter(torch.zeros_like(t)) for t in mine]
    for weight, gradient in zip(weights, mine):
        weight.grad = gradient
    exchange = GradientExchange(weights, world)
    exchange.pack()
    exchange.average()
    exchange.unpack()
    found = {
        "average": [w.grad.tolist() for w in weights[:2]],
        "nan": bool(weights[2].grad.isnan().all()),
        "largest": world.largest(15 if world.rank else 0),
        "gather": [t.tolist() for t in world.gather(torch.tensor([world.rank], dtype=torch.uint8))],
    }
    task = tiny_task(tiny_config(folder, batch=4), world)
    take, seen = type(task.stream).__next__, []
    latents = task._draw()
    found["latents"] = float(latents.sum())
    start = task.stream.state_dict()
    for _ in range(6):
        images, _ = next(task.stream)
        seen += [hash(image.numpy().tobytes()) for image in images]
    task.stream.load_state_dict(start)
    found["seen"] = seen
    for number in range(3):
        task.iteration(number * 4)
    weights = [*task.generator.parameters(), *task.heads.parameters(), *task.ema.net.parameters()]
    found["weights"] = [t.double().sum().item() for t in weights]
    found["images"] = task.stream.state_dict()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
"""


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    write_inputs(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    code, _, err = finished(torchrun(tmp_path / "worker.py", tmp_path))
    assert code == 0, err
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["average"] == two["average"] == [[[0.5, 0.5], [0.5, 0.5]], [0.0, 1.5, 3.0]]
    assert one["nan"] and two["nan"]  # a gradient that is not finite on one rank is skipped on all
    assert one["largest"] == two["largest"] == 15
    assert one["gather"] == two["gather"] == [[0], [1]]
    assert one["latents"] != two["latents"]
    assert one["weights"] == two["weights"]
    assert one["images"] == two["images"] and one["images"]["position"] == 12
    assert len(one["seen"]) == 12 and not set(one["seen"]) & set(two["seen"])  # 24 images: an epoch between them
    assert len(set(one["seen"] + two["seen"])) == 24


# One G step and one D step of a batch of 8, whose images and latents are the same however they are shared out. The
# heads evaluate: batch statistics and spectral norms depend on which images are together in a pass. Convolutions of two
# images and of eight differ by rounding; the latents are such that it opens and closes no ReLU.
STEPS = """
import pathlib, sys
import torch
from tiny_run import tiny_config, tiny_task
from gdd_fast.ranks import join

folder, name, batch_gpu, reduction = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
with join("cpu") as world:
    config = tiny_config(folder, batch=8, batch_gpu=batch_gpu, logit_reduction=reduction)
    task = tiny_task(config, world)
    latents = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))[world.rank :: world.size]
    parts = iter([*latents.split(task.micro_batch)] * 2)
    task._draw = lambda: next(parts)
    task.heads.eval()
    images, labels = next(task.stream)
    found = {"images": [image for image in images]}
    for guard, step in ((task.g_guard, lambda: task.generator_step(labels)),
                        (task.d_guard, lambda: task.discriminator_step(images.float() / 127.5 - 1, labels))):
        keep = guard.optimizer.step
        def remember(*, skipped, keep=keep, guard=guard):
            found[guard.name] = [p.grad.clone() for p in guard.optimizer.param_groups[0]["params"]]
            return keep(skipped=skipped)
        guard.optimizer.step = remember
        step()
    found["weights"] = [p.detach() for net in (task.generator, task.heads, task.ema.net) for p in net.parameters()]
    torch.save(found, folder / f"{name}{world.rank}.pt")
"""


@pytest.mark.parametrize(("reduction", "factor"), [("heads", 1), ("rows", 2)])
def test_two_processes_with_micro_batches_take_the_steps_of_one(tmp_path, reduction, factor):
    """`rows` sums over the images of a process, so that two processes have half the gradient; Adam undoes a factor."""
    write_inputs(tmp_path)
    (tmp_path / "steps.py").write_text(STEPS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    alone = [sys.executable, tmp_path / "steps.py", tmp_path, "alone", "8", reduction]
    subprocess.run(alone, env=environment, check=True)
    code, _, err = finished(torchrun(tmp_path / "steps.py", tmp_path, "shared", "2", reduction))
    assert code == 0, err
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone0", "shared0", "shared1"))
    seen = sorted(image.numpy().tobytes() for image in one["images"])
    assert seen == sorted(image.numpy().tobytes() for image in first["images"] + second["images"])
    for name in ("generator", "discriminator"):
        scale = max(gradient.abs().max().item() for gradient in one[name])
        assert scale > 0
        for whole, part, other in zip(one[name], first[name], second[name], strict=True):
            assert torch.equal(part, other)
            torch.testing.assert_close(factor * part, whole, rtol=1e-3, atol=1e-5 * scale)
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_training_with_torchrun_resumes_alone(tmp_path):
    write_inputs(tmp_path)
    flags = tiny_flags(tmp_path, duration_mimg=12e-6)
    code, out, err = finished(torchrun("-m", "gdd_fast.train", *flags))
    assert code == 0, err
    assert out.count("One-step generator in") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [8, 12]
    saved = checkpoint.load(tmp_path / "run" / loop.CHECKPOINT)
    assert saved.section("random").keys() == {"0", "1"}

    from gdd_fast.train import main

    main([*flags, "--duration-mimg", "16e-6"])
    saved = checkpoint.load(tmp_path / "run" / loop.CHECKPOINT)
    assert saved.values["images"] == 16 and saved.section("random").keys() == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_leaves_a_checkpoint(tmp_path, number):
    write_inputs(tmp_path)
    flags = tiny_flags(tmp_path, duration_mimg=1.0, tick_kimg=1.0)
    process = torchrun("-m", "gdd_fast.train", *flags, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("events.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: torchrun and its processes, to which it passes it on
    else:
        process.send_signal(number)
    finished(process)
    assert checkpoint.load(tmp_path / "run" / loop.CHECKPOINT).values["images"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "fsdp"])
@pytest.mark.parametrize(
    ("death", "said"), [("1 / 0", "ZeroDivisionError"), ("os.kill(os.getpid(), signal.SIGKILL)", "exitcode: -9")]
)
def test_a_process_that_dies_in_training_ends_them_all(tmp_path, death, said, fsdp):
    write_inputs(tmp_path)
    worker = WORKER.replace("batch=4)", f"batch=4, fsdp={fsdp})").replace(
        "task.iteration(number * 4)", f"{death} if world.rank else task.iteration(number * 4)"
    )
    (tmp_path / "worker.py").write_text("import os, signal" + worker)
    code, _, err = finished(torchrun(tmp_path / "worker.py", tmp_path), timeout=120)
    assert code == 1 and said in " ".join(err.split()).replace(" :", ":")
    assert "another process of this run has ended" in err or "SIGTERM" in err  # found by the other, or torchrun first


def test_a_world_of_one():
    one = torch.ones(2)
    ALONE.barrier()
    assert one.tolist() == [1, 1] and ALONE.largest(3) == 3 and ALONE.is_main
    assert [t.tolist() for t in ALONE.gather(one)] == [[1, 1]]


def test_the_environment_decides(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as world:
        assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE and LOCAL_RANK"), join("cpu"):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "first"}, "RANK='first', WORLD_SIZE='2'"),
        ({"RANK": "2"}, "RANK='2', WORLD_SIZE='2'.* what torchrun would set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({}, "MASTER_ADDR and MASTER_PORT not in the environment"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "cannot meet at localhost:http"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "99999999"}, "cannot meet at localhost:99999999"),
    ],
)
def test_an_environment_that_is_not_torchruns(monkeypatch, changes, said):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said), join("cpu"):
        pass


@pytest.mark.parametrize("option", ["tpu", "meta", "cuda:99", ""])
def test_devices_that_are_not_there(option):
    with pytest.raises(ConfigError, match="--device"):
        pick_device(option)


def test_split_batch():
    assert split_batch(64, None, 4) == (16, 16)
    assert split_batch(64, 8, 4) == (16, 8)
    assert split_batch(64, 100, 4) == (16, 16)
    for wrong in ((65, None, 4), (64, 5, 4)):
        with pytest.raises(ConfigError):
            split_batch(*wrong)


def test_chunks():
    assert [part.tolist() for part in chunks(torch.arange(5), 2, 5)] == [[0, 1], [2, 3], [4]]
    assert list(chunks(None, 2, 5)) == [None, None, None]


def test_random_numbers_of_a_run():
    def draws(state):
        return torch.rand(4, generator=state.generator).tolist()

    first, same, other = RandomState(0, ALONE), RandomState(0, ALONE), RandomState(1, ALONE)
    second_rank = RandomState(0, World(1, 2, torch.device("cpu")))
    numbers = draws(first)
    assert numbers == draws(same) and numbers != draws(other) and numbers != draws(second_rank)
    saved = first.tensors()
    following = draws(first)
    same.restore(saved, images=64)
    assert draws(same) == following
    for elsewhere in ({"0": saved["0"], "1": saved["0"]}, {"0": torch.zeros(16, dtype=torch.uint8)}):
        same.restore(elsewhere, images=64)  # of two ranks; of a GPU
        assert draws(same) not in (following, numbers)


def test_what_is_frozen_is_neither_exchanged_nor_hooked(tmp_path, plain, monkeypatch):
    """An iteration with all of its steps; freezing convolutions leaves few of the generator's weights."""
    exchanged = []
    monkeypatch.setattr(dist, "all_reduce", lambda buffer: exchanged.append(buffer.numel()))
    write_inputs(tmp_path)
    task = tiny_task(tiny_config(tmp_path, r1_interval=1), World(0, 2, torch.device("cpu")))
    for number in range(2):
        task.iteration(number * task.batch)
    weights = list(task.generator.parameters())
    trained = [p for p in weights if p.requires_grad]
    assert 0 < len(trained) < len(weights)
    heads = [p for p in task.heads.parameters() if p.requires_grad]
    g, d = (sum(-(-p.numel() // 4) * 4 for p in params) for params in (trained, heads))  # 16 bytes at a time
    assert exchanged == [g, d, g, d, d]
    frozen = [p for net in (task.generator, task.features, task.r1_features) for p in net.parameters()]
    frozen = [p for p in frozen if not p.requires_grad]
    assert sum(p.numel() for p in frozen) > sum(p.numel() for p in trained)
    for parameter in frozen:
        assert parameter.grad is None
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
