"""What the discriminator's steps may look at: images of the G step, and statistics of both kinds of images."""

import copy

import pytest
import torch
from test_distillation import Gradients, differing, iterate, tensors
from tiny_run import ALONE, BATCH, schedule_of, tiny_config
from torch import nn
from torch.nn import functional as F

from gdd_fast.config import to_dict
from gdd_fast.distill import components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.training import loop

pytestmark = pytest.mark.usefixtures("plain")

BOTH = {"reuse_fakes": True, "head_statistics": "running"}


@pytest.fixture(scope="module")
def built(inputs):
    return components.build(tiny_config(inputs))


@pytest.fixture
def make(inputs, built, tmp_path):
    def make(**settings):
        config = tiny_config(inputs, **{"run_dir": tmp_path / "run", **settings})
        return Distillation(config, copy.deepcopy(built), ALONE)

    return make


def norms(task):
    return [m for m in task.heads.modules() if isinstance(m, nn.BatchNorm2d)]


def test_the_discriminator_judges_the_images_of_the_generators_step(make):
    """Two micro-batches in their order, and no image is made twice."""
    task, made, judged = make(reuse_fakes=True, batch_gpu=2), [], []
    task.generator.register_forward_hook(lambda net, inputs, images: made.append(images.detach().clone()))
    task.features.register_forward_pre_hook(lambda net, inputs: judged.append(inputs[0].detach().clone()))
    iterate(task, 1)
    assert len(made) == 2 and len(judged) == 6
    first, second, *later = judged
    assert torch.equal(first, made[0]) and torch.equal(second, made[1])
    assert torch.equal(later[0], made[0]) and torch.equal(later[2], made[1])
    assert not torch.equal(later[1], made[0])  # the real ones between them
    iterate(task, 1, start=1)
    assert len(made) == 4 and not torch.equal(made[2], made[0])


def test_gradients_with_running_statistics_are_those_of_their_definition(make):
    """G and R1 by the moving averages, D by the statistics of generated and real images together."""
    task = make(**BOTH, r1_interval=16, r1_gamma=0.5)
    iterate(task, 2)  # averages that are no longer those of the beginning
    images, _ = next(task.stream)
    real = images.float() / 127.5 - 1
    generator, features, heads = copy.deepcopy((task.generator, task.features, task.heads))
    random = torch.Generator()
    random.set_state(task.random.generator.get_state())
    task.g_guard, task.d_guard, task.r1_guard = (
        Gradients(net.parameters()) for net in (task.generator, task.heads, task.heads)
    )
    task.generator_step(None)
    task.discriminator_step(real, None)
    task.r1_step(real, None)

    def rows(x):
        return torch.cat([torch.cat(backbone, dim=1) for backbone in heads(features(x))], dim=1)

    def compare(ours, loss, net):
        weights = [p for p in net.parameters() if p.requires_grad]
        theirs = torch.autograd.grad(loss, weights, allow_unused=True)
        largest = max(b.abs().max().item() for b in theirs if b is not None)
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-6 * largest)

    z = torch.randn(real.shape, generator=random)
    fake = generator(80 * z, torch.full((len(z),), 80.0))
    heads.eval()
    compare(task.g_guard.found, F.softplus(-rows(fake)).mean(1).sum(), generator)
    heads.train().requires_grad_(True)
    fakes, reals = rows(torch.cat([fake.detach(), real])).split(BATCH)
    compare(task.d_guard.found, (F.softplus(fakes).mean(1) + F.softplus(-reals).mean(1)).sum(), heads)
    heads.eval()
    part = real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(rows(part).sum(), part, create_graph=True)
    compare(task.r1_guard.found, (slope.square().sum([1, 2, 3]) * 0.5 / 2).mean() * 16, heads)


def test_a_step_that_is_not_finite_leaves_running_statistics_as_they_were(make):
    task = make(**BOTH)
    iterate(task, 1)
    before = [m.running_var.clone() for m in norms(task)]
    weight = next(p for p in task.generator.parameters() if p.requires_grad)
    kept = weight.detach().clone()
    weight.detach().fill_(float("nan"))
    iterate(task, 1, start=1)
    weight.detach().copy_(kept)
    assert all(torch.equal(m.running_var, was) for m, was in zip(norms(task), before, strict=True))
    iterate(task, 1, start=2)
    assert task.d_guard.skipped == 1 and all(m.running_var.isfinite().all() for m in norms(task))
    assert not any(torch.equal(m.running_var, was) for m, was in zip(norms(task), before, strict=True))


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(make, tmp_path):
    def run(task):
        loop.run(task, task.config.run_dir, to_dict(task.config), schedule_of(task.config), ALONE)
        return tensors(task)

    whole = run(make(**BOTH, duration_mimg=6 * BATCH / 1e6, run_dir=tmp_path / "whole"))
    run(make(**BOTH, duration_mimg=3 * BATCH / 1e6))
    assert differing(whole, run(make(**BOTH, duration_mimg=6 * BATCH / 1e6))) == []
