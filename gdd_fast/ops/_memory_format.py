"""What operators on feature maps (N, C, H, W) share: memory layouts, and the statistics passed between operators."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results made from x: channels_last if its channels are innermost, else contiguous.

    Unlike torch's own rule this looks through slices of a channels_last tensor, which are most of a U-Net's gradients.
    If both formats are the same memory, as for one channel or one pixel, x's strides decide, as in torch's
    convolutions.
    """
    innermost = x.stride(1) == 1 and (x.stride(2), x.stride(3)) != (1, 1)
    return torch.channels_last if innermost else torch.contiguous_format


def runs_eagerly(x: Tensor) -> bool:
    """Whether calls with x are computed at once and unobserved, so that autograd may be left to C++.

    Not so while a compiler traces, under a dispatch mode (a FLOP counter, fake tensors), or for a tensor subclass.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and type(x) in _PLAIN and not is_in_torch_dispatch_mode()


def evenly_spaced(x: Tensor) -> Tensor:
    """x itself if all its pixels, row after row, are equally spaced, which is all that kernels need; else a copy in its
    `memory_format`."""
    _, _, h, w = x.shape
    even = h == 1 or w == 1 or x.stride(2) == w * x.stride(3)
    return x if even else x.contiguous(memory_format=memory_format(x))


def empty_map(x: Tensor, channels: int) -> Tensor:
    """An uninitialised map (N, channels, H, W) in x's dtype and `memory_format`."""
    n, _, h, w = x.shape
    return torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype for sums and products of x: float32, or float64 for float64."""
    # torch.promote_types gives the same, but its dispatcher call counts next to a norm of 10 us on a GPU
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype); a `to` that does nothing still costs a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is convolved: autocast's if autocast is on, else its own."""
    device = x.device.type
    # float64 stays: autocast leaves it alone; torch 2.11 does not compile is_autocast_available
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def statistics_parts(pixels: int) -> int:
    """The number of runs of pixels for statistics: at most 16, of 64 pixels or more; depends on size alone."""
    parts = min(max(pixels // 64, 1), 16)
    chunk = -(-pixels // parts)
    return -(-pixels // chunk)


def channel_statistics_ref(x: Tensor) -> Tensor:
    """Statistics of x (N, C, H, W): (N, P, 2, C), the mean and the sum of squared deviations of each channel over each
    of P = `statistics_parts(H * W)` runs of ceil(H * W / P) pixels, in float32 (float64 for float64)."""
    pixels = x.shape[2] * x.shape[3]
    chunk = -(-pixels // statistics_parts(pixels))
    runs = x.detach().to(compute_dtype(x)).flatten(2).split(chunk, 2)
    means = [run.mean(2) for run in runs]
    m2s = [(run - mean[:, :, None]).square().sum(2) for run, mean in zip(runs, means, strict=True)]
    return torch.stack([torch.stack(pair, 1) for pair in zip(means, m2s, strict=True)], 1)
