"""The losses against the teacher, each against its formula written out, in EDM's parametrisation."""

import math

import pytest
import torch
from tiny_run import SIZE, tiny_network
from torch import nn

from gdd_fast.config import AblationConfig
from gdd_fast.distill.teacher_losses import Setup, progressive, trajectory
from gdd_fast.distill.teacher_losses import consistency_distillation as consistency
from gdd_fast.distill.teacher_losses.image_distances import DISTANCES, LpipsDistance, build_distance
from gdd_fast.distill.teacher_losses.teacher_loss import draw_integers
from gdd_fast.errors import WeightsError
from gdd_fast.metrics.features.lpips import Lpips, _alexnet
from gdd_fast.models.files.load import as_generator

N = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def level(i, count):
    """EDM's equation 5 with rho 7, i = 1 the lowest of `count` from 0.002 to 80."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (low + (i - 1) / (count - 1) * (high - low)) ** 7


@pytest.fixture
def networks():
    """A teacher, and a generator that has moved away from it."""
    teacher = tiny_network().eval().requires_grad_(False)
    student = as_generator(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=seeded(3)))
    return teacher, student


@pytest.fixture
def images():
    return torch.rand(N, 1, SIZE, SIZE, generator=seeded(1)) * 2 - 1


@pytest.fixture
def noise(monkeypatch, images):
    fixed = torch.randn(images.shape, generator=seeded(2))
    for module in (consistency, progressive, trajectory):
        monkeypatch.setattr(module, "draw_noise", lambda images, random: fixed)
    return fixed


def draws(monkeypatch, module, *values):
    """The module draws these integers, in turn, within the bounds that it asks for."""
    queue = [torch.tensor(v) for v in values]

    def draw(low, high, count, random):
        value = queue.pop(0)
        assert len(value) == count and bool((value >= low).all()) and bool((value <= high).all())
        return value

    monkeypatch.setattr(module, "draw_integers", draw)


def make(loss, networks, distance="l2", **options):
    teacher, student = networks
    return loss(Setup(AblationConfig(**options), teacher, student, DISTANCES[distance]))


def denoised(net, x, t):
    return net(x, torch.tensor([float(t)], dtype=torch.float32), None)


def heun(net, x, t, s):
    slope = (x - denoised(net, x, t)) / t
    there = x + (s - t) * slope
    return x + (s - t) * (slope + (there - denoised(net, there, s)) / s) / 2


@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
def test_consistency_distillation(networks, images, noise, monkeypatch, distance):
    """arXiv 2303.01469, equation 7, with the student itself as its target."""
    teacher, student = networks
    lower = [0, 3, 8, 10]  # n - 1 of the paper's n = 1 ... 11
    draws(monkeypatch, consistency, lower)
    found = make(consistency.ConsistencyLoss, networks, distance, teacher_loss_levels=12)(
        student, images, None, seeded()
    )
    for i, n in enumerate(lower):
        t_low, t_high = level(n + 1, 12), level(n + 2, 12)
        x = images[i : i + 1] + t_high * noise[i : i + 1]
        target = denoised(student, heun(teacher, x, t_high, t_low), t_low).detach()
        difference = denoised(student, x, t_high) - target
        if distance == "l2":
            expected = difference.square().mean()
        else:
            c = 0.00054 * math.sqrt(SIZE * SIZE)
            expected = (difference.square().sum() + c**2).sqrt() - c
        torch.testing.assert_close(found[i], expected, rtol=2e-4, atol=1e-6)
    # no gradient through the target
    weight = student.model.map_layer0.weight
    (through_loss,) = torch.autograd.grad(found[3], weight, retain_graph=True)
    (by_hand,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(through_loss, by_hand, rtol=1e-3, atol=1e-4 * float(by_hand.abs().max()) + 1e-5)


class GaussianFlow(nn.Module):
    """For data N(0, 0.25): the denoiser 0.25 / (0.25 + t^2) x, or the end of its ODE, x sqrt(... / (0.25 + t^2))."""

    sigma_init = 80.0

    def __init__(self, is_flow):
        super().__init__()
        self.is_flow, self.scale = is_flow, nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels):
        share = ((0.25 + 0.002**2 * self.is_flow) / (0.25 + t**2)).reshape(-1, 1, 1, 1)
        return self.scale * x * (share.sqrt() if self.is_flow else share)


def test_the_exact_end_of_the_odes_flow_has_no_consistency_loss(images):
    denoiser, flow = GaussianFlow(False), GaussianFlow(True)
    loss = make(consistency.ConsistencyLoss, (denoiser, flow), teacher_loss_levels=80)
    exact = loss(flow, images.repeat(16, 1, 1, 1), None, seeded()).mean().item()
    other = loss(denoiser, images.repeat(16, 1, 1, 1), None, seeded()).mean().item()
    assert exact < 1e-6 < 1e-4 < other


def test_the_target_follows_slowly(networks, images):
    _, student = networks
    loss = make(consistency.ConsistencyLoss, networks, target_ema=0.75)
    before = student.model.map_layer0.weight.detach().clone()
    with torch.no_grad():
        student.model.map_layer0.weight.add_(1)
    loss.end(student)
    torch.testing.assert_close(loss.slow.net.model.map_layer0.weight, before + 0.25)
    assert not any(p.requires_grad for p in loss.parameters())
    moved = loss(student, images, None, seeded()).detach()
    loss.slow.follow(student)
    assert not torch.equal(moved, loss(student, images, None, seeded()))


def test_progressive_distillation(networks, images, noise, monkeypatch):
    """arXiv 2202.00512, algorithm 2 with alpha = 1, first stage: 4 steps of the student, 8 of the teacher."""
    teacher, student = networks
    ends = [0, 1, 2, 3]  # of 4 steps
    draws(monkeypatch, progressive, ends)
    found = make(progressive.ProgressiveLoss, networks, pd_steps=4)(student, images, None, seeded())
    for i, end in enumerate(ends):
        t2, t1, t0 = (level(2 * end + k, 9) for k in (1, 2, 3))
        x = images[i : i + 1] + t0 * noise[i : i + 1]
        middle = x + (t1 - t0) / t0 * (x - denoised(teacher, x, t0))
        last = middle + (t2 - t1) / t1 * (middle - denoised(teacher, middle, t1))
        target = (last - t2 / t0 * x) / (1 - t2 / t0)
        expected = max(1 / t0**2, 1) * (denoised(student, x, t0) - target).square().mean()
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-6)


def test_a_student_becomes_the_teacher_of_half_the_steps(networks, images, noise, monkeypatch):
    teacher, student = networks
    loss = make(progressive.ProgressiveLoss, networks, pd_steps=2, pd_stage_kimg=0.01)
    loss.begin(student, 8)
    assert int(loss.stage) == 0 and not any(key.startswith("stage_teacher") for key in loss.state_dict())
    loss.begin(student, 10)
    loss.begin(student, 1000)
    assert int(loss.stage) == 1
    frozen = {key: value.clone() for key, value in student.state_dict().items()}
    with torch.no_grad():
        student.model.map_layer0.weight.mul_(1.1)
    state = loss.state_dict()
    assert torch.equal(state["stage_teacher.model.map_layer0.weight"], frozen["model.map_layer0.weight"])
    again = make(progressive.ProgressiveLoss, networks, pd_steps=2, pd_stage_kimg=0.01)
    again.restore(state, student)
    draws(monkeypatch, progressive, [0] * N, [0] * N)
    found = loss(student, images, None, seeded())
    assert torch.equal(found, again(student, images, None, seeded()))
    # one step from 80, to where the former student comes in two
    former = as_generator(teacher)
    former.load_state_dict(frozen)
    t2, t1, t0 = 0.002, level(2, 3), 80.0
    x = images + t0 * noise
    middle = x + (t1 - t0) / t0 * (x - denoised(former, x, t0))
    last = middle + (t2 - t1) / t1 * (middle - denoised(former, middle, t1))
    target = (last - t2 / t0 * x) / (1 - t2 / t0)
    expected = (denoised(student, x, t0) - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_consistency_trajectory(networks, images, noise, monkeypatch):
    """arXiv 2310.02279: G, soft consistency, score matching; the embedding of the end level has no effect yet."""
    teacher, student = networks
    start, end, solved = [1, 5, 9, 11], [0, 2, 3, 11 - 3], [1, 2, 3, 1]
    draws(monkeypatch, trajectory, start, end, solved)
    loss = make(trajectory.TrajectoryLoss, networks, teacher_loss_levels=12, ctm_dsm_weight=0.5)
    found = loss(student, images, None, seeded())

    def jump(x, t, s):
        return x if s == t else s / t * x + (1 - s / t) * denoised(student, x, t)

    for i in range(N):
        levels = [level(k + 1, 12) for k in range(12)]
        t, s, low = levels[start[i]], levels[end[i]], levels[0]
        x = images[i : i + 1] + t * noise[i : i + 1]
        there = x
        for k in range(solved[i]):
            there = heun(teacher, there, levels[start[i] - k], levels[start[i] - k - 1])
        u = levels[start[i] - solved[i]]
        target = jump(jump(there, u, s), s, low)
        expected = (jump(jump(x, t, s), s, low) - target).square().mean()
        expected = expected + 0.5 * (denoised(student, x, t) - images[i : i + 1]).square().mean()
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-6)


def test_the_end_of_a_jump_is_embedded_and_the_last_one_is_the_generators(networks, images):
    _, student = networks
    loss = make(trajectory.TrajectoryLoss, networks)
    loss(student, images, None, seeded()).sum().backward()
    assert loss.embedding.outer.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.slow.parameters())
    with torch.no_grad():
        loss.embedding.outer.weight.normal_(generator=seeded())
    x, t = 80 * images, torch.full((N,), 80.0)

    def predicted(s):
        return loss._denoise(student, loss.embedding, x, t, torch.full((N,), s), None)

    assert torch.equal(predicted(0.002), student(x, t, None))
    assert not torch.allclose(predicted(1.0), student(x, t, None), atol=1e-3)
    assert not student.model.map_layer1._forward_hooks


def test_draws_are_uniform_between_bounds_of_their_own():
    high = torch.tensor([1, 3]).repeat(4000)
    drawn = draw_integers(1, high, 8000, seeded())
    assert bool((drawn[::2] == 1).all())
    counts = torch.bincount(drawn[1::2], minlength=4)
    assert counts[0] == 0 and bool((counts[1:] > 1200).all()) and len(counts) == 4


def test_lpips_of_small_gray_images_is_that_of_enlarged_ones(images):
    layers, taps = _alexnet()
    torch.manual_seed(0)
    weights = {f"features.{k}": v for k, v in layers.state_dict().items()}
    weights |= {f"lin{i}.weight": torch.rand(1, layers[t - 1].out_channels, 1, 1) for i, t in enumerate(taps)}
    lpips = Lpips(weights)
    enlarged = [
        nn.functional.interpolate(x.repeat(1, 3, 1, 1), scale_factor=4, mode="bilinear") for x in (images, -images)
    ]
    a = images.requires_grad_()
    found = LpipsDistance(lpips)(a, -images.detach())
    torch.testing.assert_close(found, lpips(*enlarged))
    assert found.shape == (N,) and torch.autograd.grad(found.sum(), a)[0].any()


def test_lpips_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.pth: there is no such file"):
        build_distance("lpips-vgg", {"lpips-vgg": tmp_path / "nowhere.pth"})
