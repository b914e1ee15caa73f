"""What a generator starts from in place of its teacher's weights: random ones, or the teacher's in another order."""

import copy

import torch
from torch import Tensor

from gdd_fast.config import Initialisation
from gdd_fast.distill.freeze import freeze
from gdd_fast.models.preconditioned import Preconditioned


def start_from(teacher: Preconditioned, initialisation: Initialisation, level: int, seed: int) -> Preconditioned:
    """The network that becomes the generator: the teacher itself, or one of its form.

    `random`: the weights that its training begins with. `shuffled`: its own, with the channels of every weight that
    freeze level `level` freezes in another order, and level 1's for level 0. Does pretraining matter in what is
    frozen, or would any fixed weights of the same distribution do?
    """
    if initialisation == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return type(teacher)(**teacher.init_config())
    return shuffled(teacher, max(1, level), seed) if initialisation == "shuffled" else teacher


def shuffled(teacher: Preconditioned, level: int, seed: int) -> Preconditioned:
    """A copy whose weights of freeze level `level` have their input and output channels each in a random order."""
    net = copy.deepcopy(teacher)
    freeze(net, level)
    random = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.requires_grad:
            parameter.data = _reordered(parameter.data, random)
    return net


def _reordered(weight: Tensor, random: torch.Generator) -> Tensor:
    """(out,) or (out, in, ...) with outputs and inputs each in a random order."""
    weight = weight[torch.randperm(len(weight), generator=random)]
    if weight.ndim > 1:
        weight = weight[:, torch.randperm(weight.shape[1], generator=random)]
    return weight.contiguous()
