"""How a folded network is called: eager, compiled, or as CUDA graphs."""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError

Engine = Literal["auto", "eager", "compile", "graph"]


class Runner(Protocol):
    name: str

    def __call__(self, latents: Tensor, labels: Tensor | None) -> Tensor: ...


class _Eager:
    name = "eager"

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return self.network(latents, labels)


def make_engine(engine: Engine, network: nn.Module, device: torch.device) -> Runner:
    if engine not in ("auto", "eager"):
        raise ConfigError(f"unknown engine {engine!r}")
    return _Eager(network)
