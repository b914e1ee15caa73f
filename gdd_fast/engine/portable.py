"""A one-step generator as a file that runs without gdd_fast: ONNX, or a torch.export program.

The file holds one function,

    latents float32 (N, C, H, W), standard normal [, classes int64 (N,)]  ->  images float32 (N, C, H, W), about -1 to 1

for any N: the network folded at its noise level (`gdd_fast.engine.fold`), in PyTorch's or ONNX's own operators. With
float16, weights and activations are float16, while inputs, outputs and the statistics of norms stay float32.

A file is compared with the network before it is moved into place: one that computes something else is not kept.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gdd_fast.device import full_float32
from gdd_fast.engine.fold_unet2d import for_any_batch
from gdd_fast.engine.one_step import OneStepGenerator, check_finite
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.files import atomic_write
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ops.resample2d import resample2d_ref
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.sampling.sampler import one_step
from gdd_fast.sampling.seeds import SeedStreams

Precision = Literal["float32", "float16"]
SUFFIXES = (".onnx", ".pt2")
ALLOWED_LEVELS: dict[Precision, int] = {"float32": 1, "float16": 16}
"""How many levels a pixel may be from the network's in float32. A value between two levels may round to either; at
edges, float16's rounding moves a trained network's pixels by a few levels (docs/one_step.md)."""
_BATCH = 16

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Difference:
    """How far a file is from its network: the largest difference in `images` images, in the range -1 to 1 (`worst`) and
    in levels of 0 to 255 (`levels`)."""

    images: int
    worst: float
    levels: int

    def __str__(self) -> str:
        return (
            f"{self.images} images differ from the network's in float32 by at most {self.worst:.2g} "
            f"({self.levels} of 255 levels)"
        )


class OneStepFunction(nn.Module):
    """The folded network and its table of classes as one module."""

    def __init__(self, generator: OneStepGenerator) -> None:
        super().__init__()
        self.folded = generator.folded
        if generator.conditioning is not None:
            self.table = nn.Buffer(generator.conditioning.table)  # type: ignore[arg-type]

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Tensor:
        """The function of this module's docstring; `classes` only for a network with classes."""
        return self.folded(latents, None if classes is None else self.table.index_select(0, classes))


def write_portable(
    net: Preconditioned, path: str | Path, *, dtype: Precision = "float32", sigma: float | None = None, images: int = 64
) -> Difference:
    """Write `net` to `path`, an ONNX file (.onnx) or a torch.export program (.pt2), and compare it with the network.

    Args:
        net: a network of gdd_fast on any device; not changed.
        dtype: what the file computes in and stores its weights in.
        sigma: the noise level of the one evaluation; by default the network's own.
        images: how many images to compare, from seed 0 on; at least 1.

    Returns:
        How far the file's images are from the network's in float32. If that is more than `ALLOWED_LEVELS`, nothing is
        written, and what was at `path` stays.

    Raises:
        ConfigError: an invalid suffix, dtype, sigma or number of images, or a missing library.
        WeightsError: the file's images are too far from the network's, or either returns values that are not finite.
    """
    path = Path(path)
    check_portable(path, dtype)
    if images < 1:
        raise ConfigError(f"images must be at least 1, not {images}")
    sigma = net.sigma_init if sigma is None else sigma
    program = trace(net, dtype, sigma)
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".onnx":
            write_onnx(program, temporary, {"sigma": str(sigma), "dtype": dtype, "classes": str(net.label_dim)})
        else:
            archive = io.BytesIO()  # PyTorch's own file writer kills the process if the disk is full
            with _torch_warns_of_itself():
                torch.export.save(program, archive)
            temporary.write_bytes(archive.getbuffer())
        difference = compare(net, open_portable(temporary), sigma=sigma, images=images)
        if difference.levels > ALLOWED_LEVELS[dtype]:
            advice = "" if dtype == "float32" else "; export it as float32"
            raise WeightsError(
                f"{path.name} was not written: {difference}, more than rounding in {dtype} explains{advice}"
            )
    return difference


def check_portable(path: Path, dtype: str) -> None:
    """Raise ConfigError for a suffix, dtype or missing library with which `write_portable` would fail."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: an exported generator is a file that ends in {' or '.join(SUFFIXES)}")
    if dtype not in get_args(Precision):
        raise ConfigError(f"a generator is exported as {' or '.join(get_args(Precision))}, not {dtype!r:.100}")
    if path.suffix.lower() == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(f"an ONNX file needs {error.name}: pip install 'gdd_fast[export]'") from error


@torch.no_grad()
def trace(net: Preconditioned, dtype: Precision = "float32", sigma: float | None = None) -> ExportedProgram:
    """The folded network as a program of PyTorch's own operators, for any number of images."""
    # nothing fused or in place
    generator = OneStepGenerator.from_network(
        net, device="cpu", dtype=dtype, engine="compile", backend="torch", sigma=sigma
    )
    for_any_batch(generator.folded)
    function = OneStepFunction(generator).eval()
    latents = torch.zeros(2, net.img_channels, net.img_resolution, net.img_resolution)
    inputs = (latents, torch.zeros(2, dtype=torch.int64)) if net.label_dim else (latents,)
    batch = torch.export.Dim("batch", min=1)
    with _torch_warns_of_itself():
        program = torch.export.export(function, inputs, dynamic_shapes=_shapes(batch, len(inputs)))
        program = program.run_decompositions({torch.ops.gdd_fast.resample2d.default: _resample2d})
    foreign = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("gdd_fast")}
    assert not foreign, foreign  # an operator of ours that lacks an entry above
    return program


def _shapes(batch: torch.export.Dim, inputs: int) -> dict[str, dict[int, torch.export.Dim] | None]:
    return {"latents": {0: batch}, **({"classes": {0: batch}} if inputs == 2 else {})}


def _resample2d(x, kernel, add, up, padding, height, width, gain, scale, box, implementation) -> Tensor:
    return resample2d_ref(x, kernel, up=up, padding=padding, add=add, scale=scale, box=box)


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Write one file, weights included, in operators of ONNX's default set. `metadata` goes into its properties."""
    names = ["latents", "classes"][: len(program.graph_signature.user_inputs)]
    with _torch_warns_of_itself():
        exported = torch.onnx.export(
            program, dynamo=True, optimize=True, verbose=False, input_names=names, output_names=["images"]
        )
    assert exported is not None  # true with dynamo=True
    exported.model.metadata_props.update({"format": "gdd_fast.one_step", **metadata})
    exported.save(path, external_data=False)


def open_portable(path: str | Path) -> Function:
    """The function in an .onnx or .pt2 file, on the CPU; its tensors are those of this module's docstring."""
    path = Path(path)
    if path.suffix.lower() == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(latents: Tensor, classes: Tensor | None = None) -> Tensor:
        feed = {"latents": latents.numpy()} | ({} if classes is None else {"classes": classes.numpy()})
        return torch.from_numpy(session.run(["images"], feed)[0])

    return run


@torch.no_grad()
@full_float32()
def compare(net: Preconditioned, function: Function, *, sigma: float | None = None, images: int = 64) -> Difference:
    """`function` against `net` in float32, on the images from seed 0 on. Raises WeightsError on NaN or infinities."""
    own, device = net.dtype, next(net.parameters()).device
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    worst, levels = 0.0, 0
    net.dtype = torch.float32
    try:
        for start in range(0, images, _BATCH):
            seeds = range(start, min(start + _BATCH, images))
            streams = SeedStreams(seeds)
            latents = streams.normal(shape)
            classes = streams.integers(net.label_dim) if net.label_dim else None
            labels = None if classes is None else nn.functional.one_hot(classes, net.label_dim).float().to(device)
            expected = check_finite(one_step(net, latents.to(device), labels, sigma)).cpu()
            found = check_finite(function(latents) if classes is None else function(latents, classes))
            worst = max(worst, float((found - expected).abs().max()))
            bytes_apart = to_uint8(found).int() - to_uint8(expected).int()
            levels = max(levels, int(bytes_apart.abs().max()))
    finally:
        net.dtype = own
    return Difference(images, worst, levels)


@contextmanager
def _torch_warns_of_itself() -> Iterator[None]:
    """Suppress warnings of PyTorch's exporter about its own use of PyTorch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*treespec.*", FutureWarning)
        # raised for weights in channels_last, though they do fill their memory
        warnings.filterwarnings("ignore", "No complete tensor", UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
