"""Frozen networks, such as the feature networks of timm and torchvision: what gradients pass through and do not enter.

    convolution     frozen: keeps nothing for backward, and takes in the batch norm that follows it
    batch norm      in evaluation mode and frozen: done by the convolution before it
    ReLU, ReLU6     keep one bit per element in place of their result
    max pooling     of 2x2 windows keeps one byte per output in place of its input and an int64 index per output

These save memory in backward, and the folded norms time. What a module may save is decided at every call: a network
that is trained or unfrozen after all runs PyTorch's own layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.acceleration.batch_norm import (
    FastBatchNorm,
    FastBatchNormAct,
    FastParent,
    Fold,
    Gate,
    Untraceable,
    frozen,
    sequence,
)
from gdd_fast.acceleration.class_exchange import Fast, library_class, obstacle
from gdd_fast.acceleration.replacements import Decisions
from gdd_fast.backend import Backend
from gdd_fast.ops import max_pool2x2 as pooling
from gdd_fast.ops import relu_bits as bits
from gdd_fast.ops._memory_format import autocast_dtype, memory_format
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d
from gdd_fast.ops.relu_bits import Activation, dense, relu_bits

TRAINED = "its parameters are trained (requires_grad), so PyTorch has to keep its input"


def decide(decisions: Decisions) -> None:
    """Decide about every convolution, batch norm, ReLU and pooling of the network."""
    folds = _decide_batch_norms(decisions)
    for module in decisions.names:
        if not decisions.undecided(module):
            continue
        if isinstance(module, nn.Conv2d):
            _decide_conv(decisions, module, folds.get(module))
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            _decide_relu(decisions, module)
        elif isinstance(module, nn.MaxPool2d):
            _decide_pool(decisions, module)


# --- convolutions


@dataclass
class ConvState:
    """What a frozen convolution has besides its parameters."""

    padding: tuple[int, int]
    fold: Fold | None


class FastConv(Fast):
    """nn.Conv2d that keeps no input for backward while it is frozen, and does a batch norm's work if it may."""

    _gdd_fast: ConvState

    def fast_forward(self, x: Tensor) -> Tensor:
        state = self._gdd_fast
        fold = state.fold if state.fold is not None and state.fold.active(x) else None
        if fold is None and not _saves(x, self):
            return super().forward(x)
        x = self._padded(x)
        dtype, layout = autocast_dtype(x), memory_format(x)
        if fold is not None:
            weight, bias = fold.weight_and_bias(dtype, layout)
        else:
            weight, bias = converted(self.weight, dtype, layout), None if self.bias is None else self.bias.to(dtype)
        y = frozen_conv2d(x, weight, bias, self.stride, state.padding, self.dilation, self.groups)
        if fold is not None:
            fold.finish()
        return y

    def _padded(self, x: Tensor) -> Tensor:
        return x


class FastConvSame(FastConv):
    """timm's convolution with TensorFlow's "SAME" padding: an odd total leaves one row more after than before."""

    def _padded(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (self._same(x.shape[2 + i], i) for i in range(2))
        return F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x

    def _same(self, size: int, i: int) -> tuple[int, int]:
        stride, reach = self.stride[i], (self.kernel_size[i] - 1) * self.dilation[i]
        total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
        return total // 2, total - total // 2


def _saves(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether PyTorch's convolution would keep x for the gradient of a weight that has none."""
    fits = x.dim() == 4 and (x.dtype == conv.weight.dtype or autocast_dtype(x) != x.dtype)
    return fits and x.requires_grad and torch.is_grad_enabled() and not conv.weight.requires_grad


def _decide_conv(decisions: Decisions, conv: nn.Conv2d, fold: Fold | None) -> None:
    mixin, reason = _conv_mixin(conv)
    if reason is not None:
        decisions.leave(conv, reason)
        return
    note = "frozen: keeps no input for backward"
    if fold is not None:
        note += "; in eval mode does the work of the batch norm after it on maps larger than its weight"
    decisions.replace(conv, mixin, ConvState(_padding(conv), fold), note)


def _conv_mixin(conv: nn.Conv2d) -> tuple[type[FastConv], str | None]:
    """The mixin for a convolution, and why it has to be left, or None."""
    kind = type(conv)
    same = library_class("timm.layers.conv2d_same", "Conv2dSame")
    mixin = FastConvSame if same is not None and kind.forward is same.forward else FastConv
    if mixin is FastConv and not (kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward):
        return mixin, "its class has a forward of its own"
    if conv.weight.requires_grad:
        return mixin, TRAINED
    if conv.padding_mode != "zeros" or _padding(conv) is None:
        return mixin, f"pads unlike a frozen convolution here can ({conv.padding_mode}, {conv.padding})"
    return mixin, obstacle(conv)


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)
    return conv.padding


# --- batch norms


def _decide_batch_norms(decisions: Decisions) -> dict[nn.Module, Fold]:
    """The folds by convolution; every batch norm is decided about."""
    norms: dict[nn.Module, type[Fast]] = {}
    for module in decisions.names:
        if isinstance(module, nn.BatchNorm2d):
            mixin = _norm_mixin(module)
            if mixin is None:
                decisions.leave(module, "its class has a forward of its own")
            elif not frozen(module):
                decisions.leave(module, "its parameters are trained (requires_grad)")
            elif module.running_mean is None:
                decisions.leave(module, "it has no running statistics: it normalises by those of the batch")
            else:
                norms[module] = mixin

    folds: dict[nn.Module, Fold] = {}
    why: dict[nn.Module, str] = {}
    for parent in decisions.names:
        inside = [child for child in parent.children() if child in norms]
        if not inside:
            continue
        reason = obstacle(parent) if decisions.undecided(parent) else "its holder is decided about otherwise"
        try:
            arity, pairs = (0, []) if reason is not None else sequence(parent)
        except Untraceable as error:
            reason, pairs = str(error), []
        gate = None
        before = {then: first for first, then in pairs}
        for norm in inside:
            conv = before.get(norm)
            why[norm] = reason or _unfoldable(conv, norm) or ""
            if not why[norm] and decisions.undecided(norm) and conv not in folds:
                gate = gate or Gate(arity)
                fold = folds[conv] = Fold(conv, norm, gate)
                decisions.replace(norm, norms[norm], fold, "in eval mode done by the convolution before it")
        if gate is not None:
            decisions.replace(
                parent, FastParent, gate, "holds convolutions and batch norms that are folded while it runs"
            )
    for norm in norms:
        if decisions.undecided(norm):
            decisions.leave(norm, why.get(norm) or "it is held by a module that does not call it")
    return folds


def _norm_mixin(norm: nn.BatchNorm2d) -> type[Fast] | None:
    with_activation = library_class("timm.layers.norm_act", "BatchNormAct2d")
    if type(norm).forward is nn.BatchNorm2d.forward:
        return FastBatchNorm
    if with_activation is not None and type(norm).forward is with_activation.forward:
        return FastBatchNormAct
    return None


def _unfoldable(conv: nn.Module | None, norm: nn.BatchNorm2d) -> str | None:
    if not isinstance(conv, nn.Conv2d) or conv.out_channels != norm.num_features:
        return "no convolution comes right before it whose result goes nowhere else"
    reason = _conv_mixin(conv)[1] or obstacle(norm)
    return None if reason is None else f"the convolution before it is left: {reason}"


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
