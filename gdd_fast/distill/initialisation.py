"""What a generator starts from instead of its teacher's weights: random ones, or the teacher's, channels permuted."""

import copy

import torch
from torch import Tensor

from gdd_fast.config import Initialisation
from gdd_fast.distill.freeze import freeze
from gdd_fast.models.preconditioned import Preconditioned


def start_from(teacher: Preconditioned, initialisation: Initialisation, level: int, seed: int) -> Preconditioned:
    """The network that becomes the generator: the teacher itself, or one of the same architecture.

    `random`: freshly initialised weights. `shuffled`: the teacher's, with the channels permuted in every weight that
    freeze level `level` freezes (level 1 if it is 0). This asks whether pretraining matters for the frozen weights, or
    any fixed weights of the same distribution would do.
    """
    if initialisation == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return type(teacher)(**teacher.init_config())
    return shuffled(teacher, max(1, level), seed) if initialisation == "shuffled" else teacher


def shuffled(teacher: Preconditioned, level: int, seed: int) -> Preconditioned:
    """A copy whose weights that freeze level `level` freezes have input and output channels randomly permuted."""
    net = copy.deepcopy(teacher)
    freeze(net, level)
    random = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.requires_grad:
            parameter.data = _reordered(parameter.data, random)
    return net


def _reordered(weight: Tensor, random: torch.Generator) -> Tensor:
    """(out,) or (out, in, ...) with outputs and inputs each permuted at random."""
    weight = weight[torch.randperm(len(weight), generator=random)]
    if weight.ndim > 1:
        weight = weight[:, torch.randperm(weight.shape[1], generator=random)]
    return weight.contiguous()
