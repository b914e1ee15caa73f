"""The GAN loss against the public recipe's arithmetic, and R1 against numbers found another way."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gdd_fast.distill.losses import discriminator_loss, generator_loss, mean_and_positive, r1_penalty, reduce_logits


def logits(images=4, seed=0):
    """Two backbones, three heads each, with 25, 4 and 1 positions."""
    random = torch.Generator().manual_seed(seed)
    return [[torch.randn(images, p, generator=random) for p in (25, 4, 1)] for _ in range(2)]


def softplus(x):
    return math.log1p(math.exp(x))


def public_sum(values, sign):
    """What the public recipe adds up: for each image under each backbone, the mean over all positions of its heads."""
    total = 0.0
    for heads in values:
        for image in range(len(heads[0])):
            row = [softplus(sign * x) for head in heads for x in head[image].tolist()]
            total += sum(row) / len(row)
    return total


def test_rows_is_the_public_recipe():
    fake, real = logits(seed=1), logits(seed=2)
    torch.testing.assert_close(generator_loss(fake, "rows", 4).item(), public_sum(fake, -1), rtol=1e-5, atol=0)
    expected = public_sum(fake, 1) + public_sum(real, -1)
    torch.testing.assert_close(discriminator_loss(fake, real, "rows", 4).item(), expected, rtol=1e-5, atol=0)


def test_heads_is_a_sum_over_heads_of_means():
    fake = logits()
    expected = sum(torch.nn.functional.softplus(-head).mean() for heads in fake for head in heads)
    torch.testing.assert_close(generator_loss(fake, "heads", 4), expected)


@pytest.mark.parametrize("reduction", ["rows", "heads"])
def test_micro_batches_add_up(reduction):
    whole = logits(images=6)
    parts = [[[head[k : k + 2] for head in heads] for heads in whole] for k in (0, 2, 4)]
    total = sum(reduce_logits(part, reduction, 6) for part in parts)
    torch.testing.assert_close(total, reduce_logits(whole, reduction, 6))


def test_bfloat16_logits_are_reduced_in_float32():
    half = [[head.bfloat16() for head in heads] for heads in logits()]
    exact = [[head.float() for head in heads] for heads in half]
    loss = generator_loss(half, "rows", 4)
    assert loss.dtype == torch.float32 and loss == generator_loss(exact, "rows", 4)


def test_mean_and_share_above_zero_count_every_logit_once():
    logits = [[torch.tensor([[1.0, -2.0]])], [torch.tensor([[6.0]]), torch.tensor([[0.0, 5.0]])]]
    mean, positive = mean_and_positive(logits)
    assert (mean.item(), positive.item()) == pytest.approx((2, 3 / 5))


class Judge(nn.Module):
    """A frozen convolution under a trainable one, as the discriminator is built, but smooth: differences converge."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Conv2d(2, 3, 3).requires_grad_(False)
        self.head = nn.Conv2d(3, 2, 3)
        self.double()

    def forward(self, x):
        y = self.head(torch.tanh(self.frozen(x)))
        return [[torch.sin(y).flatten(1)]]


def images(count=2):
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_r1_is_the_squared_gradient_of_each_image():
    judge, x, eps = Judge(), images(), 1e-5
    squares = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for place in range(x[0].numel()):  # both images at once: one does not see the other
            step = torch.zeros_like(x)
            step.view(2, -1)[:, place] = eps
            squares += ((judge(x + step)[0][0].sum(1) - judge(x - step)[0][0].sum(1)) / (2 * eps)) ** 2
    part = x.requires_grad_()
    torch.testing.assert_close(r1_penalty(part, judge(part)).double(), squares, rtol=1e-5, atol=0)


def test_the_gradient_of_r1_with_respect_to_the_heads():
    judge, eps = Judge(), 1e-4

    def value():
        with torch.enable_grad():
            part = images().requires_grad_()
            (gradient,) = torch.autograd.grad(judge(part)[0][0].sum(), part)
        return gradient.square().sum().item()

    part = images().requires_grad_()
    r1_penalty(part, judge(part)).sum().backward()
    assert judge.frozen.weight.grad is None
    for place in [(0, 0, 0, 0), (1, 2, 1, 2), (0, 1, 2, 0)]:
        with torch.no_grad():
            judge.head.weight[place] += eps
            above = value()
            judge.head.weight[place] -= 2 * eps
            below = value()
            judge.head.weight[place] += eps
        expected = torch.tensor((above - below) / (2 * eps), dtype=torch.float64)
        torch.testing.assert_close(judge.head.weight.grad[place], expected, rtol=1e-4, atol=1e-5)


class WeightGradients(TorchDispatchMode):
    """Counts the gradients that convolution_backward is asked for."""

    def __init__(self):
        super().__init__()
        self.inputs = self.weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.inputs += args[-1][0]
            self.weights += args[-1][1]
        return function(*args, **(kwargs or {}))


def test_the_inner_pass_of_r1_computes_no_weight_gradient():
    judge, part = Judge(), images().requires_grad_()
    found = judge(part)
    with WeightGradients() as counts:
        penalty = r1_penalty(part, found)
    assert (counts.inputs, counts.weights) == (2, 0)
    penalty.sum().backward()
    assert judge.head.weight.grad is not None
