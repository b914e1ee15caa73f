"""The preprocessing of images for a backbone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BackboneInput(nn.Module):
    """Normalises images, resizes them bilinearly (align_corners=False) and casts them.

    Args:
        mean, std: three numbers each, for images in [0, 1]; the input images are in [-1, 1].
        size: height and width of the result.

    The constants are on the module's device but in no state_dict: creating them in each call would take eight GPU
    launches, and a copy from host memory could not be captured in a CUDA graph. Casting the module to half precision
    keeps them in float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        super().__init__()
        self.size = size
        # pixels in [-1, 1] to the scale of the backbone's training, ((x + 1) / 2 - mean) / std, as one multiply-add
        self._numbers = {
            "scale": [0.5 / s for s in std],
            "shift": [(0.5 - m) / s for m, s in zip(mean, std, strict=True)],
        }
        for name, numbers in self._numbers.items():
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Floating images (N, 1 or 3, H, W) -> (N, 3, size, size) in `dtype`, channels_last.

        A gray channel is repeated three times. The result is rounded once, after computing in float32 (float64 for
        float64), and is differentiable any number of times. The weights of the resizing add up to one, so normalising
        first, while there are few pixels, gives the same.
        """
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        scale, shift = (t.to(wide.dtype) for t in (self.scale, self.shift))
        y = torch.addcmul(shift, wide, scale).contiguous()  # the layout in which PyTorch resizes three channels
        if y.shape[2:] != (self.size, self.size):
            y = F.interpolate(y, (self.size, self.size), mode="bilinear", align_corners=False)
        return y.to(dtype, memory_format=torch.channels_last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BackboneInput":
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale is not before:  # moved, cast, or left without values by to_empty
            dtype = torch.promote_types(self.scale.dtype, torch.float32)
            for name, numbers in self._numbers.items():
                setattr(self, name, torch.tensor(numbers, dtype=dtype, device=self.scale.device).view(1, 3, 1, 1))
        return self
