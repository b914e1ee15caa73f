"""Decides which weights GDD-I trains; nothing else does.

GDD-I (Zheng & Yang, arXiv 2405.20750) finds that a diffusion network's convolutions already hold a one-step generator,
and freezes those of the U-Net's blocks. Norms, embeddings' affine layers, skip and qkv convolutions, the mapping
network and the outermost convolutions stay trainable; two further levels freeze qkv and skip too.

In a diffusers U-Net the same layers have other names and places: a block's convolutions are conv1 and conv2, those that
resample are separate modules between blocks, and attention's four projections are linear layers.
"""

import dataclasses

from torch import nn

from gdd_fast.acceleration.class_exchange import library_class
from gdd_fast.errors import ConfigError
from gdd_fast.models.unet_block import UNetBlock

# What each level adds to the ones before it, as layers of a UNetBlock. Level 0 is GDD, level 1 GDD-I.
LEVELS: tuple[tuple[str, ...], ...] = ((), ("conv0", "conv1", "proj", "resample"), ("qkv",), ("skip",))

# The diffusers modules that U-Nets consist of, and which layer of a UNetBlock each of their children is.
_DIFFUSERS: dict[tuple[str, str], dict[str, str]] = {
    ("diffusers.models.resnet", "ResnetBlock2D"): {
        "conv1": "conv0",
        "conv2": "conv1",
        "conv_shortcut": "skip",
        "time_emb_proj": "affine",
        "norm1": "norm",
        "norm2": "norm",
    },
    ("diffusers.models.resnet", "ResnetBlockCondNorm2D"): {
        "conv1": "conv0",
        "conv2": "conv1",
        "conv_shortcut": "skip",
        "norm1": "norm",
        "norm2": "norm",
    },
    ("diffusers.models.attention_processor", "Attention"): {
        "to_q": "qkv",
        "to_k": "qkv",
        "to_v": "qkv",
        "to_out": "proj",
        "group_norm": "norm",
    },
    ("diffusers.models.downsampling", "Downsample2D"): {"conv": "resample"},
    ("diffusers.models.downsampling", "FirDownsample2D"): {"Conv2d_0": "resample"},
    ("diffusers.models.upsampling", "Upsample2D"): {"conv": "resample", "Conv2d_0": "resample"},
    ("diffusers.models.upsampling", "FirUpsample2D"): {"Conv2d_0": "resample"},
}


@dataclasses.dataclass(frozen=True)
class KindCount:
    """Parameters (scalars) of one kind of layer, and how many of them are frozen."""

    kind: str
    total: int
    frozen: int


@dataclasses.dataclass(frozen=True)
class FreezeReport:
    """What `freeze` did, in numbers of parameters (scalars)."""

    level: int
    kinds: tuple[KindCount, ...]

    @property
    def total(self) -> int:
        return sum(kind.total for kind in self.kinds)

    @property
    def frozen(self) -> int:
        return sum(kind.frozen for kind in self.kinds)

    def __str__(self) -> str:
        """A table with one line per kind of layer, largest first, and the sum."""
        rows = [*sorted(self.kinds, key=lambda kind: -kind.total), KindCount("all", self.total, self.frozen)]
        lines = [f"{'layers':<16}{'parameters':>14}{'frozen':>14}{'%':>8}"]
        lines += [f"{r.kind:<16}{r.total:>14,}{r.frozen:>14,}{100 * r.frozen / r.total:>8.2f}" for r in rows]
        return "\n".join(lines)


def freeze(net: nn.Module, level: int) -> FreezeReport:
    """Set `requires_grad` of all parameters of `net`, a U-Net of EDM or diffusers, preconditioned or bare; report it.

    Level 0 trains everything (GDD), 1 freezes the blocks' convolutions, those that resample and attention's projection
    (GDD-I), 2 also the qkv and 3 also the skip convolutions. Parameters that an earlier call froze and this level does
    not become trainable again.

    Raises ConfigError for another level, or a network without U-Net blocks.
    """
    if level not in range(len(LEVELS)):
        raise ConfigError(f"the freeze level must be 0 to {len(LEVELS) - 1}, got {level!r}.")
    kinds = _kinds(net)
    if "conv0" not in kinds.values():
        raise ConfigError(f"{type(net).__name__} has no U-Net blocks, so a freeze level names nothing in it.")
    names = {name for added in LEVELS[: level + 1] for name in added}
    totals: dict[str, int] = {}
    for parameter in net.parameters():
        kind = kinds[parameter]
        parameter.requires_grad_(kind not in names)
        totals[kind] = totals.get(kind, 0) + parameter.numel()
    counts = tuple(KindCount(kind, total, total if kind in names else 0) for kind, total in totals.items())
    return FreezeReport(level, counts)


def _kinds(net: nn.Module) -> dict[nn.Parameter, str]:
    """The kind of layer each parameter belongs to: the name of a UNetBlock's child, or a kind outside the blocks."""
    kinds = {parameter: _outer_kind(name) for name, parameter in net.named_parameters()}
    for block in net.modules():
        if isinstance(block, UNetBlock):
            for child, layer in block.named_children():
                kind = "norm" if child.startswith("norm") else child
                kinds.update(dict.fromkeys(layer.parameters(), kind))
    known = {cls: children for place, children in _DIFFUSERS.items() if (cls := library_class(*place)) is not None}
    for module in net.modules():
        for cls, children in known.items():
            if isinstance(module, cls):
                for child, kind in children.items():
                    named: nn.Module | None = getattr(module, child, None)
                    if named is not None:
                        kinds.update(dict.fromkeys(named.parameters(), kind))
    return kinds


def _outer_kind(name: str) -> str:
    """For the report alone: nothing outside the blocks is ever frozen."""
    if "map_" in name or "time_" in name or "class_embedding" in name:
        return "mapping"
    return "outer norm" if "norm" in name else "outer conv"
