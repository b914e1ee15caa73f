"""What an iteration does to which weights; runs that repeat and resume to the bit."""

import copy
import json

import pytest
import torch
from tiny_run import ALONE, BATCH, schedule_of, tiny_config, write_inputs
from torch import nn
from torch.nn import functional as F

from gdd_fast.config import to_dict
from gdd_fast.distill import components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.errors import DivergedError
from gdd_fast.models.files.load import load_generator
from gdd_fast.training import checkpoint, loop

pytestmark = pytest.mark.usefixtures("plain")


@pytest.fixture(scope="module")
def built(inputs):
    return components.build(tiny_config(inputs))


@pytest.fixture
def make(inputs, built, tmp_path):
    """A task with parts of its own; `settings` may not concern how the parts are built, but for the freeze level."""

    def make(**settings):
        config = tiny_config(inputs, **{"run_dir": tmp_path / "run", **settings})
        own = copy.deepcopy(built)
        return Distillation(config, own, ALONE)

    return make


def tensors(task):
    sections, _ = task.state()
    return {f"{name}/{key}": t.clone() for name, part in sections.items() for key, t in part.items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return sorted(key for key in a if not torch.equal(a[key], b[key]))


def iterate(task, count, start=0):
    for number in range(start, start + count):
        task.iteration(number * BATCH)


def test_frozen_weights_stay_to_the_bit_and_the_others_move(make):
    task = make()
    before = {name: p.detach().clone() for name, p in task.generator.named_parameters()}
    backbones = {k: t.clone() for k, t in task.features.state_dict().items()}
    seen = set()
    for name, parameter in task.generator.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: seen.add(name))
    iterate(task, 3)
    for name, parameter in task.generator.named_parameters():
        conv = name.split(".")[-2] in ("conv0", "conv1", "proj")
        assert parameter.requires_grad is not conv
        assert torch.equal(parameter, before[name]) is conv, name
        if conv:
            assert parameter.grad is None
            assert torch.equal(parameter, dict(task.ema.net.named_parameters())[name])
    assert seen == {name for name, p in task.generator.named_parameters() if p.requires_grad}
    assert all(torch.equal(t, backbones[k]) for k, t in task.features.state_dict().items())


def test_iterations_in_bfloat16_are_those_in_float32_but_for_rounding(inputs, tmp_path):
    """The presets' precision: weights, moments and averages stay float32, losses and the way weights go are alike."""
    found = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(inputs, run_dir=tmp_path / precision, g_precision=precision)
        task = Distillation(config, components.build(config), ALONE)
        before = {name: p.detach().clone() for name, p in task.generator.named_parameters()}
        iterate(task, 3)  # the third with its R1 step
        assert task.generator.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert not any(guard.skipped for guard in task._guards().values())
        assert all(t.dtype == torch.float32 for name, t in tensors(task).items() if "optimizer" in name)
        for net in (task.generator, task.ema.net):
            assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())
        moved = torch.cat(
            [(p - before[n]).detach().flatten() for n, p in task.generator.named_parameters() if p.requires_grad]
        )
        found[precision] = task.averages.take(), moved
    losses, moved = zip(found["fp32"], found["bf16"], strict=True)
    assert losses[0].keys() >= {"loss_g", "loss_d", "r1_penalty"}
    assert losses[0] == pytest.approx(losses[1], rel=0.1, abs=0.05)  # R1 is a square, after two steps of the heads
    assert losses[0] != losses[1]
    assert F.cosine_similarity(*moved, dim=0).item() > 0.8  # Adam's first steps have the size of the rate: signs decide


def test_each_step_moves_only_its_own_network(make):
    task = make()
    images, labels = next(task.stream)
    real = images.float() / 127.5 - 1

    def moved(step, *args):
        before = tensors(task)
        step(*args)
        assert not any(guard.skipped for guard in task._guards().values())
        parameters = {f"generator/{k}" for k, _ in task.generator.named_parameters()}
        parameters |= {f"heads/{k}" for k, _ in task.heads.named_parameters()}
        return {key.partition("/")[0] for key in differing_now(before) if key in parameters}

    def differing_now(before):
        now = tensors(task)
        return [key for key in before if not torch.equal(before[key], now[key])]

    assert moved(task.generator_step, labels) == {"generator"}
    assert all(p.grad is None for p in task.heads.parameters())
    assert moved(task.discriminator_step, real, labels) == {"heads"}
    assert moved(task.r1_step, real, labels) == {"heads"}
    assert all(p.grad is None for p in task.generator.parameters())


def test_the_discriminator_judges_the_images_of_the_generators_step(make):
    """Of two micro-batches in their order, and none is made twice."""
    task, made, judged = make(reuse_fakes=True, batch_gpu=2), [], []
    task.generator.register_forward_hook(lambda net, inputs, images: made.append(images.detach().clone()))
    task.features.register_forward_pre_hook(lambda net, inputs: judged.append(inputs[0].detach().clone()))
    iterate(task, 1)
    assert len(made) == 2 and len(judged) == 6  # each D micro-batch looks at generated images, then at real ones
    for seen, expected in zip((0, 1, 2, 4), (0, 1, 0, 1), strict=True):
        assert torch.equal(judged[seen], made[expected])
    assert not any(torch.equal(judged[seen], image) for seen in (3, 5) for image in made)
    iterate(task, 1, start=1)
    assert len(made) == 4 and torch.equal(judged[8], made[2]) and not torch.equal(made[2], made[0])


def test_r1_is_every_interval_but_not_at_the_start(make, monkeypatch):
    task, calls = make(r1_interval=3), []
    monkeypatch.setattr(task, "generator_step", lambda labels: False)
    monkeypatch.setattr(task, "discriminator_step", lambda real, labels: True)
    monkeypatch.setattr(task, "r1_step", lambda real, labels: calls.append(number))
    for number in range(10):
        task.iteration(number * BATCH)
    assert calls == [3, 6, 9]
    none = make(r1_gamma=0.0)
    assert none.r1_interval == 0
    assert none.d_guard.optimizer.param_groups[0]["betas"] == (0, 0.99)


class Gradients:
    """A guard that keeps the gradients and takes no step."""

    name = "kept"

    def __init__(self, params):
        self.params, self.skipped = [p for p in params if p.requires_grad], 0

    def begin(self):
        pass

    end = begin

    def apply(self):
        self.found = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return torch.nn.utils.get_total_norm([g for g in self.found if g is not None])


def test_gradients_of_all_three_steps_are_the_public_recipes(make):
    """Derived anew from its description, with the same fakes."""
    task = make(r1_interval=16, r1_gamma=0.5)
    images, _ = next(task.stream)
    real = images.float() / 127.5 - 1
    reference = copy.deepcopy((task.generator, task.features, task.heads))
    random = torch.Generator()
    random.set_state(task.random.generator.get_state())
    task.g_guard, task.d_guard, task.r1_guard = (
        Gradients(net.parameters()) for net in (task.generator, task.heads, task.heads)
    )
    task.generator_step(None)
    task.discriminator_step(real, None)
    task.r1_step(real, None)

    generator, features, heads = reference
    heads.requires_grad_(True)

    def rows(x):
        return [torch.cat([head[i] for head in backbone]) for backbone in heads(features(x)) for i in range(len(x))]

    def fakes():
        z = torch.randn(real.shape, generator=random)
        return generator(80 * z, torch.full((len(z),), 80.0))

    def gradients(loss, net):
        return torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)

    def compare(ours, theirs):
        # some are zero but for rounding: those of biases that a norm takes out again
        largest = max(b.abs().max().item() for b in theirs if b is not None)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                scale = b.abs().max().item()
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale + 1e-6 * largest)

    compare(task.g_guard.found, gradients(sum(F.softplus(-row).mean() for row in rows(fakes())), generator))
    fake = fakes().detach()
    loss = sum(F.softplus(row).mean() for row in rows(fake)) + sum(F.softplus(-row).mean() for row in rows(real))
    compare(task.d_guard.found, gradients(loss, heads))
    part = real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sum(row.sum() for row in rows(part)), part, create_graph=True)
    penalty = slope.square().sum([1, 2, 3])
    compare(task.r1_guard.found, gradients((penalty * 0.5 / 2).mean() * 16, heads))


def frozen_statistics(task):
    """Batch norm of the heads sees a micro-batch, not the batch; with fixed statistics the sums are equal."""
    for module in task.heads.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for module in task.heads.modules():  # nor may the power iteration take more steps
        if module.__class__.__name__ == "_SpectralNorm":
            module.eval()
    return task


@pytest.mark.parametrize("reduction", ["rows", "heads"])
def test_accumulated_gradients_are_those_of_the_batch(make, reduction):
    found = []
    for batch_gpu in (None, 2):
        task = frozen_statistics(make(batch_gpu=batch_gpu, logit_reduction=reduction))
        guards = [Gradients(net.parameters()) for net in (task.generator, task.heads, task.heads)]
        task.g_guard, task.d_guard, task.r1_guard = guards
        assert task.micro_batch == (batch_gpu or BATCH)
        images, labels = next(task.stream)
        real = images.float() / 127.5 - 1
        random = task.random.generator.get_state()
        latents = torch.randn(BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        pieces = iter([*latents.split(task.micro_batch)] * 2)
        task._draw = lambda pieces=pieces: next(pieces)
        task.random.generator.set_state(random)
        task.generator_step(labels)
        task.discriminator_step(real, labels)
        task.r1_step(real, labels)
        found.append(([g.found for g in guards], task.averages.take()))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        for a, b in zip(one, two, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item() + 1e-9)
    for name, value in found[0][1].items():
        assert found[1][1][name] == pytest.approx(value, rel=1e-4), name


def test_twenty_steps_repeat_to_the_bit(make):
    one, two = make(r1_interval=8), make(r1_interval=8)
    iterate(one, 20)
    iterate(two, 20)
    assert differing(tensors(one), tensors(two)) == []


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(make, tmp_path):
    length = dict(duration_mimg=20 * BATCH / 1e6, r1_interval=8, tick_kimg=0.04)
    whole = make(**length, run_dir=tmp_path / "whole")
    loop.run(whole, whole.config.run_dir, to_dict(whole.config), schedule_of(whole.config), ALONE)
    half = make(**{**length, "duration_mimg": 10 * BATCH / 1e6})
    loop.run(half, half.config.run_dir, to_dict(half.config), schedule_of(half.config), ALONE)
    rest = make(**length)
    outcome = loop.run(rest, rest.config.run_dir, to_dict(rest.config), schedule_of(rest.config), ALONE)
    assert outcome == loop.Outcome(20 * BATCH, 10 * BATCH)
    assert differing(tensors(whole), tensors(rest)) == []
    assert whole.stream.state_dict() == rest.stream.state_dict()
    saved = checkpoint.load(rest.config.run_dir / loop.CHECKPOINT).tensors
    assert differing(saved, tensors(rest)) == []


def test_what_a_run_leaves(make):
    task = make()
    config = task.config
    loop.run(task, config.run_dir, to_dict(config), schedule_of(config), ALONE)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16, 20]
    expected = {"images", "images_per_second", "loss_g", "loss_d", "logit_fake", "logit_real"}
    expected |= {"skipped_g", "skipped_d", "skipped_r1", "sign_accuracy_fake", "sign_accuracy_real"}
    expected |= {"grad_norm_g", "grad_norm_d", "minutes", "peak_host_gib"}
    expected |= {"discriminator_collapsed", "discriminator_saturated", "loss_ran_away"}
    assert lines[0].keys() == expected and lines[1].keys() == expected | {"r1_penalty", "grad_norm_r1"}
    grids = sorted(path.name for path in (config.run_dir / "samples").iterdir())
    assert grids == ["000000008.png", "000000016.png", "000000020.png"]
    exported = load_generator(config.run_dir)
    for ours, theirs in zip(task.ema.net.parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def poison(task, value):
    """From now on the generator's gradients hold `value`."""
    weight = next(p for p in task.generator.parameters() if p.requires_grad)
    return weight.register_hook(lambda gradient: torch.full_like(gradient, value))


def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(make):
    task = make()
    iterate(task, 1)
    before = tensors(task)
    hook = poison(task, float("nan"))
    iterate(task, 1, start=1)
    changed = {key.partition("/")[0] for key in differing(before, tensors(task))}
    assert not changed & {"generator", "ema", "g_optimizer"} and {"heads", "d_optimizer"} <= changed
    assert task.tick(8)["skipped_g"] == 1 and task.tick(8)["skipped_d"] == 0
    hook.remove()
    iterate(task, 1, start=2)
    assert "generator" in {key.partition("/")[0] for key in differing(before, tensors(task))}


def test_too_many_of_them_stop_the_run_with_the_state_saved(make):
    task = make(max_skipped_steps=2)
    poison(task, float("inf"))
    with pytest.raises(DivergedError, match="2 generator steps"):
        loop.run(task, task.config.run_dir, to_dict(task.config), schedule_of(task.config), ALONE)
    saved = checkpoint.load(task.config.run_dir / loop.DIVERGED)
    assert saved.values["images"] == 2 * BATCH and saved.values["skipped"] == {"g": 2, "d": 0, "r1": 0}
    assert all(t.isfinite().all() for t in saved.tensors.values() if t.is_floating_point())


def test_nothing_is_drawn_from_torchs_own_generator(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    iterate(make(), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_reach_both_networks(tmp_path):
    write_inputs(tmp_path, label_dim=3)
    config = tiny_config(tmp_path, cond=True)
    task = Distillation(config, components.build(config), ALONE)
    iterate(task, 3)
    assert task.tick(12)["skipped_g"] == 0
    table = task.heads.embedding.weight
    assert table.shape[0] == 3 and any(table is p for p in task.d_guard.optimizer.param_groups[0]["params"])
    config = tiny_config(tmp_path, cond=True, class_embedding="imagenet")
    frozen = Distillation(config, components.build(config), ALONE)
    before = frozen.heads.embedding.weight.clone()
    iterate(frozen, 3)
    assert torch.equal(frozen.heads.embedding.weight, before) and not frozen.heads.embedding.weight.requires_grad
