"""Floating-point operations of convolutions, matrix products and attention, by PyTorch's own formulas.

PyTorch's FlopCounterMode also follows modules, with hooks that a gradient of a leaf (R1, backbones) does not survive;
this counts the operators alone. On meta tensors nothing is computed.
"""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=outputs)
        return outputs


def count_flops(run: Callable[[], Any]) -> int:
    """FLOP of `run()`, two for a multiply-add, backward passes included. Meant for plain PyTorch on meta tensors."""
    with _Counter() as counter:
        run()
    return counter.flops
