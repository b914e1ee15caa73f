"""How much memory a folded network gives to Winograd's method, and to which layers.

A transformed weight takes four times the memory of the float32 weight. The time it saves per call grows with the pixels
of the layer's maps, so layers with the largest maps come first.
"""

import torch
from torch import Tensor, nn

from gdd_fast.engine.folded_layers import Convolution, PackedWeight

DEFAULT_MEMORY = 2.5
"""docs/cpu_operators.md has the time and memory of other values."""


def transformed_bytes(layer: Convolution) -> int:
    """Bytes of the layer's transformed weight: 36 float32 values for every nine of the weight (out, in, 3, 3)."""
    return layer.weight.numel() * 4 * 4


@torch.no_grad()
def limit_winograd(folded: nn.Module, img_channels: int, img_resolution: int, times: float) -> None:
    """Keep `winograd_conv2d` for layers whose transformed weights together take at most `times` the memory of all
    convolution weights in float32; the other layers use the library's convolution.

    The choice depends on the network alone. If not all fit, one image is computed to find the sizes of their maps.
    `folded` is a `FoldedUNet` or `FoldedUNet2D` on a CPU.
    """
    layers = [m for m in folded.modules() if isinstance(m, Convolution) and m.winograd is not None]
    left = int(min(times, 4) * 4 * sum(m.weight.numel() for m in folded.modules() if isinstance(m, Convolution)))
    if sum(map(transformed_bytes, layers)) <= left:
        return
    methods = [layer.winograd for layer in layers]
    for layer in layers:
        layer.winograd = None
    if not left:
        return
    pixels = _pixels(folded, layers, (1, img_channels, img_resolution, img_resolution))
    for i in sorted(range(len(layers)), key=lambda i: -pixels[i]):
        size = transformed_bytes(layers[i])
        if size <= left:
            left -= size
            layers[i].winograd = methods[i]
            if layers[i].packed is not None:
                layers[i].packed = PackedWeight()  # without the weight packed while finding the sizes


def _pixels(folded: nn.Module, layers: list[Convolution], shape: tuple[int, ...]) -> list[int]:
    """The pixels of each layer's input for one image; 0 for a layer that is not called."""
    found = dict.fromkeys(layers, 0)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[layer] = inputs[0].shape[2] * inputs[0].shape[3]  # type: ignore[index]

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        width = sum(folded.row_sizes)  # type: ignore[arg-type]
        folded(torch.zeros(shape), torch.zeros(1, width) if width else None)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())
