"""The projected discriminator: frozen random features here, trainable heads in `discriminator_heads`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gdd_fast.errors import CheckpointError, ConfigError
from gdd_fast.models.backbone_input import BackboneInput
from gdd_fast.models.backbones import Backbone, check_resolution
from gdd_fast.models.discriminator_heads import DiscriminatorHeads
from gdd_fast.models.random_projection import OUT_CHANNELS, RandomProjection

__all__ = ["DiscriminatorHeads", "ProjectedFeatures"]

_LEVEL_STRIDES = (4, 8, 16, 32)


class ProjectedFeatures(nn.Module):
    """What the discriminator sees of an image: backbone features under a fixed random projection. Nothing is trained.

    The module takes ownership of `backbones`: they are converted to `dtype`, in which they and the projections compute,
    and to `layout`. Images are normalised for each backbone and resized bilinearly to `resolution`. The projections are
    drawn from `seed`; a checkpoint only has to keep `projection_state()`, as the backbones are published weights.

    `channels` and `resolutions` hold, for each backbone, the widths and nominal sizes of its four maps, fine to coarse:
    the arguments of `DiscriminatorHeads`. Nominal sizes are for the next power of two from `resolution` (256 for 224)
    and strides 2 to 16; VGG's maps are actually twice as large.

    Raises `ConfigError` for no backbone, one given twice, or a resolution that one of them cannot take.
    """

    def __init__(
        self,
        backbones: Sequence[Backbone],
        resolution: int = 224,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ):
        super().__init__()
        self.layout = layout
        names = [backbone.name for backbone in backbones]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a discriminator needs one or more different backbones, not {names}")
        for backbone in backbones:
            check_resolution(backbone, resolution)
        self.resolution = resolution
        self.backbones = nn.ModuleDict(dict(zip(names, backbones, strict=True)))
        self.inputs = nn.ModuleDict({b.name: BackboneInput(b.mean, b.std, resolution) for b in backbones})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projections = nn.ModuleDict(
                {
                    backbone.name: RandomProjection(backbone.tap_channels, len(set(backbone.tap_strides)) == 1)
                    for backbone in backbones
                }
            )
        self.requires_grad_(False)
        self.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        nominal = 1 << (resolution - 1).bit_length()
        self.channels = (OUT_CHANNELS,) * len(names)
        self.resolutions = (tuple(2 * nominal // stride for stride in _LEVEL_STRIDES),) * len(names)

    def projection_state(self) -> dict[str, Tensor]:
        """The random projections' tensors, by name."""
        return self.projections.state_dict()

    def load_projection_state(self, state: Mapping[str, Tensor]) -> None:
        """Load another run's projections. Raises `CheckpointError` if they belong to other backbones."""
        try:
            self.projections.load_state_dict(state)
        except RuntimeError:
            raise CheckpointError(
                f"the saved random projections do not fit the backbones {', '.join(self.backbones)}"
            ) from None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the backbones and projections compute."""
        return next(self.projections.parameters()).dtype

    def train(self, mode: bool = True) -> "ProjectedFeatures":
        return super().train(False)

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """Images in [-1, 1], float `(N, 1 or 3, H, W)` -> per backbone four maps, fine to coarse; or `ConfigError`."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ConfigError(f"the discriminator takes images (N, 1 or 3, H, W), not {tuple(images.shape)}")
        features = []
        for name, backbone in self.backbones.items():
            x = self.inputs[name](images, self.dtype)
            features.append(self.projections[name](backbone(x.contiguous(memory_format=self.layout))))
        return features
