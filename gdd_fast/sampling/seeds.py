"""One random generator per seed, so that a seed's image does not depend on the batch in which it is computed.

The order of draws is EDM's: the latent, then the label, then any noise that a stochastic sampler needs. The numbers of
a `torch.Generator` depend on its kind of device. Published EDM and GDD figures drew on CUDA; here the default is the
CPU, wherever the network runs, so that a seed gives the same latent on every machine. Use `generator_device="cuda"` to
draw the latents of published figures.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch

from gdd_fast.errors import ConfigError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_seeds(text: str) -> list[int]:
    """`"0-9,12"` -> `[0, 1, ..., 9, 12]`, in the order written.

    Raises `ConfigError` for anything that is not a comma-separated list of numbers and ascending ranges, and for a seed
    given twice: it would make the same image again under the same file name.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ConfigError(f"--seeds takes numbers and ranges such as 0-63,100, not {part.strip()!r} in {text!r}")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ConfigError(f"--seeds range {part.strip()!r} runs backwards; write {last}-{first}")
        if last >= 1 << 32:
            raise ConfigError(f"--seeds {part.strip()!r}: a seed is at most {(1 << 32) - 1}")
        seeds.extend(range(first, last + 1))
    seed, times = Counter(seeds).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"--seeds has seed {seed} more than once in {text!r}")
    return seeds


class SeedStreams:
    """One `torch.Generator` for each of N seeds; every draw takes one item from each.

    `device` is where results go, `generator_device` where they are drawn: on `device` itself if both are of the same
    kind, as all GPUs draw alike. Seeds are taken modulo 2**32, as in EDM.
    """

    def __init__(
        self, seeds: Sequence[int], device: torch.device | str = "cpu", generator_device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        where = torch.device(generator_device)
        where = self.device if where.type == self.device.type else where
        self.generators = [torch.Generator(where).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal `(N, *shape)`."""
        draws = [torch.randn(tuple(shape), generator=g, dtype=dtype, device=g.device) for g in self.generators]
        return self._stack(draws, (0, *shape), dtype)

    def normal_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal of the shape and dtype of `x` `(N, ...)`: the noise of a stochastic sampler."""
        return self.normal(x.shape[1:], x.dtype)

    def integers(self, high: int) -> torch.Tensor:
        """Uniform int64 `(N,)` from `0 .. high - 1`."""
        draws = [torch.randint(high, (), generator=g, device=g.device) for g in self.generators]
        return self._stack(draws, (0,), torch.int64)

    def start(
        self, shape: Sequence[int], label_dim: int = 0, class_index: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inputs of a sampler: latents float32 `(N, *shape)` and one-hot labels float32 `(N, label_dim)`.

        Labels are drawn, or all `class_index`, which does not change the latents; `None` if `label_dim` is 0. Raises
        `ConfigError` for a class that the network does not have.
        """
        check_class(class_index, label_dim)
        latents = self.normal(shape)
        if label_dim == 0:
            return latents, None
        classes = self.integers(label_dim)
        if class_index is not None:
            classes = torch.full_like(classes, class_index)
        return latents, torch.nn.functional.one_hot(classes, label_dim).float()

    def _stack(self, draws: list[torch.Tensor], empty: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if not draws:
            return torch.empty(tuple(empty), dtype=dtype, device=self.device)
        stacked = torch.stack(draws)
        if self.device.type == "cuda" and not stacked.is_cuda:
            stacked = stacked.pin_memory()  # a copy from pageable memory would wait for all pending work of the GPU
        return stacked.to(self.device, non_blocking=True)


def latents(
    seeds: Sequence[int],
    shape: Sequence[int],
    label_dim: int = 0,
    device: torch.device | str = "cpu",
    *,
    class_index: int | None = None,
    generator_device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents float32 `(N, *shape)` and one-hot labels float32 `(N, label_dim)` or `None`, for N seeds.

    `shape` is `(C, H, W)`. See `SeedStreams.start`.
    """
    return SeedStreams(seeds, device, generator_device).start(shape, label_dim, class_index)


def check_class(class_index: int | None, label_dim: int) -> None:
    """Raise `ConfigError` if a network of `label_dim` classes has no class `class_index`; `None` is always fine."""
    if class_index is None:
        return
    if label_dim == 0:
        raise ConfigError(f"class {class_index} was requested, but the network is unconditional; leave the class out")
    if not 0 <= class_index < label_dim:
        raise ConfigError(f"there is no class {class_index}: the network has classes 0 to {label_dim - 1}")
