"""Frozen networks, such as timm's and torchvision's feature networks: gradients pass through them to their input only.

    convolution     frozen: keeps nothing for backward
    batch norm      frozen and in evaluation mode: keeps nothing for backward
    ReLU, ReLU6     keep one bit per element instead of their result
    max pooling     of 2x2 windows keeps one byte per output instead of its input and an int64 index per output

This saves the memory kept for backward. Each call decides whether it applies: a network that is trained or unfrozen
after all runs PyTorch's own layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.acceleration.class_exchange import Fast, library_class
from gdd_fast.acceleration.replacements import Decisions
from gdd_fast.backend import Backend
from gdd_fast.ops import max_pool2x2 as pooling
from gdd_fast.ops import relu_bits as bits
from gdd_fast.ops._memory_format import autocast_dtype, memory_format
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d
from gdd_fast.ops.relu_bits import Activation, dense, relu_bits

SMALL = 1 << 17
"""How many values a CPU normalises in about 50 microseconds."""
TRAINED = "its parameters are trained (requires_grad), so PyTorch has to keep its input"


def decide(decisions: Decisions) -> None:
    """Decide about every convolution, batch norm, ReLU and pooling in the network."""
    for module in decisions.names:
        if not decisions.undecided(module):
            continue
        if isinstance(module, nn.Conv2d):
            _decide_conv(decisions, module)
        elif isinstance(module, nn.BatchNorm2d):
            _decide_batch_norm(decisions, module)
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            _decide_relu(decisions, module)
        elif isinstance(module, nn.MaxPool2d):
            _decide_pool(decisions, module)


# --- convolutions


class FastConv(Fast):
    """nn.Conv2d that keeps no input for backward while it is frozen."""

    _gdd_fast: tuple[int, int]  # the padding as numbers

    def fast_forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not _saves(x, weight):
            return super().forward(x)
        x = self._padded(x)
        if memory_format(x) is torch.channels_last:
            weight = converted(weight, autocast_dtype(x), torch.channels_last)
        return frozen_conv2d(x, weight, self.bias, self.stride, self._gdd_fast, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> Tensor:
        return x


class FastConvSame(FastConv):
    """timm's convolution with TensorFlow's "SAME" padding: of an odd total, one row more is added after than before."""

    def _padded(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (self._same(x.shape[2 + i], i) for i in range(2))
        return F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x

    def _same(self, size: int, i: int) -> tuple[int, int]:
        stride, reach = self.stride[i], (self.kernel_size[i] - 1) * self.dilation[i]
        total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
        return total // 2, total - total // 2


def _saves(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolution would keep x for the gradient of a weight that needs none."""
    if not (x.requires_grad and torch.is_grad_enabled()) or weight.requires_grad or x.dim() != 4:
        return False
    return x.dtype == weight.dtype or autocast_dtype(x) != x.dtype


def _decide_conv(decisions: Decisions, conv: nn.Conv2d) -> None:
    kind = type(conv)
    same = library_class("timm.layers.conv2d_same", "Conv2dSame")
    mixin = FastConvSame if same is not None and kind.forward is same.forward else FastConv
    if mixin is FastConv and not (kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward):
        decisions.leave(conv, "its class has a forward of its own")
    elif conv.weight.requires_grad:
        decisions.leave(conv, TRAINED)
    elif conv.padding_mode != "zeros" or (padding := _padding(conv)) is None:
        decisions.leave(conv, f"the frozen convolution cannot pad like this ({conv.padding_mode}, {conv.padding})")
    else:
        decisions.replace(conv, mixin, padding, "frozen: keeps no input for backward")


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)
    return conv.padding


# --- batch norms


class FastBatchNorm(Fast):
    """nn.BatchNorm2d that keeps no map for backward while it is frozen and normalises by its running statistics."""

    def fast_forward(self, x: Tensor) -> Tensor:
        if not _keeps_for_nothing(self, x):
            return super().forward(x)
        y = _FrozenBatchNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return self._finished(y)

    def _finished(self, y: Tensor) -> Tensor:
        return y


class FastBatchNormAct(FastBatchNorm):
    """timm's batch norm, followed by a dropout and an activation."""

    def _finished(self, y: Tensor) -> Tensor:
        return self.act(self.drop(y))


class _FrozenBatchNorm(torch.autograd.Function):
    """PyTorch's batch norm with constant statistics and parameters: computing its gradient needs no feature map."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _FrozenBatchNormGradient.apply(dy, *ctx.saved_tensors, ctx.eps), *[None] * 5


class _FrozenBatchNormGradient(torch.autograd.Function):
    """dy times a constant per channel, by PyTorch's own operator; being linear in dy, it is its own gradient."""

    @staticmethod
    def forward(ctx, dy: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float):
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        # dy stands in for the norm's input, which is needed only for gradients of weight and bias, not wanted here
        statistics = mean, var, None, None
        wanted = [True, False, False]
        return torch.ops.aten.native_batch_norm_backward(dy, dy, weight, *statistics, False, eps, wanted)[0]

    @staticmethod
    def backward(ctx, ddx: Tensor):
        return _FrozenBatchNormGradient.apply(ddx, *ctx.saved_tensors, ctx.eps), *[None] * 4


def _keeps_for_nothing(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether PyTorch's norm would keep x for gradients of parameters and statistics that need none.

    Small maps on a CPU do not count: autograd in Python takes longer than norming them.
    """
    if x.is_cpu and x.numel() < SMALL:
        return False
    keeps = not torch.compiler.is_compiling() and x.dim() == 4 and x.requires_grad and torch.is_grad_enabled()
    return keeps and not norm.training and norm.running_mean is not None and not _is_trained(norm)


def _is_trained(norm: nn.BatchNorm2d) -> bool:
    return any(t is not None and t.requires_grad for t in (norm.weight, norm.bias))


def _decide_batch_norm(decisions: Decisions, norm: nn.BatchNorm2d) -> None:
    with_activation = library_class("timm.layers.norm_act", "BatchNormAct2d")
    if type(norm).forward is nn.BatchNorm2d.forward:
        mixin: type[Fast] = FastBatchNorm
    elif with_activation is not None and type(norm).forward is with_activation.forward:
        mixin = FastBatchNormAct
    else:
        decisions.leave(norm, "its class has a forward of its own")
        return
    if _is_trained(norm):
        decisions.leave(norm, "its parameters are trained (requires_grad)")
    elif norm.running_mean is None:
        decisions.leave(norm, "it has no running statistics: it normalises by those of the batch")
    else:
        decisions.replace(norm, mixin, None, "frozen: in eval mode keeps no input for backward")


# --- activations and pooling


@dataclass
class ReluState:
    activation: Activation
    backend: Backend


class FastRelu(Fast):
    """nn.ReLU or nn.ReLU6 that keeps one bit per element."""

    _gdd_fast: ReluState

    def fast_forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled() and dense(x)):
            return super().forward(x)
        return relu_bits(x, self._gdd_fast.activation, self.inplace, self._gdd_fast.backend)


def _decide_relu(decisions: Decisions, relu: nn.ReLU | nn.ReLU6) -> None:
    six = isinstance(relu, nn.ReLU6)
    backend = decisions.backend_of(bits.OPERATOR)
    if type(relu).forward is not (nn.ReLU6 if six else nn.ReLU).forward:
        decisions.leave(relu, "its class has a forward of its own")
    elif any(p.requires_grad for p in _surroundings(decisions, relu).parameters()):
        decisions.leave(relu, "the network around it is trained: the next layer keeps the activation anyway")
    elif backend is None:
        decisions.leave(relu, decisions.missing(bits.OPERATOR))
    else:
        state = ReluState("relu6" if six else "relu", backend)
        decisions.replace(relu, FastRelu, state, "keeps one bit per element for backward")


def _surroundings(decisions: Decisions, module: nn.Module) -> nn.Module:
    """The nearest module around this one that has parameters, or the network."""
    path = decisions.names[module]
    while path:
        path = path.rpartition(".")[0]
        around = decisions.net.get_submodule(path)
        if any(True for _ in around.parameters()):
            return around
    return decisions.net


class FastMaxPool(Fast):
    """nn.MaxPool2d over 2x2 windows that keeps one byte per output."""

    _gdd_fast: Backend

    def fast_forward(self, x: Tensor) -> Tensor:
        fits = x.dim() == 4 and x.is_floating_point() and min(x.shape[2:]) >= 2
        if torch.compiler.is_compiling() or not (fits and x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        return pooling.max_pool2x2(x, self._gdd_fast)


def _decide_pool(decisions: Decisions, pool: nn.MaxPool2d) -> None:
    pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)
    windows = (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), pair(pool.dilation))
    backend = decisions.backend_of(pooling.OPERATOR)
    if type(pool).forward is not nn.MaxPool2d.forward:
        decisions.leave(pool, "its class has a forward of its own")
    elif windows != ((2, 2), (2, 2), (0, 0), (1, 1)) or pool.ceil_mode or pool.return_indices:
        decisions.leave(pool, "its windows are not 2x2 with stride 2 and no padding")
    elif backend is None:
        decisions.leave(pool, decisions.missing(pooling.OPERATOR))
    else:
        decisions.replace(pool, FastMaxPool, backend, "keeps one byte per output for backward")
