"""Which weights of a U-Net are trained and which frozen: the record that a run keeps, and its picture as SVG."""

from collections.abc import Iterator
from html import escape
from typing import Any

from torch import nn

from gdd_fast.models.unet_block import UNetBlock

FORMAT = "gdd_fast.unet"
SLOTS = ("norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj")
CELL, ROW, INDENT, NAME, MIDDLE = 33, 22, 14, 84, 70
SIDE = NAME + CELL * len(SLOTS)


def record(net: nn.Module) -> dict[str, Any]:
    """What `picture` draws of a preconditioned network of EDM's: JSON types, with numbers of parameters (scalars).

    A layer is frozen if its parameters do not require gradients.
    """
    model = net.model
    parts = {
        part: [_layer(name, layer) for name, layer in getattr(model, part, nn.ModuleDict()).items()]
        for part in ("enc", "dec")
    }
    # outside encoder and decoder: the mapping network and, in ADM, the last norm and convolution
    beside = [_layer(name, layer) for name, layer in model.named_children() if name not in parts]
    beside = [layer for layer in beside if layer["total"]]
    everything = [*parts["enc"], *parts["dec"], *beside]
    totals = {key: sum(layer[key] for layer in everything) for key in ("total", "trained")}
    return {"format": FORMAT, "network": type(model).__name__, **totals, **parts, "beside": beside}


def _layer(name: str, layer: nn.Module) -> dict[str, Any]:
    found = {"name": name, **_counts(layer)}
    if isinstance(layer, UNetBlock):
        found["channels"] = [layer.in_channels, layer.out_channels]
        found["cells"] = {slot: _counts(child) for slot, child in layer.named_children() if slot in SLOTS}
    return found


def _counts(layer: nn.Module) -> dict[str, int]:
    parameters = list(layer.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {"total": sum(p.numel() for p in parameters), "trained": trained}


def picture(unet: dict[str, Any]) -> str:
    """The U of a `record` as one SVG element: encoder down on the left, decoder up on the right."""
    levels: dict[str, tuple[list, list]] = {}
    for side, part in enumerate(("enc", "dec")):
        for layer in unet[part]:
            levels.setdefault(layer["name"].partition("_")[0], ([], []))[side].append(layer)
    depth = len(levels)
    width = 2 * SIDE + MIDDLE + 2 * INDENT * (depth - 1)
    svg, y = list(_header(width)), 26.0
    for k, (size, (encoder, decoder)) in enumerate(levels.items()):
        height = ROW * max(len(encoder), len(decoder)) + 8
        left, right = INDENT * k, width - SIDE - INDENT * k
        svg.append(
            f'<rect class="level" x="{left - 4}" y="{y:g}" width="{width - 2 * left + 8}" height="{height}" rx="8"/>'
        )
        middle, end = y + height / 2 + 12, right + NAME - 62
        svg.append(f'<path class="bridge" d="M{left + SIDE} {middle:g}H{end:g}m-5 -4l5 4l-5 4"/>')
        svg.append(
            f'<text class="size" x="{width / 2:g}" y="{middle - 8:g}" text-anchor="middle">{escape(size)}</text>'
        )
        for i, layer in enumerate(encoder):
            svg += _row(layer, left, y + 4 + ROW * i)
        for i, layer in enumerate(reversed(decoder)):  # the decoder's first layer is at the bottom
            svg += _row(layer, right, y + 4 + ROW * i)
        y += height + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="unet" viewBox="-6 0 {width + 12:g} {y:g}" '
        f'width="{width + 12:g}" role="img" aria-label="Trained and frozen layers of the U-Net">{"".join(svg)}</svg>'
    )


def _header(width: float) -> Iterator[str]:
    for start, title in ((0, "encoder ↓"), (width - SIDE, "decoder ↑")):
        yield f'<text class="quiet" x="{start:g}" y="16">{title}</text>'
        for i, slot in enumerate(SLOTS):
            x = start + NAME + CELL * (i + 0.5)
            yield f'<text class="slot" x="{x:g}" y="16" text-anchor="middle">{slot}</text>'


def _row(layer: dict[str, Any], x: float, y: float) -> Iterator[str]:
    name = layer["name"].partition("_")[2] or layer["name"]
    about = "{0[0]} → {0[1]} channels, ".format(layer["channels"]) if "channels" in layer else ""
    title = f"<title>{escape(layer['name'])}: {about}{layer['total']:,} parameters</title>"
    yield f'<text x="{x + NAME - 6:g}" y="{y + 14:g}" text-anchor="end">{escape(name)}{title}</text>'
    # a layer that is not a block, but a convolution or norm, is one bar
    cells = layer.get("cells") or {layer["name"]: layer}
    for slot, counts in cells.items():
        place, size = (SLOTS.index(slot), 1) if slot in SLOTS else (0, len(SLOTS))
        if counts["total"]:
            yield (
                f'<rect class="{_state(counts)}" x="{x + NAME + CELL * place + 1:g}" y="{y + 2:g}" '
                f'width="{CELL * size - 2}" height="{ROW - 5}" rx="3"><title>{escape(layer["name"])}.{escape(slot)}: '
                f"{counts['total']:,} parameters, {_state(counts)}</title></rect>"
            )


def _state(counts: dict[str, int]) -> str:
    if not counts["trained"]:
        return "frozen"
    return "trained" if counts["trained"] == counts["total"] else "mixed"
