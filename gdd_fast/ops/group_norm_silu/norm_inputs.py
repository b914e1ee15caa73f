"""The arguments of one call of group_norm_silu, in the order of every schema, and their checks."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import DTYPES, compute_dtype

Statistics = tuple[Tensor | None, Tensor | None]
"""Those of x and of skip, as `residual` returns them, if known."""


class NormInputs(NamedTuple):
    """Shapes and dtypes as for `group_norm_silu`."""

    x: Tensor
    skip: Tensor | None
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    silu: bool

    @property
    def maps(self) -> tuple[Tensor, Tensor | None]:
        return self.x, self.skip

    @property
    def rows(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The offset before the norm, and the scale and shift after it."""
        return self.add, self.scale, self.shift

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All tensors except the maps, in the order of their gradients."""
        return self.weight, self.bias, *self.rows

    def mapped(self, maps: Callable[[Tensor], Tensor], parameters: Callable[[Tensor], Tensor]) -> "NormInputs":
        """The same with x and skip changed by the function `maps` and the other tensors by `parameters`."""
        add, scale, shift = (None if t is None else parameters(t) for t in self.rows)
        return self._replace(
            x=maps(self.x),
            skip=None if self.skip is None else maps(self.skip),
            weight=parameters(self.weight),
            bias=parameters(self.bias),
            add=add,
            scale=scale,
            shift=shift,
        )


SCHEMA = (
    "Tensor x, Tensor? skip, int num_groups, Tensor weight, Tensor bias, float eps, "
    "Tensor? add, Tensor? scale, Tensor? shift, bool silu"
)
LENGTH = len(NormInputs._fields)
DIFFERENTIABLE = tuple(NormInputs._fields.index(n) for n in ("x", "skip", "weight", "bias", "add", "scale", "shift"))
"""The indices of the differentiable tensors."""


def check(inputs: NormInputs, statistics: Statistics) -> None:
    """Raise InputError unless shapes, dtypes and devices fit together."""
    x, skip = inputs.x, inputs.skip
    if x.dim() != 4:
        raise InputError(f"group_norm_silu: x must be (N, C, H, W), not of shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise InputError(f"group_norm_silu: x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    n, c, h, w = x.shape
    if h == 0 or w == 0:
        raise InputError(f"group_norm_silu: x of shape {tuple(x.shape)} has no pixels to take statistics of")
    channels = [c]
    if skip is not None:
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (n, h, w) or skip.dtype != x.dtype:
            raise InputError(
                f"group_norm_silu: the second tensor of a pair must match the first but in channels, "
                f"{x.dtype} ({n}, *, {h}, {w}), not {skip.dtype} {tuple(skip.shape)}"
            )
        _check_device("skip", skip, x)
        channels.append(skip.shape[1])
        c += skip.shape[1]
    if inputs.num_groups < 1 or c % inputs.num_groups or c == 0:
        raise InputError(f"group_norm_silu: {c} channels do not divide into {inputs.num_groups} groups")
    for name, tensor in zip(("weight", "bias", "add", "scale", "shift"), inputs.parameters, strict=True):
        if tensor is None:
            continue
        fits = ((c,),) if name in ("weight", "bias") else ((n, c), (1, c))
        if tensor.shape not in fits:
            want = " or ".join(map(str, fits))
            raise InputError(f"group_norm_silu: {name} must be {want}, not of shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"group_norm_silu: {name} must be floating, not {tensor.dtype}")
        _check_device(name, tensor, x)
    for tensor, width in zip(statistics, channels, strict=False):
        if tensor is None:
            continue
        if tensor.dim() != 4 or tensor.shape != (n, tensor.shape[1], 2, width) or tensor.dtype != compute_dtype(x):
            raise InputError(
                f"group_norm_silu: statistics must be {compute_dtype(x)} ({n}, *, 2, {width}), "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
        _check_device("statistics", tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(f"group_norm_silu: {name} is on {tensor.device}, x on {x.device}")
