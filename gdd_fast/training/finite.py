"""`--debug-finite`: checks everything that a step computes, and names the first value that is not finite."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gdd_fast.errors import NotFiniteError


class FiniteWatch:
    """Checks the output of every layer of some networks, the gradients there and of weights, and optimizers.

    The host waits for each check. Layers that are fused into their block appear under its name. Calls outside `step`
    are not checked.

    Args:
        networks: by the names to use in errors; trained parameters must require gradients already.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._where = ""
        self._names: dict[nn.Parameter, str] = {}
        for name, network in networks.items():
            for path, module in network.named_modules():
                module.register_forward_hook(self._hook(f"{name}.{path}" if path else name))
            for path, parameter in network.named_parameters():
                if parameter.requires_grad:
                    self._names[parameter] = f"{name}.{path}"
                    parameter.register_post_accumulate_grad_hook(self._weight_hook(f"{name}.{path}"))

    @contextlib.contextmanager
    def step(self, name: str, images: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Check one step of `optimizer`, after `images` images.

        Raises:
            NotFiniteError: for the first layer, gradient, moment or weight with a value that is not finite.
        """
        self._where = f"in the {name} step after {images:,} images"
        try:
            yield
            for parameter, state in optimizer.state.items():
                label = self._names.get(parameter, "a weight")
                for entry, tensor in state.items():
                    self._check(tensor, f"the optimizer's {entry} of {label}")
                self._check(parameter, label)
        finally:
            self._where = ""

    def _hook(self, label: str):
        def look(module: nn.Module, inputs: object, output: object) -> None:
            for tensor in _tensors(output):
                self._check(tensor, f"the output of {label}")
                if self._where and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._check(gradient, f"the gradient at {label}'s output"))

        return look

    def _weight_hook(self, label: str):
        return lambda parameter: self._check(parameter.grad, f"the gradient of {label}")

    def _check(self, tensor: object, what: str) -> None:
        if not self._where or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return
        wrong = int((~tensor.detach().isfinite()).sum())
        if wrong:
            raise NotFiniteError(
                f"{wrong:,} of the {tensor.numel():,} values of {what} are NaN or infinite, {self._where}; "
                "the last checkpoint is unchanged"
            )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
