"""What a user would run instead of this library, and our own networks ready to be compared with it.

Settings, not implementations, are what the peers differ in: memory format, compute types, TF32, folded batch norms,
compilation, CUDA graphs. All are built from one seed, so that all compute the same function.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases.layer_calls import NETWORKS
from benchmarks.harness.timing import Call
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.models.backbones import Backbone, build_backbone, fold_batch_norm
from gdd_fast.models.backbones.lite0 import SameConv2d
from gdd_fast.models.backbones.vgg import MaxPool2x2
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.models.random_projection import RandomProjection

SEED = 0
_GRAPH_WARM_UP = 3


def make_generator(name: str, device: torch.device) -> GDDPrecond:
    """A generator of shapes.NETWORKS without dropout, in eval mode; weights are random and none is near zero."""
    resolution, arguments = NETWORKS[name]
    return randomized(partial(GDDPrecond, resolution, 3, **{**arguments, "dropout": 0.0}), device)


def randomized(make: Callable[[], nn.Module], device: torch.device, seed: int = SEED) -> Any:
    """`make()` on `device`, its parameters drawn anew: EDM's start has blocks that do nothing, hiding any error."""
    with torch.device("meta"):
        net = make()
    net = net.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("resample_filter"):
                continue
            noise = torch.randn(tensor.shape, generator=generator, device=device)
            fan = math.prod(tensor.shape[1:])
            value = noise / math.sqrt(fan) if tensor.ndim > 1 else 0.1 * noise
            value = 1 + value if "norm" in name and name.endswith("weight") else value
            tensor.copy_(16 * noise if name.endswith("freqs") else value)
        _restore_filters(net)
    return net.eval()


def _restore_filters(net: nn.Module) -> None:
    from gdd_fast.layers.convolution import Conv2d, resample_kernel

    for layer in net.modules():
        if isinstance(layer, Conv2d) and layer.resample_filter is not None:
            layer.resample_filter.copy_(resample_kernel(layer.taps))


def make_backbone(name: str, resolution: int, device: torch.device, *, folded: bool) -> Backbone:
    """A backbone with random weights that keep the scale of activations, folded or as published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = build_backbone(name, None, resolution)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's own start lets activations fade from layer to layer
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return (fold_batch_norm(net) if folded else net).to(device)


def plain(net: nn.Module) -> Any:
    """`net` with its frozen convolutions and poolings replaced by PyTorch's, in place; weights are kept."""
    for name, module in list(net.named_children()):
        if isinstance(module, MaxPool2x2):
            setattr(net, name, nn.MaxPool2d(2))
        elif isinstance(module, FrozenConv2d):
            setattr(net, name, _plain_convolution(module))
        else:
            plain(module)
    return net


class _Convolution(nn.Conv2d):
    """PyTorch's convolution, followed by an activation of its own where a folded network asks for one."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        y = super().forward(x)
        if activation is None:
            return y
        return F.relu_(y) if activation == "relu" else F.relu6(y, inplace=True)


class _SamePadding(_Convolution):
    """TensorFlow's "SAME" padding, as timm writes it: an odd total is padded by hand."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads), activation)


def _plain_convolution(module: FrozenConv2d) -> nn.Conv2d:
    kind = _SamePadding if isinstance(module, SameConv2d) else _Convolution
    options = {"stride": module.stride, "padding": module.padding, "groups": module.groups}
    sizes = (module.in_channels, module.out_channels, module.kernel_size)
    with torch.device("meta"):
        plain_module = kind(*sizes, **options, bias=module.bias is not None)
    plain_module.weight, plain_module.bias = module.weight, module.bias
    return plain_module


class StockFeatures(nn.Module):
    """`ProjectedFeatures` on plain PyTorch; images are resized and normalised for each backbone anew."""

    def __init__(
        self,
        backbones: Sequence[Backbone],
        projections: Sequence[RandomProjection],
        resolution: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.backbones = nn.ModuleList(plain(b) for b in backbones)
        self.projections = nn.ModuleList(plain(p) for p in projections)
        for index, backbone in enumerate(backbones):
            scale = torch.tensor([0.5 / s for s in backbone.std])[:, None, None]
            shift = torch.tensor([(0.5 - m) / s for m, s in zip(backbone.mean, backbone.std, strict=True)])[
                :, None, None
            ]
            self.register_buffer(f"scale{index}", scale)
            self.register_buffer(f"shift{index}", shift)
        self.requires_grad_(False).to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        maps = []
        for index, (backbone, projection) in enumerate(zip(self.backbones, self.projections, strict=True)):
            x = images.expand(-1, 3, -1, -1).to(self.dtype)
            x = F.interpolate(x, (self.resolution,) * 2, mode="bilinear", align_corners=False)
            x = torch.addcmul(getattr(self, f"shift{index}"), x, getattr(self, f"scale{index}"))
            maps.append(projection(backbone(x)))
        return maps


@contextlib.contextmanager
def tf32(allowed: bool | None, *, trials: bool = False) -> Iterator[None]:
    """float32 products and convolutions in TF32 or not (None: as it is), put back afterwards; nothing on a CPU.

    With `trials` cuDNN chooses its algorithms by trying them, as the public code asks it to, our own runs, and whoever
    wants the best of plain PyTorch. PyTorch keeps the choice by the convolution, its types, sizes and memory formats,
    and does not ask again: whoever calls one first, such as a reference, has chosen for all peers of the process.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    if allowed is not None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        cudnn.allow_tf32 = allowed
    cudnn.benchmark = trials or cudnn.benchmark
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]


def under_tf32(call: Call, allowed: bool | None) -> Call:
    """`call` within `tf32(allowed, trials=True)`, as every peer whose convolutions are timed; ours leave TF32 alone."""

    def run() -> Any:
        with tf32(allowed, trials=True):
            return call()

    return run


def step_if_finite(adam: torch.optim.Adam, gradients: Sequence[Tensor]) -> None:
    """One step of a fused Adam that changes nothing if a gradient is not finite, decided on the device.

    As torch.amp.GradScaler tells the optimizer; the host waits for nothing.
    """
    finite = torch.stack(torch._foreach_norm(gradients, ord=float("inf"))).isfinite().all()
    adam.found_inf = finite.logical_not().float()
    adam.step()


def graphed(call: Call, undo: Callable[[], None] | None = None) -> Call:
    """`call` captured in a CUDA graph; the outputs are the graph's own memory, written anew by every replay.

    By PyTorch's own instructions: warmed up on a side stream first. `undo` takes back what the warm-up changed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_GRAPH_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    if undo is not None:
        undo()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    replay.own_outputs = outputs
    return replay
