"""Networks that distillations begin with beside the teacher: what is left when its knowledge is taken away."""

from pathlib import Path

import torch
from torch import nn

from gdd_fast.distill.freeze import freeze
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.files.save import save_network


def write_random(teacher: str, folder: Path, seed: int = 0) -> None:
    """A network of the teacher's form with the weights that training begins with."""
    net = load_generator(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_network(type(net)(**net.init_config()), folder)


def write_shuffled(teacher: str, folder: Path, seed: int = 0) -> None:
    """The teacher with the channels of every weight that GDD-I freezes in another order.

    Each layer keeps the values that it has, so their distribution and scale; which channel they connect to which is
    lost. Does pretraining matter in what is frozen, or would any fixed weights do?
    """
    net = load_generator(teacher)
    freeze(net, 1)
    random = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.requires_grad:
            parameter.data = _shuffled(parameter.data, random)
    save_network(net, folder)


def _shuffled(weight: nn.Parameter | torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """(out,) or (out, in, ...) with outputs and inputs each in a random order."""
    weight = weight[torch.randperm(len(weight), generator=random)]
    if weight.ndim > 1:
        weight = weight[:, torch.randperm(weight.shape[1], generator=random)]
    return weight.contiguous()


WRITERS = {"random": write_random, "shuffled": write_shuffled}
