"""Folding a diffusers U-Net at one noise level; `fold` explains what is constant there.

In a copy of the network, residual blocks and attentions are replaced by the folded layers of our own networks, the
first and last convolutions by ones that include D's scales. The modules that call them (diffusers' down, middle and up
blocks) stay, as does every layer of an unknown kind, which runs unchanged in the compute dtype. Instead of the
embedding, the blocks are passed the rows of a label.
"""

# mypy: disable-error-code="union-attr,arg-type,operator,index,assignment,return-value,attr-defined,call-arg,misc"
# diffusers' layers are recognised by their structure and have no static types here.

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.acceleration import restore
from gdd_fast.acceleration.class_exchange import library_class
from gdd_fast.acceleration.diffusers_unet import attention_obstacle
from gdd_fast.engine.folded_layers import (
    Convolution,
    FusedProjection,
    FusedResidual,
    Identity,
    Norm,
    Projection,
    Target,
    memory_format,
)
from gdd_fast.engine.folded_unet import Attention
from gdd_fast.engine.folding import Conditioning, Folding, f64
from gdd_fast.models.teachers.unet2d import UNet2DPrecond, unet_body
from gdd_fast.ops.attention import check_triton

Rows = Callable[[Tensor], list[Tensor]]
"""Embeddings float64 (N, D) -> the rows of one block, float64 (N, C) each. A generator is pickled with them."""


@dataclasses.dataclass(frozen=True)
class _Affine:
    """`Rows` of an affine layer: scale and shift if `adaptive`, else what is added, with `offset`."""

    weight: Tensor
    bias: Tensor
    activate: nn.Module
    adaptive: bool
    offset: Tensor

    def __call__(self, emb: Tensor) -> list[Tensor]:
        row = torch.addmm(self.bias, self.activate(emb), self.weight.t())
        return list(row.chunk(2, 1)) if self.adaptive else [row + self.offset]


def _itself(emb: Tensor) -> list[Tensor]:
    """`Rows` of a block that takes the embedding."""
    return [emb]


@dataclasses.dataclass(frozen=True)
class _AllRows:
    """Labels float64 (N, classes) -> the rows of all blocks, float32 (N, sum of sizes)."""

    base: Tensor
    classes: Tensor
    rows: list[Rows]

    def __call__(self, labels: Tensor) -> Tensor:
        emb = self.base + labels @ self.classes
        return torch.cat([row for block in self.rows for row in block(emb)], 1).float()


class FoldedUNet2D(nn.Module):
    """A preconditioned diffusers U-Net at one noise level, from standard normal latents to images."""

    def __init__(
        self, unet: nn.Module, row_sizes: list[int], *, reads: tuple[float, float], latent_scale: float, target: Target
    ) -> None:
        """`reads`: factor and offset that turn latents into the U-Net's input; (1, 0) if its layers include them."""
        super().__init__()
        self.unet = unet
        self.row_sizes = row_sizes
        self.reads = reads
        self.latent_scale = latent_scale
        self.dtype = target.dtype
        self.channels_last = target.layout is torch.channels_last

    def forward(self, latents: Tensor, rows: Tensor | None) -> Tensor:
        """Latents float32 (N, C, H, W), rows float32 (N, sum of row_sizes) or None -> images float32 (N, C, H, W)."""
        factor, offset = self.reads
        x = latents if self.reads == (1.0, 0.0) else latents * factor + offset
        x = x.to(self.dtype, memory_format=memory_format(self.channels_last))
        # a tuple even without classes: diffusers' blocks pass it along as they would an embedding
        x, image = unet_body(self.unet, x, () if rows is None else rows.split(self.row_sizes, 1))
        x = self.unet.conv_out(self.unet.conv_norm_out(x.float()))
        x = x if image is None else x + image.float()
        return torch.add(x, latents, alpha=self.latent_scale) if self.latent_scale else x


class Resnet(nn.Module):
    """diffusers' residual block. `place`: index of its first row among all; None if its layers hold constant rows."""

    def __init__(
        self,
        *,
        norm1: nn.Module,
        conv1: Convolution,
        norm2: Norm,
        act: nn.Module | None,
        conv2: Convolution,
        end: Identity | FusedResidual | Projection | FusedProjection,
        sample: nn.Module | None,
        place: int | None,
        adaptive: bool,
    ) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.act, self.conv2, self.end = norm1, conv1, norm2, act, conv2, end
        self.sample = sample
        self.place = place
        self.adaptive = adaptive

    def forward(self, x: Tensor, temb: tuple[Tensor, ...]) -> Tensor:
        """`temb` (diffusers' name) holds the rows of all blocks."""
        h = self.norm1(x)
        if self.act is not None:
            h = self.act(h)
        if self.sample is not None:
            x, h = self.sample(x), self.sample(h)
        h = self.conv1(h)
        if self.place is None:
            h = self.norm2(h)
        elif self.adaptive:
            h = self.norm2(h, scale=temb[self.place], shift=temb[self.place + 1])
        else:
            h = self.norm2(h, add=temb[self.place])
        if self.act is not None:
            h = self.act(h)
        return self.end(self.conv2, h, x)[0]


class SelfAttention(nn.Module):
    """diffusers' self-attention over the pixels of an image."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return self.layer(x, None)[0]


class Doubled(nn.Module):
    """diffusers' Upsample2D without its test for batches of 64 images or more, which a torch.export program for any
    number of images cannot contain. `conv` may be None."""

    def __init__(self, conv: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


def for_any_batch(folded: nn.Module) -> None:
    """In a folded network, replace the diffusers layers that depend on the number of images."""
    upsampling = library_class("diffusers.models.upsampling", "Upsample2D")
    for name, layer in list(folded.named_modules()):
        if upsampling is None or type(layer) is not upsampling:
            continue
        if layer.norm is None and not layer.use_conv_transpose and layer.interpolate:
            conv = getattr(layer, "conv", None) or getattr(layer, "Conv2d_0", None)
            folded.set_submodule(name, Doubled(conv if layer.use_conv else None))


class Unfolded(nn.Module):
    """A block of an unknown kind, with the embedding that it takes."""

    def __init__(self, block: nn.Module, emb: Tensor | None, place: int | None) -> None:
        super().__init__()
        self.block = block
        self.emb = None if emb is None else nn.Buffer(emb)
        self.place = place

    def forward(self, x: Tensor, temb: tuple[Tensor, ...]) -> Tensor:
        return self.block(x, self.emb if self.place is None else temb[self.place].to(x.dtype))


def fold_unet2d(net: UNet2DPrecond, target: Target, sigma: float) -> tuple[FoldedUNet2D, Conditioning | None]:
    """As `fold.fold`, for a diffusers U-Net."""
    return _Folder(net, target, sigma).fold()


class _Folder(Folding):
    def __init__(self, net: UNet2DPrecond, target: Target, sigma: float) -> None:
        # diffusers' blocks do not pass statistics on
        super().__init__(dataclasses.replace(target, statistics=False))
        self.net, self.sigma = net, sigma
        own = copy.deepcopy(net).cpu().float().eval()
        restore(own)
        self.unet = own.model
        c = net.parametrisation.coefficients(torch.tensor([sigma], dtype=torch.float64))
        self.read, self.offset = float(c.scale) * sigma, c.shift
        self.latent_scale, self.out = float(c.skip) * sigma, float(net.out_factor(c))
        base = own.double().embed(c.time.double(), None)  # sinusoids are computed in float32, the rest in float64
        self.base = base.detach()
        self.classes = None
        if net.label_dim:
            self.classes = (own.embed(c.time.double(), torch.eye(net.label_dim).double()) - base).detach()
        self.rows: list[Rows] = []
        self.sizes: list[int] = []

    def fold(self) -> tuple[FoldedUNet2D, Conditioning | None]:
        resnet = library_class("diffusers.models.resnet", "ResnetBlock2D")
        other = library_class("diffusers.models.resnet", "ResnetBlockCondNorm2D") or ()
        attention = library_class("diffusers.models.attention_processor", "Attention")
        unet = self.unet
        for module in list(unet.modules()):
            for name, child in list(module.named_children()):
                if type(child) is resnet:
                    setattr(module, name, self.resnet(child))
                elif isinstance(child, other):
                    setattr(module, name, self.unfolded(child))
                elif type(child) is attention and attention_obstacle(child) is None and child.residual_connection:
                    setattr(module, name, SelfAttention(self.attention(child)))
        outside = [block for block in unet.down_blocks if hasattr(block, "skip_conv")]
        center = unet.config.center_input_sample
        read, offset = (2 * self.read, 2 * self.offset - 1) if center else (self.read, self.offset)
        first = read if not outside and not offset else 1.0  # zero padding rules out folding an offset
        conv = unet.conv_in
        unet.conv_in = Convolution(f64(conv.weight) * first, f64(conv.bias), conv.padding[0], self.target)
        exact = dataclasses.replace(self.target, dtype=torch.float32)
        norm, conv, channels = unet.conv_norm_out, unet.conv_out, self.net.img_channels
        unet.conv_norm_out = Norm(norm.weight, norm.bias, norm.num_groups, norm.eps, exact)
        weight, bias = f64(conv.weight)[:channels] * self.out, f64(conv.bias)[:channels] * self.out
        unet.conv_out = Convolution(weight, bias, conv.padding[0], exact)
        for block in unet.up_blocks:
            if getattr(block, "skip_conv", None) is not None:  # its output is added to conv_out's
                block.skip_conv.weight.data.mul_(self.out)
                block.skip_conv.bias.data.mul_(self.out)
        for name in ("time_proj", "time_embedding", "class_embedding"):
            setattr(unet, name, None)
        self._to_target(unet)
        conditioning = None
        if self.classes is not None:
            rows = _AllRows(self.base, self.classes, self.rows)
            conditioning = Conditioning(rows, self.net.label_dim, self.target.device)
        folded = FoldedUNet2D(
            unet,
            self.sizes,
            reads=(1.0, 0.0) if first != 1.0 or (read, offset) == (1.0, 0.0) else (read, offset),
            latent_scale=self.latent_scale,
            target=self.target,
        )
        return folded.eval().requires_grad_(False), conditioning

    def _to_target(self, unet: nn.Module) -> None:
        """Cast what is left of diffusers' own layers to the compute dtype; folded layers already have theirs."""
        ours = (Convolution, Norm, FusedResidual, Identity)
        for module in unet.modules():
            if isinstance(module, ours):
                continue
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        cast = tensor.detach().to(self.target.device, self.target.dtype)
                        cast = cast.contiguous(memory_format=self.target.layout) if cast.ndim == 4 else cast
                        tensors[name] = (
                            nn.Parameter(cast, requires_grad=False) if tensors is module._parameters else cast
                        )

    def condition(self, rows: Rows) -> tuple[list[Tensor], int | None]:
        """A block's constant rows and None; or, with classes, no rows and the index of its first among all rows."""
        if self.classes is None:
            return [row[0] for row in rows(self.base)], None
        place = len(self.sizes)
        self.rows.append(rows)
        self.sizes += [row.shape[1] for row in rows(self.base)]
        return [], place

    def resnet(self, block: nn.Module) -> Resnet:
        affine, adaptive = block.time_emb_proj, block.time_embedding_norm == "scale_shift"
        conv1, offset = block.conv1, f64(block.conv1.bias)
        place: int | None = None
        constants: list[Tensor] = []
        if affine is not None:
            activate = nn.Identity() if block.skip_time_act else block.nonlinearity
            # the convolution's bias is folded into what is added after it
            constants, place = self.condition(_Affine(f64(affine.weight), f64(affine.bias), activate, adaptive, offset))
            if not adaptive:
                offset, constants = constants[0] if constants else None, []
        silu = isinstance(block.nonlinearity, nn.SiLU)
        padding = conv1.padding[0]
        conv1, norm2 = self.before_norm(f64(conv1.weight), padding, offset, block.norm2, constants, silu)
        conv2, end = self.end(block)
        return Resnet(
            norm1=self.norm(block.norm1, silu=silu),
            conv1=conv1,
            norm2=norm2,
            act=None if silu else block.nonlinearity,
            conv2=conv2,
            end=end,
            sample=block.upsample if block.upsample is not None else block.downsample,
            place=place,
            adaptive=adaptive,
        )

    def end(self, block: nn.Module) -> tuple[Convolution, nn.Module]:
        """conv2, and the end of the block: (conv2(h) + skip) * scale."""
        scale, conv, skip = 1 / float(block.output_scale_factor), block.conv2, block.conv_shortcut
        weight, bias = f64(conv.weight), f64(conv.bias)
        if skip is None:
            return self.identity(weight, bias, conv.padding[0], scale)
        bias = bias if skip.bias is None else bias + f64(skip.bias)
        weight, bias, projection = weight * scale, bias * scale, f64(skip.weight) * scale
        short = Convolution(projection, None, skip.padding[0], self.target)
        if self.target.residual != "torch":
            return self.convolution(conv, None, weight), FusedProjection(
                short, None, FusedResidual(1.0, bias, self.target)
            )
        return self.convolution(conv, bias, weight), Projection([short], None)

    def convolution(self, conv: nn.Module, bias: Tensor | None, weight: Tensor) -> Convolution:
        return Convolution(weight, bias, conv.padding[0], self.target)

    def attention(self, block: nn.Module) -> Attention:
        layers = [block.to_q, block.to_k, block.to_v]
        if self.target.attention == "triton":
            width = layers[0].weight.shape[0] // block.heads
            check_triton(width, self.target.dtype, self.target.device.type)
        weight = torch.cat([f64(layer.weight) for layer in layers])
        bias = torch.cat([_bias(layer) for layer in layers])
        out = block.to_out[0]
        scale = 1 / float(block.rescale_output_factor)
        proj, end = self.identity(f64(out.weight)[:, :, None, None], _bias(out), 0, scale)
        return Attention(
            self.norm(block.group_norm, silu=False),
            Convolution(weight[:, :, None, None], bias, 0, self.target),
            proj,
            block.heads,
            end,
            self.target,
        )

    def unfolded(self, block: nn.Module) -> Unfolded:
        constants, place = self.condition(_itself)
        return Unfolded(block, constants[0][None] if constants else None, place)


def _bias(layer: nn.Module) -> Tensor:
    return torch.zeros(layer.weight.shape[0], dtype=torch.float64) if layer.bias is None else f64(layer.bias)
