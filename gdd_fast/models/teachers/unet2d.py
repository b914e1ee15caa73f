"""diffusers' UNet2DModel as a denoiser: D(x; sigma) with one of the parametrisations of this folder.

The U-Net is diffusers' own class, so all its kinds of blocks work; `gdd_fast.accelerate` makes its blocks faster, and
the one-step engine folds it. Only the calling of its parts is rewritten here, because the embedding takes soft labels
and fractional times, is left out of the folded network, and stays in float32.
"""

# mypy: disable-error-code="union-attr,arg-type,operator,index,assignment,return-value,attr-defined,call-arg,misc"
# diffusers' layers are recognised by their structure and have no static types here.

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError
from gdd_fast.models.precond import compute_dtype
from gdd_fast.models.preconditioned import Preconditioned, check_sigma_init
from gdd_fast.models.teachers import make_parametrisation
from gdd_fast.models.teachers.parametrisation import Parametrisation
from gdd_fast.models.teachers.variance_preserving import MAX_TIMES, VariancePreserving

MAX_SIZE = 65536


class UNet2DPrecond(Preconditioned):
    """A diffusers U-Net with the parametrisation that its scheduler describes.

    Args:
        unet: arguments of UNet2DModel.
        parametrisation: as from `Parametrisation.config`.
        sigma_init: the noise level of the one step; by default the parametrisation's.
        output_gain: how much larger the last layer's output is than the teacher's, after scaling by `as_generator`.
        dtype: dtype of the U-Net's activations between its first and last layers, a torch.dtype or its name.
        Parameters, embeddings and the last norm and convolution are always float32.

    Raises ConfigError for arguments that cannot make a network, or if diffusers is missing.
    """

    foreign = True

    def __init__(
        self,
        unet: dict[str, Any],
        parametrisation: dict[str, Any],
        sigma_init: float | None = None,
        output_gain: float = 1.0,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        super().__init__()
        self.unet_config = check_unet(unet)
        self.parametrisation = make_parametrisation(parametrisation)
        check_times(self.unet_config, self.parametrisation)
        self.predicts_noise = self.parametrisation.predicts_noise
        self.learns_velocity = self.predicts_noise and isinstance(self.parametrisation, VariancePreserving)
        self.img_resolution: int = self.unet_config["sample_size"]
        self.img_channels: int = self.unet_config["in_channels"]
        self.label_dim: int = self.unet_config["num_class_embeds"] or 0
        self.sigma_min, self.sigma_max = self.parametrisation.sigma_min, self.parametrisation.sigma_max
        wanted = self.parametrisation.sigma_init if sigma_init is None else sigma_init
        self.sigma_init = check_sigma_init(wanted, self.sigma_min, self.sigma_max)
        self.output_gain = float(output_gain)
        self.dtype = compute_dtype(dtype)
        try:
            self.model = unet_class()(**self.unet_config)
        except Exception as error:  # anything that diffusers' blocks raise for arguments that do not fit together
            raise ConfigError(f"diffusers' UNet2DModel cannot be made from these arguments: {error}") from error
        frequencies = getattr(self.model.time_proj, "weight", None)
        if frequencies is not None and not frequencies.requires_grad:
            # make it a buffer: fixed, and kept in float32 by code that stores parameters in lower precision
            del self.model.time_proj.weight
            self.model.time_proj.register_buffer("weight", frequencies.detach())

    def init_config(self) -> dict[str, Any]:
        return {
            "unet": self.unet_config,
            "parametrisation": self.parametrisation.config(),
            "sigma_init": self.sigma_init,
            "output_gain": self.output_gain,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        force_fp32: bool = False,
    ) -> Tensor:
        """As `EDMPrecond.forward`, without augmentation."""
        self._check_images(x)
        x = x.to(torch.float32)
        labels = self._class_labels(class_labels, x)
        c = self.parametrisation.coefficients(self._noise_levels(sigma, x, torch.float64))
        skip, out, scale = (value.float()[:, None, None, None] for value in (c.skip, self.out_factor(c), c.scale))
        dtype = torch.float32 if force_fp32 else self.dtype
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(c.time.float(), labels)
            return skip * x + out * self.predict(scale * x + c.shift if c.shift else scale * x, emb, dtype)

    def out_factor(self, c: Any) -> Tensor:
        """The factor for the result of `predict`, float64 (N,)."""
        out = c.out / self.output_gain
        # networks with a Fourier embedding divide by their time
        return out / c.time if self.unet_config["time_embedding_type"] == "fourier" else out

    def embed(self, time: Tensor, labels: Tensor | None) -> Tensor:
        """Times float32 (N,) or (1,) and labels float32 (N, label_dim) or (1, label_dim) -> (N, D) or (1, D)."""
        emb = self.model.time_embedding(self._waves(time))
        if labels is None:
            return emb
        table = self.model.class_embedding
        if self.unet_config["class_embed_type"] == "timestep":
            rows = table(self._waves(torch.arange(self.label_dim, device=time.device).to(time.dtype)))
        else:
            rows = table.weight
        return emb + labels @ rows

    def _waves(self, time: Tensor) -> Tensor:
        embedding = self.model.time_proj
        if not isinstance(embedding, nn.Embedding):
            return embedding(time).to(self.model.time_embedding.linear_1.weight.dtype)
        # one learned row per time; fractional times are interpolated
        below = time.floor().long().clamp(0, embedding.num_embeddings - 1)
        above = (below + 1).clamp(max=embedding.num_embeddings - 1)
        return torch.lerp(embedding(below), embedding(above), (time - below)[:, None].to(embedding.weight.dtype))

    def predict(self, x: Tensor, emb: Tensor, dtype: torch.dtype) -> Tensor:
        """The U-Net's prediction, float32, from its input and an embedding; not yet divided by its time."""
        x = 2 * x - 1 if self.unet_config["center_input_sample"] else x
        low = dtype != torch.float32
        with torch.autocast(x.device.type, dtype=dtype) if low else contextlib.nullcontext():
            x, image = unet_body(self.model, x, emb)
        x = self.model.conv_out(self.model.conv_act(self.model.conv_norm_out(x.float())))
        x = x if image is None else x + image.float()
        return x[:, : self.img_channels]

    def scale_output(self, gain: float) -> None:
        """Make the last layers' outputs `gain` times larger and the factor that multiplies them as much smaller.

        D does not change, up to rounding, but the image becomes less sensitive to optimizer steps in these layers.
        """
        last = [self.model.conv_out, *(b.skip_conv for b in self.model.up_blocks if getattr(b, "skip_conv", None))]
        with torch.no_grad():
            for parameter in (p for layer in last for p in layer.parameters()):
                parameter.mul_(gain)
        self.output_gain *= gain


def check_times(unet: dict[str, Any], parametrisation: Parametrisation) -> None:
    """Raise ConfigError if the U-Net's embedding is undefined at a time of the training, or for a class that is
    embedded like a time.

    diffusers' own network returns NaN there, or raises: a Fourier embedding takes the logarithm of the time, by which
    the output is also divided, and a learned one has a row for each time from 0 on.
    """
    ends = torch.tensor([parametrisation.sigma_min, parametrisation.sigma_max], dtype=torch.float64, device="cpu")
    first, last = parametrisation.coefficients(ends).time.tolist()
    where = f"at the times of its scheduler, {first:.4g} to {last:.4g}"
    if unet["class_embed_type"] == "timestep":
        first, last = min(first, 0), max(last, unet["num_class_embeds"] - 1)
        where += f", and of its {unet['num_class_embeds']} classes"
    kind, rows = unet["time_embedding_type"], unet["num_train_timesteps"]
    if kind == "fourier" and first <= 0:
        raise ConfigError(
            f"time_embedding_type 'fourier' takes the logarithm, and is NaN in diffusers too, {where}: it goes with "
            "ScoreSdeVeScheduler."
        )
    if kind == "learned" and not (rows and first >= 0 and last <= rows - 1):
        raise ConfigError(f"time_embedding_type 'learned' with num_train_timesteps {rows} has no row {where}.")


def output_gain(net: UNet2DPrecond) -> float:
    """The gain at which the output of the last layer has the scale of images at the noise level of `net`."""
    sigma = torch.tensor([net.sigma_init], dtype=torch.float64)
    return abs(float(net.out_factor(net.parametrisation.coefficients(sigma))))


def unet_body(unet: nn.Module, x: Tensor, emb: Any) -> tuple[Tensor, Tensor | None]:
    """The features before the last norm, and the image summed by "skip" blocks, if any, for x (N, C, H, W).

    `emb` is passed to the blocks unchanged; x is already centered.
    """
    image, x = x, unet.conv_in(x)
    kept: tuple[Tensor, ...] = (x,)
    for block in unet.down_blocks:
        if hasattr(block, "skip_conv"):
            x, maps, image = block(hidden_states=x, temb=emb, skip_sample=image)
        else:
            x, maps = block(hidden_states=x, temb=emb)
        kept += tuple(maps)
    if unet.mid_block is not None:
        x = unet.mid_block(x, emb)
    image = None
    for block in unet.up_blocks:
        count = len(block.resnets)
        kept, maps = kept[:-count], kept[-count:]
        if hasattr(block, "skip_conv"):
            x, image = block(x, maps, emb, image)
        else:
            x = block(x, maps, emb)
    return x, image


def unet_class() -> type[nn.Module]:
    """diffusers' UNet2DModel. Raises ConfigError if diffusers is missing or does not import."""
    try:
        from diffusers import UNet2DModel
    except ModuleNotFoundError as error:
        raise ConfigError("this network is a diffusers U-Net: pip install 'gdd_fast[diffusers]'") from error
    except (ImportError, RuntimeError) as error:  # diffusers' own error; its last line has the cause
        reason = str(error).strip().rpartition("\n")[2]
        hint = "; reinstall torchvision for this torch, or uninstall it" if "torchvision" in reason else ""
        raise ConfigError(f"this network is a diffusers U-Net, which cannot be imported: {reason}{hint}") from error
    return UNet2DModel


def check_unet(given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of UNet2DModel: those given, with defaults filled in.

    Raises a ConfigError that names the first setting that is not supported.
    """
    if not isinstance(given, dict):
        raise ConfigError(f"the U-Net's arguments must be a mapping, got {given!r:.100}.")
    known = {n: p.default for n, p in inspect.signature(unet_class().__init__).parameters.items() if n != "self"}
    unknown = sorted(str(name) for name in set(given) - set(known))
    if unknown:
        raise ConfigError(f"the installed UNet2DModel has no argument {', '.join(unknown):.300}: update diffusers.")
    config = {**known, **given}
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    if isinstance(config["sample_size"], list) and len(set(config["sample_size"])) == 1:
        config["sample_size"] = config["sample_size"][0]
    for name in ("sample_size", "in_channels", "out_channels", "layers_per_block"):
        if not isinstance(config[name], int) or not 1 <= config[name] <= MAX_SIZE:
            wanted = "the side of square images" if name == "sample_size" else "a positive whole number"
            raise ConfigError(f"{name} must be {wanted}, got {config[name]!r:.100}.")
    if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
        raise ConfigError(
            f"out_channels {config['out_channels']} must be in_channels, {config['in_channels']}, or twice that (a "
            "learned variance, which is left out)."
        )
    widths = config["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(isinstance(w, int) and 1 <= w <= MAX_SIZE for w in widths):
        raise ConfigError(f"block_out_channels must be a list of positive whole numbers, got {widths!r:.100}.")
    halvings = len(widths) - 1
    if config["sample_size"] % 2**halvings:
        raise ConfigError(
            f"sample_size {config['sample_size']} cannot be halved {halvings} times, as block_out_channels says."
        )
    for name in ("num_class_embeds", "num_train_timesteps"):
        if config[name] is not None and (type(config[name]) is not int or not 0 <= config[name] <= MAX_TIMES):
            raise ConfigError(f"{name} must be a whole number of at most {MAX_TIMES}, got {config[name]!r:.100}.")
    kind, classes = config["class_embed_type"], config["num_class_embeds"]
    if kind not in (None, "timestep"):
        raise ConfigError(f"class_embed_type {kind!r:.100} is not supported: it has to be null or 'timestep'.")
    if kind == "timestep" and not classes:
        raise ConfigError("num_class_embeds must be the number of classes with class_embed_type 'timestep'.")
    if config["time_embedding_type"] not in ("positional", "fourier", "learned"):
        raise ConfigError(f"time_embedding_type {config['time_embedding_type']!r:.100} is unknown.")
    return config
