"""Folding of a network at one noise level."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.modules import set_backend

SIGMA = 80.0


class _Plain(nn.Module):
    def __init__(self, net: EDMPrecond, sigma: float) -> None:
        super().__init__()
        self.net = net
        self.sigma = sigma

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None and labels.dtype == torch.int64:
            labels = F.one_hot(labels, self.net.label_dim).float()
        return self.net(latents * self.sigma, self.sigma, labels)


def fold(
    net: EDMPrecond, *, sigma: float = SIGMA, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
) -> nn.Module:
    net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
    net.dtype = dtype
    set_backend(net, backend)
    return _Plain(net, sigma)
