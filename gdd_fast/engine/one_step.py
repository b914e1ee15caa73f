"""`OneStepGenerator`: a trained generator as a function from seeds to images, made fast once and called often.

    generator = OneStepGenerator.from_pretrained("run", device="cuda", dtype="bfloat16")
    images = generator(16, seeds=range(16))             # uint8 (16, H, W, 3)

A GDD generator is evaluated at one noise level, so most of its conditioning is constant: `fold` takes it out of the
network once. The rest runs under one of three engines:

    "eager"     operator after operator
    "compile"   torch.compile of the folded network
    "graph"     CUDA graphs, one per batch size, so that a small batch does not wait for the host

Seeds: up to rounding, image i depends on seeds[i] and labels[i] alone, not on the batch size or on how seeds are split
over processes. The order of draws is EDM's (Karras et al., arXiv 2206.00364): one generator per seed, latent before
label.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gdd_fast.backend import Backend, resolve
from gdd_fast.engine.engines import Engine, Finish, choose_engine, make_engine
from gdd_fast.engine.fold import chosen, fold, make_target
from gdd_fast.engine.winograd_memory import DEFAULT_MEMORY, limit_winograd
from gdd_fast.errors import ConfigError, InputError, WeightsError
from gdd_fast.interop import hub
from gdd_fast.models.precond import compute_dtype
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.sampling.seeds import SeedStreams

Labels = int | Sequence[int] | Tensor
Output = Literal["uint8", "float"]


class OneStepGenerator:
    """Generates images in one evaluation of a network, on one device and in one compute dtype.

    It holds the weights that the network had when the generator was made: make another if they change. It can be
    copied, pickled and sent to another process, which captures or compiles for itself.

    Attributes:
        network: the plain network it was made from, which is read once and not changed; on the CPU after
        `from_pretrained`.
        img_resolution, img_channels, label_dim: side in pixels and channels of the images, number of classes (0: none).
        dtype, device: what it computes in, and where.
        engine: "eager", "compile" or "graph", with "auto" resolved.
        folded, conditioning: the module that runs, and the one that makes its rows (None without classes); see `fold`.
    """

    def __init__(
        self,
        network: Preconditioned,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        engine: Engine = "auto",
        backend: Backend = "auto",
        sigma: float | None = None,
        winograd_memory: float = DEFAULT_MEMORY,
    ) -> None:
        """A generator with the current weights of `network`, which is not changed, and kept as `.network`.

        By default it has the network's device and compute dtype. `sigma` is the noise level of the one evaluation, by
        default the network's `sigma_init`. Other arguments and errors are as in `from_pretrained`; also raises
        InputError if `network` is not one of gdd_fast's.
        """
        if not winograd_memory >= 0:
            raise ConfigError(f"winograd_memory must be 0 or more, not {winograd_memory}")
        if not isinstance(network, Preconditioned):
            raise InputError(
                f"a OneStepGenerator takes a network of gdd_fast, not {type(network).__name__}: load one with "
                "gdd_fast.load_generator, or make this one faster with gdd_fast.accelerate"
            )
        own = next((p.device for p in network.parameters()), torch.device("cpu"))
        self.network = network
        self.device = _device(own if device is None else device)
        self.dtype = network.dtype if dtype is None else compute_dtype(dtype)
        self.img_resolution: int = network.img_resolution
        self.img_channels: int = network.img_channels
        self.label_dim: int = network.label_dim
        self.engine = choose_engine(engine, self.device)
        # graphs are captured in full fp32, the other engines follow the process
        tf32 = self.engine != "graph" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        target = make_target(self.device, self.dtype, backend, traced=self.engine == "compile", tf32=tf32)
        self._chosen = chosen(target)
        with torch.autocast("cpu", enabled=False):
            self.folded, self.conditioning = fold(network, target, network.sigma_init if sigma is None else sigma)
            if target.winograd:
                limit_winograd(self.folded, self.img_channels, self.img_resolution, winograd_memory)
        self._run = make_engine(self.engine, self.folded, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.device = _device(self.device)  # this process may not have it
        for implemented, backend in self._chosen.items():  # nor these implementations
            resolve(backend, implemented, self.device.type)
        self._run = make_engine(self.engine, self.folded, self.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        engine: Engine = "auto",
        backend: Backend = "auto",
        winograd_memory: float = DEFAULT_MEMORY,
        **hub_options: Any,
    ) -> "OneStepGenerator":
        """A generator from an EDM or GDD .pkl, a network folder, a training run folder (its EMA generator), or a
        repository of the Hugging Face Hub that holds a network folder, such as "user/name".

        Args:
            path: a local path, or a repository's name if no such path exists.
            device: where to compute; by default a GPU if there is one.
            dtype: what to compute in: float32, bfloat16 or float16; by default what the network was saved with. On a
            GPU, choose float16 as half precision if images have to match float32's: a trained generator's stay within 2
            of 255 levels; in bfloat16 some 0.3 % of values do not, in the plain network either (counted on a CPU,
            docs/one_step.md).
            engine: "auto", "eager", "compile" or "graph"; "auto" is "graph" on a GPU and "eager" elsewhere.
            backend: of the fused operators, see gdd_fast.backend.
            winograd_memory: on a CPU, the most memory that weights transformed for Winograd's method may take, as a
            multiple of all convolution weights in float32. More is faster, up to 4; 0 disables the method.
            hub_options: revision, token, cache_dir, force_download, local_files_only, as for `hf_hub_download`.

        Raises:
            WeightsError: there is no network at `path` or in the repository, the Hub cannot be reached, or the network
                is broken.
            ConfigError: an unknown dtype, device or engine, or a negative winograd_memory.
            BackendError: an engine or backend requested by name cannot run here.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        net = hub.from_pretrained(path, **hub_options)
        return cls(net, device=device, dtype=dtype, engine=engine, backend=backend, winograd_memory=winograd_memory)

    @classmethod
    def from_network(cls, net: Preconditioned, **options: Any) -> "OneStepGenerator":
        """The constructor, under a name that matches `from_pretrained`."""
        return cls(net, **options)

    def __call__(
        self,
        n: int,
        labels: Labels | None = None,
        seeds: Sequence[int] | None = None,
        *,
        output: Output = "uint8",
        generator: torch.Generator | None = None,
        generator_device: torch.device | str = "cpu",
        latents: Tensor | None = None,
    ) -> Tensor:
        """Generate `n` images: uint8 (n, H, W, C) or, with `output="float"`, float32 (n, H, W, C), about -1 to 1.

        Args:
            n: how many, computed as one batch.
            labels: one class for all, n classes, or one-hot or soft labels float (n, label_dim); None draws classes.
            seeds: n seeds; the image of a seed does not depend on the others.
            output: "uint8" or "float".
            generator: draws the whole batch at once, latents before labels, which is faster than seeds. Without seeds,
            generator and latents, the device's default generator of torch is used in the same way.
            generator_device: where seeds draw. With "cpu" a seed gives the same image on every machine; with "cuda",
            the image that EDM's own code gives on a GPU.
            latents: standard normal numbers, float32 (n, C, H, W), to make the images from; if the network has classes,
            labels must be given too.

        Raises:
            InputError: arguments that do not fit together or do not fit the network.
            WeightsError: the network returns values that are not finite.
        """
        if output not in get_args(Output):
            raise InputError(f"output must be 'uint8' or 'float', not {output!r}")
        own = labels is None
        if latents is None:
            latents, drawn = self.draw(n, seeds, generator, generator_device)
            labels = drawn if own else labels
        elif seeds is not None or generator is not None or len(latents) != n or (own and self.label_dim):
            raise InputError(f"give {n} latents, with labels if there are classes, instead of seeds or a generator")
        finish = _as_bytes if output == "uint8" else _as_floats
        images, finite = self._run_on(latents, labels, not own, finish)
        require_finite(finite)
        return images

    def draw(
        self,
        n: int,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        generator_device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor | None]:
        """Latents float32 (n, C, H, W) and classes int64 (n,), or None without classes, as `__call__` draws them."""
        number = _whole(n)
        if number is None or number < 0:
            raise InputError(f"n must be a whole number of images, not {n!r:.100}")
        n = number
        shape = (self.img_channels, self.img_resolution, self.img_resolution)
        if seeds is not None:
            if generator is not None:
                raise InputError("give seeds or a generator, not both")
            seeds = _seeds(seeds)
            if len(seeds) != n:
                raise InputError(f"{n} images need {n} seeds, not {len(seeds)}")
            streams = SeedStreams(seeds, self.device, _device(generator_device))
            latents = streams.normal(shape)
            return latents, streams.integers(self.label_dim) if self.label_dim else None
        device = self.device if generator is None else generator.device
        latents = torch.randn((n, *shape), generator=generator, device=device)
        classes = None
        if self.label_dim:
            classes = torch.randint(self.label_dim, (n,), generator=generator, device=device).to(self.device)
        return latents.to(self.device), classes

    def run(self, latents: Tensor, labels: Labels | None = None, *, check_classes: bool = True) -> Tensor:
        """Images float32 (N, C, H, W) from standard normal latents float32 (N, C, H, W), neither clipped nor checked.

        `labels` as in `__call__`, except that None means zeros, "no class", as in the plain network. The caller owns
        the result: no later call writes to it. Autocast has no effect. Raises InputError as `__call__`.

        Checking that classes are in range means reading them, which waits for the GPU if they are there.
        `check_classes=False` skips the check, for classes known to be in range; others then fail on the device.
        """
        return self._run_on(latents, labels, check_classes, None)

    def _run_on(self, latents: Tensor, labels: Labels | None, check_classes: bool, finish: Finish | None) -> Any:
        """`run`, or what `finish` makes of its images as part of the evaluation."""
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
            raise InputError(f"latents must be (N, {', '.join(map(str, expected))}), not {tuple(latents.shape)}")
        labels = self._labels(labels, len(latents), check_classes)
        latents = latents.to(self.device, torch.float32)
        if not len(latents):
            return latents if finish is None else finish(latents)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._evaluate(latents, labels, finish)

    def _evaluate(self, latents: Tensor, labels: Tensor | None, finish: Finish | None = None) -> Any:
        """Images from latents and the result of `_labels`."""
        return self._run(latents, None if self.conditioning is None else self.conditioning(labels), finish)

    def _labels(self, labels: Labels | None, n: int, check_classes: bool) -> Tensor | None:
        """Classes int64 (n,) or soft labels float32 (n, label_dim) on the device; None if there are no classes."""
        if self.label_dim == 0:
            if labels is None or (isinstance(labels, Tensor) and labels.shape[-1:] == (0,)):
                return None
            raise InputError("the network has no classes: leave labels out")
        if labels is None:
            return torch.zeros(n, self.label_dim, device=self.device)
        if not isinstance(labels, Tensor) and (label := _whole(labels)) is not None:
            labels = [label] * n
        try:
            labels = torch.as_tensor(labels)  # not moved yet: labels on the host are checked there
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"labels must be class numbers, not {labels!r:.100}") from error
        if labels.is_floating_point() and tuple(labels.shape) == (n, self.label_dim):
            return labels.to(self.device).float()
        whole = not (labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex())
        if not whole or tuple(labels.shape) != (n,):
            raise InputError(
                f"labels must be a class, {n} classes, or floating ({n}, {self.label_dim}); "
                f"not {labels.dtype} {tuple(labels.shape)}"
            )
        if check_classes and n and not bool(((labels >= 0) & (labels < self.label_dim)).all()):
            raise InputError(f"classes are 0 to {self.label_dim - 1}, not {labels.tolist()}")
        return labels.to(self.device).long()


def _as_bytes(images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (N, H, W, C), and whether all values were finite, which bytes cannot show."""
    return to_uint8(images), images.isfinite().all()


def _as_floats(images: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (N, H, W, C), and whether all are finite."""
    return images.permute(0, 2, 3, 1).contiguous(), images.isfinite().all()


def check_finite(images: Tensor) -> Tensor:
    """Return `images`; raise WeightsError if a value is not finite. Waits for the device."""
    require_finite(images.isfinite().all())
    return images


def require_finite(finite: Tensor) -> None:
    """Raise WeightsError unless `finite`, bool (), is true. Waits for the device."""
    if not bool(finite):
        raise WeightsError(
            "the network's output holds NaN or infinite values: its weights are broken, or its dtype overflows "
            "(try bfloat16 or float32)"
        )


def _device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is unknown to PyTorch: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device}: there is no usable CUDA device; use cpu")
    # with its index: "cuda" alone can mean different devices in different threads
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device {device}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
    return torch.device("cuda", index)


def _whole(value: Any) -> int | None:
    """A whole number of Python, NumPy or PyTorch as an int; None for anything else, booleans included."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def _seeds(seeds: Sequence[int]) -> list[int]:
    try:
        numbers = [_whole(seed) for seed in seeds]
    except TypeError:
        numbers = [None]
    whole = [number for number in numbers if number is not None]
    if len(whole) < len(numbers):
        raise InputError(f"seeds must be a sequence of whole numbers, such as range(16), not {seeds!r:.100}")
    return whole
