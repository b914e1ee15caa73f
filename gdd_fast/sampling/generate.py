"""The loop that all commands share: seeds in, batches of uint8 images out."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch

from gdd_fast.errors import ConfigError, WeightsError, require
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.sampling import sampler
from gdd_fast.sampling.seeds import SeedStreams, check_class
from gdd_fast.settings import Settings


class OneStepFunction(Protocol):
    """A generator with one fixed noise level, such as `gdd_fast.engine.one_step.OneStepGenerator`."""

    device: torch.device
    img_channels: int
    img_resolution: int
    label_dim: int

    def run(self, latents: torch.Tensor, classes: torch.Tensor | None, *, check_classes: bool = True) -> torch.Tensor:
        """Standard normal latents (N, C, H, W), class indices (N,) or None -> images in [-1, 1], float32."""


Network = torch.nn.Module | OneStepFunction
SamplerName = Literal["one-step", "heun"]


@dataclass(frozen=True)
class SamplerConfig(Settings):
    """How latents become images."""

    sampler: SamplerName = "one-step"
    """`one-step`: GDD's, one evaluation at one noise level. `heun`: EDM's, with 2 * steps - 1 evaluations."""
    steps: int = 18
    """Steps of the heun sampler."""
    sigma_min: float = 0.002
    """Lowest noise level of the heun sampler."""
    sigma_max: float | None = None
    """Highest noise level of the heun sampler, by default 80; or the only one of one-step, by default that of the
    generator's training."""
    rho: float = 7.0
    """How strongly the heun sampler's steps concentrate at low noise."""
    s_churn: float = 0.0
    """Stochasticity of the heun sampler; 0 is deterministic."""
    s_min: float = 0.0
    """Lowest noise level at which noise is added."""
    s_max: float = math.inf
    """Highest noise level at which noise is added."""
    s_noise: float = 1.0
    """Standard deviation of the noise that is added."""

    def validate(self) -> None:
        """Raise `ConfigError` for settings that cannot work, or that the one-step sampler would ignore."""
        if self.sampler not in get_args(SamplerName):
            raise ConfigError(f"unknown sampler {self.sampler!r}; choose one of {', '.join(get_args(SamplerName))}")
        for option in fields(self):
            flag, value = f"--{option.name.replace('_', '-')}", getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                require(value == math.inf and option.name == "s_max", f"{flag} must be a finite number, not {value}")
            require(
                self.sampler != "one-step" or option.name in ("sampler", "sigma_max") or value == option.default,
                f"{flag} {value} is for --sampler heun; one-step takes one step from --sigma-max",
            )
        if self.s_churn < 0:
            raise ConfigError(f"--s-churn must be at least 0, not {self.s_churn}")
        sampler.noise_levels(self.steps, self.sigma_min, self.highest, self.rho)

    @property
    def highest(self) -> float:
        """Where the heun sampler starts."""
        return sampler.SIGMA_MAX if self.sigma_max is None else self.sigma_max

    def __call__(self, net: Network, streams: SeedStreams, latents: torch.Tensor, labels: torch.Tensor | None):
        """Images in the dtype and shape of `latents`."""
        if not isinstance(net, torch.nn.Module):
            return net.run(latents, None if labels is None else labels.argmax(1), check_classes=False)
        if self.sampler == "one-step":
            return sampler.one_step(net, latents, labels, self.sigma_max)
        return sampler.heun(
            net,
            latents,
            labels,
            steps=self.steps,
            sigma_min=self.sigma_min,
            sigma_max=self.highest,
            rho=self.rho,
            s_churn=self.s_churn,
            s_min=self.s_min,
            s_max=self.s_max,
            s_noise=self.s_noise,
            noise=streams.normal_like,
        )


class Batch(NamedTuple):
    """Images of some seeds: uint8 `(N, H, W, C)` on the network's device, class indices int64 `(N,)` or `None`.

    `finite`, bool () on the device: whether the network's output was finite. Bytes cannot show NaN: without this, a
    broken network makes black images.
    """

    seeds: list[int]
    images: torch.Tensor
    classes: torch.Tensor | None
    finite: torch.Tensor

    def check(self) -> "Batch":
        """Return the batch itself; `WeightsError` if its images are of values that are not finite. Waits for them."""
        if not bool(self.finite):
            raise WeightsError(
                f"the network's output for seeds {self.seeds[0]} to {self.seeds[-1]} holds NaN or infinite values: "
                "its weights are broken, or its dtype overflows (try float32)"
            )
        return self


def generate(
    net: Network,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """Images of `seeds` in order, from `net` on its parameters' device; options as for `launch`.

    `net` is called as `net(x, sigma, labels)` and has `img_resolution`, `img_channels` and `label_dim`; or it is a
    `OneStepFunction`, for the one-step sampler at its own noise level. Options are checked at once, not at the first
    batch: raises `ConfigError`. A batch with a value that is not finite raises `WeightsError`.
    """
    return (part.check() for part in launch(net, seeds, sampler, **options))


def launch(
    net: Network,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    *,
    batch: int = 64,
    class_index: int | None = None,
    generator_device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """As `generate`, but a GPU may still be computing the batches it yields: nothing waits, and no image is checked.

    At most `batch` images at a time, of `class_index` alone or of classes that seeds draw, on `generator_device`.
    """
    sampler = sampler or SamplerConfig()
    sampler.validate()
    if not isinstance(net, torch.nn.Module) and sampler.sampler != "one-step":
        raise ConfigError(f"a one-step generator takes only one step; give the network itself to {sampler.sampler!r}")
    if batch < 1:
        raise ConfigError(f"--batch must be at least 1, not {batch}")
    check_class(class_index, net.label_dim)
    return _batches(net, list(seeds), sampler, batch, class_index, generator_device)


def _batches(net, seeds, sampler, batch, class_index, generator_device) -> Iterator[Batch]:
    if not isinstance(net, torch.nn.Module):
        device = net.device
    else:
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        streams = SeedStreams(part, device, generator_device)
        with torch.no_grad():
            latents, labels = streams.start(shape, net.label_dim, class_index)
            images = sampler(net, streams, latents, labels)
            finite = images.isfinite().all()
        yield Batch(part, to_uint8(images), None if labels is None else labels.argmax(1), finite)


def to_host(batches: Iterator[Batch], ahead: int = 2) -> Iterator[Batch]:
    """The batches of `launch` in host memory, checked, while the GPU computes up to `ahead` more.

    Copies to pinned memory are queued after the images' computation; the host waits for each in its turn.
    """
    copies: deque[_HostCopy] = deque()
    for batch in batches:
        copies.append(_HostCopy(batch))
        if len(copies) > ahead:
            yield copies.popleft().wait()
    while copies:
        yield copies.popleft().wait()


class _HostCopy:
    """A batch on its way to the host."""

    def __init__(self, batch: Batch) -> None:
        self.event = None
        self.batch = batch
        if batch.images.is_cuda:
            tensors = (None if t is None else self._start(t) for t in batch[1:])
            self.batch = Batch(batch.seeds, *tensors)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(batch.images.device))

    @staticmethod
    def _start(t: torch.Tensor) -> torch.Tensor:
        # PyTorch reuses pinned memory for later batches once this one's is freed
        return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)

    def wait(self) -> Batch:
        if self.event is not None:
            self.event.synchronize()
        return self.batch.check()
