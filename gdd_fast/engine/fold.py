"""Folding: a preconditioned U-Net at one noise level, with everything constant precomputed.

With x = sigma z, z standard normal, D(x; sigma) = c_skip sigma z + c_out F(c_in sigma z, c_noise, labels), and in F:

- The embedding is constant, or depends on the label alone. So do the outputs of the blocks' affine layers: they become
constants, or a table with one row per class. A constant offset (NCSN++, DDPM++) joins the bias of the convolution
before it, a constant scale and shift (ADM) the norm: (n w + b)(1 + s) + t = n w (1 + s) + b (1 + s) + t.
- c_in sigma scales the convolutions that read the image, c_out those that write it; both are linear and pad with 0.
- A block ends in (conv1(h) + skip) k, k = sqrt(1/2) or 1. k is folded into conv1 and into a projection on the skip
path; without projection, `h + k x` is one operator. A projection may come before upsampling instead of after it.
- Biases added to the same map are summed into one. Queries, keys and values are reordered into three blocks.

All of it is exact up to rounding; weights are folded in float64 and cast once.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gdd_fast.backend import Backend, Operator, resolve
from gdd_fast.device import fast_layout
from gdd_fast.engine.fold_unet2d import fold_unet2d
from gdd_fast.engine.folded_layers import (
    Convolution,
    ConvolutionDown,
    FusedProjection,
    FusedResidual,
    Identity,
    Norm,
    Projection,
    Resampled,
    Resampling,
    Target,
)
from gdd_fast.engine.folded_unet import Attention, Block, FoldedUNet
from gdd_fast.engine.folding import Conditioning, Folding, f64
from gdd_fast.errors import BackendError, ConfigError
from gdd_fast.layers.convolution import Conv2d
from gdd_fast.models.edm import layer_role
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.models.teachers.unet2d import UNet2DPrecond
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ops import attention, group_norm_silu, resample2d, residual, small_maps, winograd_conv2d
from gdd_fast.ops.attention import check_triton

SIGMA = 80.0


class _Embedding:
    """Labels -> rows of every block, by a copy of the parts of `net` needed, on the CPU and where labels last were.

    The noise level's sinusoids are the network's own, in float32. The rest is computed in float64, whose precision no
    setting such as TF32 reduces, from weights kept as they are.
    """

    def __init__(self, net: EDMPrecond, blocks: Sequence[UNetBlock], sigma: float) -> None:
        model = net.model
        # everything but the convolutions
        left_out = {id(layer): nn.Identity() for name, layer in model.named_children() if not name.startswith("map_")}
        self.model: Any = copy.deepcopy(model, left_out).cpu().float().eval()
        with torch.no_grad():
            waves = self.model.map_noise(torch.tensor([sigma], dtype=torch.float32).log() / 4)
        self.model.map_noise = _Constant(waves.double())
        affines = [(block.affine.weight, block.affine.bias, block.conv0.bias) for block in blocks]
        self.affines = [[t.detach().to("cpu", copy=True) for t in affine] for affine in affines]  # type: ignore[union-attr]
        self.adaptive = [block.adaptive_scale for block in blocks]
        self.sizes = [block.out_channels for block in blocks for _ in range(2 if block.adaptive_scale else 1)]
        self._twin = self

    def __call__(self, labels: Tensor) -> Tensor:
        """float32 (N, sum of sizes), on the labels' device."""
        if self._twin.model.map_noise.value.device != labels.device:
            self._twin = self._to(labels.device)
        return torch.cat(self._twin.rows(labels), 1)

    def _to(self, device: torch.device) -> "_Embedding":
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).to(device)
        twin.affines = [[t.to(device) for t in affine] for affine in self.affines]
        return twin

    @torch.no_grad()
    def rows(self, labels: Tensor | None) -> list[Tensor]:
        """float32 (N, C) for each of `sizes`: norm1's scale and shift, or the offset before it with conv0's bias."""
        noise = self.model.map_noise.value
        emb = self.model.embed(noise, labels, None, batch=1 if labels is None else len(labels))
        rows = []
        for affine, adaptive in zip(self.affines, self.adaptive, strict=True):
            weight, bias, offset = (t.double() for t in affine)
            row = torch.addmm(bias, emb, weight.t())
            rows += [part.float() for part in (row.chunk(2, 1) if adaptive else (row + offset,))]
        return rows


class _Constant(nn.Module):
    """Returns `value` for any input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Buffer(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def fold(net: Preconditioned, target: Target, sigma: float = SIGMA) -> tuple[nn.Module, nn.Module | None]:
    """The network D(sigma z; sigma) as a module of z and of the rows that the `Conditioning` returned with it gives.

    Args:
        net: EDMPrecond, GDDPrecond or UNet2DPrecond, on any device; not changed. Dropout and the augmentation layer are
        left out: no generated image is augmented.
        target: where and how the result runs; `make_target` makes it.
        sigma: the noise level, > 0.

    Raises ConfigError if sigma is not positive and finite, BackendError if the target's attention does not support the
    network's head width or the dtype.
    """
    if not sigma > 0 or math.isinf(sigma):
        raise ConfigError(f"sigma must be a positive number, not {sigma}")
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(net, UNet2DPrecond):
            return fold_unet2d(net, target, sigma)
        return _Folder(net, sigma, target).fold()  # type: ignore[arg-type]


def make_target(
    device: torch.device, dtype: torch.dtype, backend: Backend = "auto", *, traced: bool = False, tf32: bool = False
) -> Target:
    """How a folded network runs on `device` in `dtype`.

    Args:
        backend: of the fused operators; those that lack it run their definition.
        traced: for torch.compile: nothing is written in place, and "auto" means "torch", which the compiler fuses.
        tf32: whether a GPU's float32 convolutions will run in TF32, which decides the memory format.

    Raises BackendError if `backend` is unknown or cannot run on `device`.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")

    def choose(operator: Operator) -> Backend:
        wanted = backend if backend == "auto" or backend in operator.fused else "torch"
        return resolve("torch" if traced and wanted == "auto" else wanted, operator, device.type)

    layout = fast_layout(device, "bf16" if dtype != torch.float32 else "tf32" if tf32 else "fp32")
    channels_last_cpu = device.type == "cpu" and layout is torch.channels_last
    packed = channels_last_cpu and dtype in _packable()
    # AMX multiplies bfloat16 sixteen times as fast as AVX-512 does float32: Winograd's method saves a factor of four
    slower = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    ours = channels_last_cpu and not slower and dtype in small_maps.DTYPES and small_maps.runs_here()
    winograd = ours and choose(winograd_conv2d.OPERATOR) == "cpp"
    small = ours and choose(small_maps.OPERATOR) == "cpp"
    norm, add, attend = (choose(module.OPERATOR) for module in (group_norm_silu, residual, attention))
    return Target(
        device=device,
        dtype=dtype,
        layout=layout,
        convolve="traced" if traced else "packed" if packed else "plain",
        norm=norm,
        residual=add,
        resample=choose(resample2d.OPERATOR),
        attention="auto" if backend == "auto" and not traced else attend,  # its "auto" depends on shapes too
        statistics=norm == add == "triton",
        winograd=winograd,
        small=small,
        late_bias=device.type == "cuda",
    )


def chosen(target: Target) -> dict[Operator, Backend]:
    """The backend of each operator in a network folded for `target`, for another process to check with `resolve`."""
    found = {
        group_norm_silu.OPERATOR: target.norm,
        residual.OPERATOR: target.residual,
        resample2d.OPERATOR: target.resample,
        attention.OPERATOR: target.attention,
    }
    of_cpu = {winograd_conv2d.OPERATOR: target.winograd, small_maps.OPERATOR: target.small}
    return found | {operator: "cpp" for operator, runs in of_cpu.items() if runs}


def _packable() -> tuple[torch.dtype, ...]:
    """The dtypes in which oneDNN convolves on this processor; empty in a PyTorch without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return ()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


class _Folder(Folding):
    """Folds one network; each method makes the layer that replaces one or several of its layers."""

    def __init__(self, net: EDMPrecond, sigma: float, target: Target) -> None:
        super().__init__(target)
        variance = net.sigma_data**2
        offset = sigma - net.sigma_eps
        self.image_scale = sigma / math.sqrt(sigma**2 + variance)
        self.c_out = offset * net.sigma_data / math.sqrt(sigma**2 + variance)
        self.latent_scale = sigma * variance / (offset**2 + variance)
        self.net = net
        self.sigma = sigma

    def fold(self) -> tuple[FoldedUNet, Conditioning | None]:
        model: Any = self.net.model
        layers = [*model.enc.values(), *model.dec.values()]
        blocks = [layer for layer in layers if isinstance(layer, UNetBlock)]
        embedding = _Embedding(self.net, blocks, self.sigma)
        self.conditioning: Conditioning | None = None
        if self.net.label_dim:
            self.conditioning = Conditioning(embedding, self.net.label_dim, self.target.device, anywhere=True)
            sizes = embedding.sizes
        else:
            self.constants = iter(embedding.rows(None))
            sizes = []

        # The residual encoder reads the image once, then its own maps; the skip encoder reads it at each resolution.
        encoder: list[tuple[str, nn.Module]] = []
        folded: nn.Module
        channels, first = self.net.img_channels, True
        layer: Any
        for name, layer in model.enc.items():
            role = layer_role(name)
            match role:
                case "conv":
                    folded = self.convolution(layer, reads_image=True)
                case "aux_down":
                    folded = self.resampling(layer)
                case "aux_skip":
                    folded = self.convolution(layer, reads_image=True)
                case "aux_residual":
                    conv = self.convolution(layer, reads_image=first)
                    folded, first = ConvolutionDown(conv, self.resampling(layer)), False
                case _:
                    role, folded = "block", self.block(layer, channels)
            channels = channels if role.startswith("aux") else layer.out_channels
            encoder.append((role, folded))

        decoder: list[tuple[str, nn.Module]] = []
        for name, layer in model.dec.items():
            role = layer_role(name)
            match role:
                case "aux_up":
                    folded = self.resampling(layer)
                case "aux_norm":
                    folded = self.norm(layer)
                case "aux_conv":
                    folded = self.convolution(layer, writes_image=True)
                case _:
                    role, folded, channels = "block", self.block(layer, channels), layer.out_channels
            decoder.append((role, folded))
        if hasattr(model, "out_conv"):
            decoder += [
                ("aux_norm", self.norm(model.out_norm)),
                ("aux_conv", self.convolution(model.out_conv, writes_image=True)),
            ]

        unet = FoldedUNet(
            encoder,
            decoder,
            row_sizes=sizes,
            aux_scale=math.sqrt(0.5),
            latent_scale=self.latent_scale,
            target=self.target,
        )
        return unet.eval().requires_grad_(False), self.conditioning

    def convolution(
        self,
        conv: Conv2d,
        *,
        reads_image: bool = False,
        writes_image: bool = False,
    ) -> Convolution:
        """A convolution with its bias, without its resampling."""
        out = self.c_out if writes_image else 1.0
        weight = f64(conv.weight) * (self.image_scale if reads_image else out)
        padding = conv.padding + (conv.border if conv.conv_first else 0)
        return Convolution(weight, f64(conv.bias) * out, padding, self.target)

    def resampling(self, conv: Conv2d) -> Resampling:
        """The resampling of a convolution, without what it convolves."""
        padding = 0 if conv.conv_first else conv.border  # conv_first pads before it convolves
        return Resampling(conv.resample_filter, up=conv.up, padding=padding, box=conv.box, target=self.target)

    def block(self, block: UNetBlock, stream: int) -> Block:
        """`stream`: channels of the incoming map; if the block takes more, the rest are a skip from the encoder."""
        paired = block.in_channels != stream
        # Attention that accumulates in place needs k times the block's map to add to; its norm undoes the factor.
        accumulates = bool(block.num_heads) and self.target.convolve == "packed"
        gain = block.skip_scale if accumulates else 1.0
        conv1, skip = self.end(block, block.skip_scale * gain, stream, paired)
        conv0, norm1, condition = self.condition(block)
        sampled = block.conv0.up or block.conv0.down
        return Block(
            norm0=self.norm(block.norm0),
            resample=self.resampling(block.conv0) if sampled else None,
            conv0=conv0,
            norm1=norm1,
            conv1=conv1,
            skip=skip,
            attention=self.attention(block, gain, accumulates) if block.num_heads else None,
            condition=condition,
            paired=paired,
        )

    def condition(self, block: UNetBlock) -> tuple[Convolution, Norm, Literal["add", "scale_shift"] | None]:
        """conv0, norm1, and how a label's rows act between them (see `Block`)."""
        adaptive, conv0 = block.adaptive_scale, block.conv0
        offset: Tensor | None = f64(conv0.bias)
        condition: Literal["add", "scale_shift"] | None = None
        rows: list[Tensor] = []
        if self.conditioning is not None:
            condition = "scale_shift" if adaptive else "add"
            offset = offset if adaptive else None  # the rows contain it
        elif adaptive:
            rows = [next(self.constants)[0].double() for _ in range(2)]
        else:
            offset = next(self.constants)[0].double()
        return *self.before_norm(f64(conv0.weight), conv0.padding, offset, block.norm1, rows), condition

    def end(
        self, block: UNetBlock, scale: float, stream: int, paired: bool
    ) -> tuple[Convolution, Identity | FusedResidual | Projection | FusedProjection | Resampled]:
        """conv1, and the end of the block: (conv1(h) + skip) * scale."""
        conv1, skip = block.conv1, block.skip
        if skip is None:  # never for a pair, which has more channels than a block returns
            return self.identity(f64(conv1.weight), f64(conv1.bias), conv1.padding, scale)
        weight, bias = f64(conv1.weight), f64(conv1.bias)
        if skip.bias is not None:
            bias = bias + f64(skip.bias)
        if skip.up or skip.weight is None:
            conv = None if skip.weight is None else Convolution(f64(skip.weight), None, 0, self.target)
            return Convolution(weight, bias, conv1.padding, self.target), Resampled(self.resampling(skip), conv, scale)
        resample = self.resampling(skip) if skip.down else None
        weight, bias, projection = weight * scale, bias * scale, f64(skip.weight) * scale
        if self.target.pointwise and self.target.residual != "torch":
            add = FusedResidual(1.0, bias, self.target)
            end = FusedProjection(Convolution(projection, None, 0, self.target), resample, add)
            return Convolution(weight, None, conv1.padding, self.target), end
        widths = [stream, block.in_channels - stream] if paired else [stream]
        convs = [Convolution(part, None, 0, self.target) for part in projection.split(widths, 1)]
        return Convolution(weight, bias, conv1.padding, self.target), Projection(convs, resample)

    def attention(self, block: UNetBlock, gain: float, accumulates: bool) -> Attention:
        """The block's attention on its map times `gain`."""
        if self.target.attention == "triton":
            check_triton(block.attend.head_dim, self.target.dtype, self.target.device.type)
        norm2 = self.norm(block.norm2, silu=False, gain=gain)
        # EDM orders by (channel, which of q, k, v); here it is (which, channel)
        weight, bias = (
            f64(t).unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1) for t in (block.qkv.weight, block.qkv.bias)
        )
        qkv = Convolution(weight, bias, 0, self.target)
        weight, bias, scale = f64(block.proj.weight), f64(block.proj.bias), block.skip_scale
        if accumulates:
            proj, end = Convolution(weight * scale, bias * scale, 0, self.target), None
        else:
            proj, end = self.identity(weight, bias, 0, scale)
        return Attention(norm2, qkv, proj, block.num_heads, end, self.target)
