"""What is said of a run that goes wrong: by warnings in its metrics, and by --debug-finite."""

import json

import pytest
import torch
from tiny_run import ALONE, schedule_of, tiny_config, tiny_task
from torch import nn

from gdd_fast.errors import CheckpointError, ConfigError, DivergedError, NotFiniteError
from gdd_fast.training import checkpoint, health, loggers, loop
from gdd_fast.training.finite import FiniteWatch
from gdd_fast.training.output import RunOutput


def tick(real=0.8, fake=0.7, **losses):
    return {"sign_accuracy_real": real, "sign_accuracy_fake": fake, "loss_g": 1.0, **losses}


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ([tick()], tick(), set()),
        ([tick(1.0, 0.0)], tick(0.995, 0.005), {health.COLLAPSED}),
        ([tick(0.0, 1.0)], tick(0.0, 1.0), {health.COLLAPSED}),
        ([tick()], tick(1.0, 0.0), set()),  # once is chance
        ([], tick(1.0, 0.0), set()),
        (
            [tick(0.5, 0.5)],
            tick(0.5, 0.5),
            set(),
        ),  # a discriminator that can no longer tell them apart has done its work
        ([tick(1.0, 1.0)], tick(1.0, 0.9995), {health.SATURATED}),
        ([tick()] * 3, tick(loss_g=10.5), {health.RAN_AWAY}),
        ([tick()] * 3, tick(loss_g=9.5), set()),
        ([tick()] * 2, tick(loss_g=10.5), set()),
        ([tick(loss_g=1.0)] * 20 + [tick(loss_g=100.0)] * 6, tick(loss_g=500.0), set()),  # the median is 100 by now
        ([tick(loss_g=None)] * 5, tick(loss_g=10.5), set()),
        ([], tick(loss_g=float("nan")), {health.RAN_AWAY}),
        ([{"loss": 1.0}] * 3, {"loss": -11.0, "minutes": 1e9}, {health.RAN_AWAY}),
    ],
)
def test_the_rules(before, now, found):
    assert health.signs(before, now).keys() == found


def test_metrics_and_the_progress_line_say_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)

    def some(start, *lines):
        output = RunOutput(tmp_path, 100, start, log=())
        for number, line in enumerate(lines):
            output.metrics(start + 10 * (number + 1), line)
        output.close()
        shown = capsys.readouterr()
        return shown.out + shown.err

    said = some(0, tick(), tick(1.0, 0.0), tick(1.0, 0.0), tick(1.0, 0.0))
    assert said.count("At 30 images: the discriminator has collapsed: it takes every image to be real.") == 1
    assert "warning=discriminator_collapsed" in said
    said = some(40, tick(1.0, 0.0, loss_g=30.0), tick())  # a run that goes on knows what came before
    assert "has collapsed" not in said and "At 50 images: loss_g ran away: 30, where it was 1 before." in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["discriminator_collapsed"] for line in lines] == [0, 0, 1, 1, 1, 0]
    assert [line["loss_ran_away"] for line in lines] == [0, 0, 0, 0, 1, 0]


def broken(net, path, value=float("nan")):
    with torch.no_grad():
        parameter = net.get_parameter(path)
        parameter[(0,) * parameter.ndim] = value


class TestWatch:
    """A network of two layers, and what is wrong with it."""

    def made(self):
        net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
        return net, torch.optim.Adam(net.parameters()), FiniteWatch({"net": net})

    def take(self, net, optimizer, watch, inputs, loss=torch.Tensor.sum):
        with watch.step("generator", 1024, optimizer):
            loss(net(inputs)).backward()
            optimizer.step()

    def test_finite_ones_pass(self):
        net, optimizer, watch = self.made()
        for _ in range(2):
            self.take(net, optimizer, watch, torch.ones(4, 2))

    def test_the_first_layer_is_named(self):
        net, optimizer, watch = self.made()
        broken(net, "0.bias")
        message = r"4 of the 12 values of the output of net\.0 .* in the generator step after 1,024 images"
        with pytest.raises(NotFiniteError, match=message):
            self.take(net, optimizer, watch, torch.ones(4, 2))
        net(torch.ones(4, 2))  # outside of steps nobody looks

    def test_a_gradient_is_named(self):
        net, optimizer, watch = self.made()
        with pytest.raises(NotFiniteError, match=r"the gradient at net.* output"):
            self.take(net, optimizer, watch, torch.ones(4, 2), loss=lambda y: (y - y.detach()).abs().sqrt().sum())

    def test_a_weights_gradient_is_named(self):
        net, optimizer, watch = self.made()
        net.get_parameter("2.bias").register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(NotFiniteError, match=r"the gradient of net\.2\.bias are"):
            self.take(net, optimizer, watch, torch.ones(4, 2))

    def test_a_moment_and_a_weight_are_named(self):
        net, optimizer, watch = self.made()
        self.take(net, optimizer, watch, torch.ones(4, 2))
        optimizer.state[net.get_parameter("2.weight")]["exp_avg_sq"][0, 1] = float("inf")
        with pytest.raises(NotFiniteError, match=r"the optimizer's exp_avg_sq of net\.2\.weight"):
            self.take(net, optimizer, watch, torch.ones(4, 2))


@pytest.mark.parametrize(
    ("network", "path", "message"),
    [
        (
            "generator",
            "model.dec.16x16_aux_conv.weight",
            r"output of generator\.model\.dec\.16x16_\w*, in the gen\w* step",
        ),
        ("heads", None, r"output of heads\.\S+, in the generator step after 4 images"),
    ],
)
def test_a_distillation_names_the_layer(inputs, network, path, message, plain):
    task = tiny_task(tiny_config(inputs, debug_finite=True), ALONE)
    task.iteration(0)
    net = getattr(task, network)
    path = path or next(name for name, p in net.named_parameters() if p.requires_grad and p.ndim > 1)
    broken(net, path)
    with pytest.raises(NotFiniteError, match=message.replace(", in", " are NaN or infinite, in")):
        task.iteration(4)


@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_captured_and_compiled_steps_cannot_be_looked_into(inputs, engine):
    with pytest.raises(ConfigError, match=f"--debug-finite cannot look into --engine {engine}"):
        tiny_config(inputs, debug_finite=True, engine=engine).validate()


def run_with(task, config, at=None):
    """A run of four iterations, with a checkpoint behind every second one; `at`: called after 8 images."""
    iteration = task.iteration

    def iterate(images):
        iteration(images)
        if images == 8 and at is not None:
            at()

    task.iteration = iterate
    return loop.run(task, config.run.run_dir, {}, schedule_of(config), ALONE, log=())


@pytest.mark.parametrize(
    ("section", "behind"), [("generator", True), ("ema", False), ("heads", True), ("g_optimizer", False)]
)
def test_what_is_not_finite_is_never_in_a_checkpoint(inputs, tmp_path, plain, section, behind):
    """Whatever it is that a checkpoint holds: the one before stays, and the run goes on from there."""
    settings = {"duration_mimg": 16e-6, "checkpoint_ticks": 1, "run_dir": tmp_path, "async_checkpoints": behind}
    config = tiny_config(inputs, **settings)
    task = tiny_task(config)

    def spoil():
        tensor = next(t for name, t in task.state()[0][section].items() if t.ndim and not name.endswith("exp_avg"))
        tensor.detach()[(0,) * tensor.ndim] = float("inf")

    with pytest.raises(DivergedError, match=rf"{section}/\S+ holds NaN or infinite values after 16 images.* of 8 im"):
        run_with(task, config, spoil)
    saved = checkpoint.load(tmp_path / loop.CHECKPOINT)
    assert saved.values["images"] == 8 and not checkpoint.not_finite(saved.sections())
    assert checkpoint.not_finite(checkpoint.load(tmp_path / loop.DIVERGED).sections()).startswith(f"{section}/")
    assert run_with(tiny_task(config), config).images == 16


def test_a_checkpoint_that_is_not_finite_is_no_start(inputs, tmp_path, plain):
    """Of an earlier version, or damaged: not trained with until every step is left out."""
    config = tiny_config(inputs, duration_mimg=8e-6, run_dir=tmp_path)
    run_with(tiny_task(config), config)
    saved = checkpoint.load(tmp_path / loop.CHECKPOINT)
    name = next(name for name in saved.tensors if name.startswith("ema/"))
    saved.tensors[name].flatten()[0] = float("nan")
    checkpoint.save(tmp_path / loop.CHECKPOINT, saved.sections(), saved.values)
    with pytest.raises(CheckpointError, match=f"holds NaN or infinite values in {name}; move it away"):
        run_with(tiny_task(config), config)


def test_a_step_that_is_left_out_leaves_nothing_behind(inputs, plain):
    """The heads' running statistics are in every checkpoint: a NaN there would stay for good."""
    task = tiny_task(tiny_config(inputs))
    task.iteration(0)
    real = torch.zeros(4, 1, 16, 16)
    real[0, 0, 0, 0] = float("nan")
    task.discriminator_step(real, None)
    assert task.d_guard.skipped == 1 and not checkpoint.not_finite(task.state()[0])
    saved = task.heads.state_dict()
    name = next(name for name in saved if name.endswith("running_var"))
    saved[name].fill_(float("nan"))  # as an earlier version saved them
    task.heads.load_state_dict(saved)
    assert not checkpoint.not_finite(task.state()[0])
