"""The layers EDM's networks are built from, over the operators of gdd_fast.ops.

Each thing a U-Net block does to its activations is one call here: normalise and activate (`GroupNorm`), convolve and
resample (`Conv2d`, `resample`), merge a residual (`merge`), attend (`attention`). Where a decoder concatenates a skip,
the pair (x, skip) goes to the layers that read it, and `concat` builds it only for those that cannot take a pair.
`set_backend` chooses the operators' implementation for a whole network.

Parameters are float32 and stay so; a layer computes in the dtype of the activations it is given. Parameter and buffer
names equal EDM's (Karras et al., arXiv 2206.00364), so that its weights load unchanged.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, plan
from gdd_fast.errors import BackendError, ConfigError, WeightsError
from gdd_fast.ops import group_norm_silu, residual
from gdd_fast.ops._maps import autocast_dtype, memory_format
from gdd_fast.ops.attention import OPERATOR as ATTENTION
from gdd_fast.ops.attention import attention, check_triton
from gdd_fast.ops.frozen_conv2d import FrozenWeight, frozen_conv2d
from gdd_fast.ops.resample2d import OPERATOR as RESAMPLE2D
from gdd_fast.ops.resample2d import resample2d

Pair = tuple[Tensor, Tensor]
"""(x, skip): the concatenation of their channels, not built."""

Statistics = Tensor | tuple[Tensor | None, Tensor | None] | None
"""Of a map, or of each of a pair: what `merge` returned with it, None where nothing did."""


@dataclasses.dataclass(frozen=True)
class Init:
    """How a layer's weight and bias are drawn: a distribution over the fans, and a gain for each of the two."""

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"] = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: Sequence[int], gain: float, fan_in: int, fan_out: int) -> Tensor:
        """A float32 tensor of `shape`, from torch's default generator on the default device."""
        if gain == 0:
            return torch.zeros(shape)
        if self.mode == "kaiming_normal":
            return torch.randn(shape) * (gain * math.sqrt(1 / fan_in))
        bound = math.sqrt(6 / (fan_in + fan_out)) if self.mode == "xavier_uniform" else math.sqrt(3 / fan_in)
        return (torch.rand(shape) * 2 - 1) * (gain * bound)


class Linear(nn.Module):
    """`x @ weight.T + bias` in the dtype of `x`: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init: Init | None = None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        init = init or Init()
        fans = (in_features, out_features)
        self.weight = nn.Parameter(init.draw((out_features, in_features), init.weight, *fans))
        self.bias = nn.Parameter(init.draw((out_features,), init.bias, *fans)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x.dtype))


def resample_kernel(taps: Sequence[float]) -> Tensor:
    """The normalised 2-d filter, float32 (1, 1, K, K), of a symmetric 1-d one with an even number of taps."""
    if len(taps) < 2 or len(taps) % 2 or sum(taps) <= 0:
        raise ConfigError(f"resample_filter must have an even number of taps and a positive sum, got {list(taps)}.")
    row = torch.tensor([float(tap) for tap in taps])
    return (torch.outer(row, row) / row.sum().square())[None, None]


def resample(
    x: Tensor, kernel: Tensor, *, up: bool, padding: int, box: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Filter each channel with `kernel` (1, 1, K, K) and double (`up`) or halve the resolution of `x` (N, C, H, W).

    The resolution is exactly doubled or halved with `padding` = K / 2 - 1, in pixels of the larger image's border.
    `box` promises that the kernel is the 2x2 mean: plain PyTorch then repeats or averages pixels without a convolution.
    """
    return resample2d(x, kernel, up=up, padding=padding, box=box, backend=backend)


class Conv2d(nn.Module):
    """Convolution (odd `kernel`, same size) after an optional up- or downsampling by two; `kernel=0` only resamples.

    `conv_first` convolves at the full resolution and downsamples after it, over one common border of zeros. EDM calls
    this fused_resample and uses it in the residual encoder of NCSN++.

    `backend` is that of the resampling; see gdd_fast.backend.
    """

    operator = RESAMPLE2D
    backend: Backend = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        conv_first: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if (up and down) or (conv_first and not (down and kernel)):
            raise ConfigError("a convolution goes up or down, not both, and conv_first needs a kernel and down=True.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.conv_first = conv_first
        self.padding = kernel // 2
        self.border = len(resample_filter) // 2 - 1
        self.taps = tuple(resample_filter)
        self.box = len(self.taps) == 2 and self.taps[0] == self.taps[1]
        if kernel:
            init = init or Init()
            fans = (in_channels * kernel * kernel, out_channels * kernel * kernel)
            self.weight = nn.Parameter(init.draw((out_channels, in_channels, kernel, kernel), init.weight, *fans))
            self.bias = nn.Parameter(init.draw((out_channels,), init.bias, *fans))
        else:
            self.weight = self.bias = None
        self._frozen_weight = FrozenWeight()
        self.register_buffer("resample_filter", resample_kernel(self.taps) if up or down else None)

    def forward(self, x: Tensor | Pair, *, add_bias: bool = True) -> Tensor:
        """`x` (N, in_channels, H, W), or a pair if this is a 1x1 convolution, -> (N, out_channels, H', W').

        Without `add_bias` the bias is left to an operator that follows.
        """
        bias = self.bias if add_bias else None
        if isinstance(x, tuple):
            return self._convolve_pair(*x, bias)
        if self.conv_first:
            # The border that the filter needs is added once, before the convolution.
            x = self._convolve(x, self.bias, self.padding + self.border)
            return resample(x, self.resample_filter, up=False, padding=0, box=self.box, backend=self.backend)
        if self.up or self.down:
            options = {"up": self.up, "padding": self.border, "box": self.box, "backend": self.backend}
            x = resample(x, self.resample_filter, **options)
        return x if self.weight is None else self._convolve(x, bias, self.padding)

    def _convolve(self, x: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        if self.weight.requires_grad:
            return F.conv2d(x, self.weight.to(x.dtype), _cast(bias, x.dtype), padding=padding)
        weight = self._frozen_weight(self.weight, autocast_dtype(x), memory_format(x))
        return frozen_conv2d(x, weight, bias, padding=padding, backend=self.backend)

    def _convolve_pair(self, x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
        if self.weight is None or self.padding or self.up or self.down:
            raise ConfigError("only a 1x1 convolution without resampling takes a pair; concat(x, skip) for the others.")
        first, second = self.weight.to(x.dtype).split([x.shape[1], skip.shape[1]], 1)
        bias = _cast(bias, x.dtype)
        if (memory_format(x), memory_format(skip)) != (torch.channels_last, torch.channels_last):
            return F.conv2d(x, first, bias) + F.conv2d(skip, second)
        # In channels_last memory both are matrix products, and the second adds to the first without a pass for that.
        n, _, height, width = x.shape
        rows, skip_rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, skip))
        y = torch.addmm(F.linear(rows, first.flatten(1), bias), skip_rows, second.flatten(1).t())
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


class QkvConv2d(Conv2d):
    """The 1x1 convolution that makes queries, keys and values: (N, C, H, W) -> (N, 3 C, H, W) in "blocks".

    Weight and bias are EDM's, with channel c of head h of q (j = 0), k and v at (h * D + c) * 3 + j. They are put into
    the order that `attention` reads without a copy at every call: gradients find their way back by themselves, and no
    checkpoint, export or optimizer sees another order than EDM's.
    """

    def __init__(self, channels: int, num_heads: int, *, init: Init | None = None) -> None:
        super().__init__(channels, 3 * channels, 1, init=init)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        bias = self._blocks(self.bias)
        if self.weight.requires_grad:
            return F.conv2d(x, self._blocks(self.weight).to(x.dtype), bias.to(x.dtype))
        weight = self._frozen_weight(self.weight, autocast_dtype(x), memory_format(x))
        return frozen_conv2d(x, self._blocks(weight), bias, backend=self.backend)

    def _blocks(self, parameter: Tensor) -> Tensor:
        """(3 C, ...) from (head, channel, qkv) to (qkv, head, channel)."""
        rest = parameter.shape[1:]
        return parameter.unflatten(0, (self.num_heads, -1, 3)).movedim(2, 0).reshape(-1, *rest)


class GroupNorm(nn.Module):
    """Group normalisation and what surrounds it in a U-Net block: `group_norm_silu` with its parameters.

    y = act(norm(x + add) * weight + bias), or act((norm(x + add) * weight + bias) * (1 + scale) + shift).
    """

    operator = group_norm_silu.OPERATOR
    backend: Backend = "auto"

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = min(32, num_channels // 4)
        if self.num_groups == 0 or num_channels % self.num_groups:
            raise ConfigError(
                f"{num_channels} channels cannot be normalised in {self.num_groups} groups: choose model_channels "
                "as a multiple of 32 (or of 4, below 128 channels)."
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def is_fused(self, x: Tensor | Pair) -> bool:
        """Whether a GPU kernel normalises maps like x: an addend before the norm then costs no pass over them, and
        statistics that come with x save one. On a CPU the convolution adds its bias for nothing."""
        return group_norm_silu.chosen(x[0] if isinstance(x, tuple) else x, self.backend) == "triton"

    def forward(
        self,
        x: Tensor | Pair,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: Literal["silu"] | None = "silu",
        statistics: Statistics = None,
    ) -> Tensor:
        """`x` (N, C, H, W) in any floating dtype, or a pair -> the same. `add`, `scale`, `shift`: (N, C) or (1, C).

        `statistics` are those that `merge` returned with `x`, if it did; of a pair, a pair of them.
        """
        return group_norm_silu.group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=activation,
            statistics=statistics,
            backend=self.backend,
        )


def merge(
    x: Tensor,
    skip: Tensor,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    statistics: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`(x + skip + bias) * scale`: the end of every residual branch; on request with the statistics of the result."""
    return residual.residual(x, skip, bias, scale, statistics=statistics, backend=backend)


class Attention(nn.Module):
    """Self-attention over the pixels of what `QkvConv2d` makes: (N, 3 C, H, W) in "blocks" -> (N, C, H, W)."""

    operator = ATTENTION
    backend: Backend = "auto"

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = channels // num_heads
        self.num_heads = num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return attention(qkv, self.num_heads, "blocks", self.backend)


def operators_of(net: nn.Module) -> set[Operator]:
    """The operators in `net` that `set_backend` chooses an implementation for."""
    found = (getattr(module, "operator", None) for module in net.modules())
    return {operator for operator in found if isinstance(operator, Operator)}


def set_backend(net: nn.Module, backend: Backend) -> None:
    """Choose the implementation of every operator in `net`, of those that have it; the others run their definition.

    "auto" is the default of every layer. Raises BackendError for an unknown name; that a backend cannot run on the
    network's device shows, as the same error, when it is first called.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")
    for module in net.modules():
        operator = getattr(module, "operator", None)
        if isinstance(operator, Operator):
            module.backend = backend if backend == "auto" or backend in operator.fused else "torch"


def choose_backend(
    backend: Backend, device: str, nets: Iterable[nn.Module], further: Iterable[Operator] = ()
) -> dict[str, str]:
    """`set_backend` for all networks of a run -> what runs, by operator's name; see gdd_fast.backend.plan.

    `further` are the operators that the run calls itself. Raises BackendError before anything is set, also for layers
    of a form, or a network's compute type, that the backend asked for by name does not take.
    """
    nets = list(nets)
    runs = plan(backend, {*further}.union(*(operators_of(net) for net in nets)), device)
    for net in nets:
        for layer in net.modules():
            if isinstance(layer, Attention) and runs[ATTENTION.name] == "triton":
                check_triton(layer.head_dim, getattr(net, "dtype", torch.float32), device)
    for net in nets:
        set_backend(net, backend)
    return runs


def concat(x: Tensor, skip: Tensor) -> Tensor:
    """A decoder block's input: the activations and the encoder's skip, side by side in the channels."""
    return torch.cat([x, skip], dim=1)


class PositionalEmbedding(nn.Module):
    """Sines and cosines of geometrically spaced frequencies 1 ... 1/10000: (N,) -> (N, num_channels)."""

    def __init__(self, num_channels: int, *, endpoint: bool = False, sin_first: bool = False) -> None:
        super().__init__()
        self.half = num_channels // 2
        self.endpoint = endpoint
        self.sin_first = sin_first

    def forward(self, x: Tensor) -> Tensor:
        exponents = torch.arange(self.half, dtype=torch.float32, device=x.device) / (self.half - int(self.endpoint))
        return _waves(torch.outer(x, (1e-4**exponents).to(x.dtype)), self.sin_first)


class KeepsFrequencies:
    """Mixin of a module with the buffer `freqs`, which stays as precise as it is when the module is cast.

    Phases are some hundreds of radians: of frequencies rounded to bfloat16 they would be wrong by half a turn.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        freqs = self.freqs
        module = super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < freqs.dtype.itemsize:
            self.freqs = freqs.to(self.freqs.device)
        return module


class FourierEmbedding(KeepsFrequencies, nn.Module):
    """Sines and cosines of random frequencies, drawn once from N(0, 16^2): (N,) -> (N, num_channels).

    The frequencies stay float32 whatever the network is cast to; others raise WeightsError.
    """

    def __init__(self, num_channels: int, *, sin_first: bool = False) -> None:
        super().__init__()
        self.sin_first = sin_first
        self.register_buffer("freqs", torch.randn(num_channels // 2, dtype=torch.float32) * 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.freqs.dtype in (torch.bfloat16, torch.float16):
            raise WeightsError(
                f"the embedding's frequencies are {self.freqs.dtype}, too coarse for the noise level: load the weights "
                "in float32 and cast the network afterwards, which leaves the frequencies as they are"
            )
        return _waves(torch.outer(x, (math.tau * self.freqs).to(x.dtype)), self.sin_first)


def _waves(phase: Tensor, sin_first: bool) -> Tensor:
    waves = (phase.sin(), phase.cos()) if sin_first else (phase.cos(), phase.sin())
    return torch.cat(waves, dim=1)
