"""What a user would run instead of this library, and our own networks ready to be compared with it.

Settings, not implementations, are what the peers differ in: memory format, compute types, TF32, folded batch norms,
compilation, CUDA graphs. All are built from one seed, so that all compute the same function.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases.layer_calls import NETWORKS
from benchmarks.harness.timing import Call
from benchmarks.peers.stock_unet import StockGenerator, Style
from gdd_fast.bundled import BUNDLED_TEACHER
from gdd_fast.layers.convolution import Conv2d, resample_kernel
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.models.backbones import Backbone, build_backbone, fold_batch_norm
from gdd_fast.models.backbones.lite0 import SameConv2d
from gdd_fast.models.backbones.vgg import MaxPool2x2
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.sampling.sampler import one_step

SEED = 0
_GRAPH_WARM_UP = 3


def make_generator(name: str, device: torch.device) -> GDDPrecond:
    """A generator of layer_calls.NETWORKS, or of the demo's architecture, without dropout and in eval mode.

    Weights are random and none is near zero: see `randomized`.
    """
    if name == "demo":
        init = json.loads((BUNDLED_TEACHER / "config.json").read_text())["init"]  # weights would need safetensors
        del init["sigma_eps"]
        init |= {"dtype": "float32", "augment_dim": 0, "label_dropout": 0.0}
    else:
        resolution, arguments = NETWORKS[name]
        init = {"img_resolution": resolution, "img_channels": 3, **arguments}
    return randomized(lambda: GDDPrecond(**{**init, "dropout": 0.0}), device)


def randomized(make: Callable[[], nn.Module], device: torch.device) -> Any:
    """`make()` on `device`, its parameters drawn anew: EDM's start has blocks that do nothing, hiding any error."""
    with torch.device("meta"):
        net = make()
    net = net.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, device=device)
            fan = math.prod(tensor.shape[1:])
            value = noise / math.sqrt(fan) if tensor.ndim > 1 else 0.1 * noise
            value = 1 + value if "norm" in name and name.endswith("weight") else value
            tensor.copy_(16 * noise if name.endswith("freqs") else value)
        for layer in net.modules():
            if isinstance(layer, Conv2d) and layer.resample_filter is not None:
                layer.resample_filter.copy_(resample_kernel(layer.taps))
    return net.eval()


def one_of_each_class(count: int, classes: int, device: torch.device) -> Tensor | None:
    """One-hot labels (count, classes), or None for a network without classes."""
    return torch.eye(classes, device=device)[torch.arange(count, device=device) % classes] if classes else None


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
            setattr(net, name, _Convolution(module))
        else:
            plain(module)
    return net


class _Convolution(nn.Conv2d):
    """PyTorch's convolution with the weights of a frozen one, and the activation that a folded network asks for.

    In place of SameConv2d stands TensorFlow's "SAME" padding, as timm writes it: an odd total is padded by hand.
    """

    def __init__(self, module: FrozenConv2d) -> None:
        options = {"stride": module.stride, "padding": module.padding, "groups": module.groups, "device": "meta"}
        super().__init__(module.in_channels, module.out_channels, module.kernel_size, **options)
        self.weight, self.bias, self.same = module.weight, module.bias, isinstance(module, SameConv2d)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        if self.same:
            pads = []
            for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
                total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                pads += [total // 2, total - total // 2]
            x = F.pad(x, pads)
        y = super().forward(x)
        if activation is None:
            return y
        return F.relu_(y) if activation == "relu" else F.relu6(y, inplace=True)


class StockFeatures(nn.Module):
    """`ProjectedFeatures` on plain PyTorch; images are resized and normalised for each backbone anew."""

    def __init__(
        self, backbones: Sequence[Backbone], projections: Sequence[nn.Module], resolution: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.resolution, self.dtype = resolution, dtype
        self.backbones = nn.ModuleList(plain(b) for b in backbones)
        self.projections = nn.ModuleList(plain(p) for p in projections)
        for index, backbone in enumerate(backbones):
            mean, std = (torch.tensor(row)[:, None, None] for row in (backbone.mean, backbone.std))
            self.register_buffer(f"scale{index}", 0.5 / std)
            self.register_buffer(f"shift{index}", (0.5 - mean) / std)
        self.requires_grad_(False).to(dtype)

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


def sampling(network: Callable[..., Tensor], z: Tensor, labels: Tensor | None = None, *, tf32: bool | None) -> Call:
    """One step of `network` from latents z, `under_tf32`."""

    def call() -> Tensor:
        with torch.no_grad():
            return one_step(network, z, labels)

    return under_tf32(call, tf32)


def stock_generator(
    net: GDDPrecond,
    style: Style,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
    *,
    cast: bool = True,
) -> StockGenerator:
    """A copy of `net` on plain PyTorch; with `cast` convolutions hold their weights in `dtype`, as one does for
    sampling."""
    model = StockGenerator(copy.deepcopy(net), style, dtype).to(memory_format=layout)
    for module in model.modules() if cast else ():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 4:
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return model


def our_generator(net: GDDPrecond, dtype: torch.dtype) -> GDDPrecond:
    """A copy of `net` that computes in `dtype`, in channels_last memory."""
    model = copy.deepcopy(net).to(memory_format=torch.channels_last)
    model.dtype = dtype
    return model


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
