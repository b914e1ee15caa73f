"""Cases of what surrounds the networks: images from and to disk, and metrics."""

import io
import math
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.case import Bench, Case
from benchmarks.harness.checks import FACTOR, Closeness, MismatchError
from benchmarks.harness.operator_case import package
from benchmarks.harness.timing import Call
from benchmarks.peers import networks as peers
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator
from gdd_fast.sampling.sampler import one_step

_COMPARED = 16
_PUBLIC_WORKERS = 1
"""Loader processes: what the public training command starts unless told otherwise (`--workers`)."""


def pipeline_cases(full: bool) -> list[Case]:
    """`full`: NCSN++ 32 instead of the demo's network, 2048 features instead of 256, more images."""
    network, images, dim = ("ncsnpp-32", 1024, 2048) if full else ("demo", 64, 256)
    shown, batch = (64, 32) if full else (16, 8)
    return [
        Case("sampling to disk", f"{network} {images} images", partial(_sampling, network, images)),
        Case("data path", f"zip of PNG 3x32² batch {images}", partial(_data, images)),
        Case("Frechet distance", f"{dim} features", partial(_distance, dim)),
        Case("Inception features", f"{shown} images 3x32² batch {batch}", partial(_features, shown, batch)),
    ]


def _sampling(network: str, count: int, device: torch.device) -> Bench:
    """Seeds to PNGs: ours as `python -m gdd_fast.sample` does it, the others with the network of plain PyTorch."""
    package("PIL.Image")  # reads what was written
    from gdd_fast.engine.one_step import OneStepGenerator
    from gdd_fast.sampling.generate import launch, to_host
    from gdd_fast.sampling.resume import reserve
    from gdd_fast.sampling.seeds import SeedStreams

    net = peers.make_generator(network, device).requires_grad_(False)
    dtype = _half(device)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    seeds, batch = list(range(count)), min(count, 256)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)

    def images_of(model: torch.nn.Module, part: list[int]) -> Tensor:
        """uint8 (N, H, W, C), as the public code makes them of a seed's latent."""
        with torch.no_grad():
            z, labels = SeedStreams(part, device).start(shape, net.label_dim, None)
            return (one_step(model, z, labels) * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def one_by_one(model: torch.nn.Module, name: str) -> Path:
        """One image after the other through PIL to a file of its own, between batches."""
        from PIL import Image

        path = root / name
        path.mkdir(exist_ok=True)
        for start in range(0, count, batch):
            part = seeds[start : start + batch]
            for seed, image in zip(part, images_of(model, part).cpu().numpy(), strict=True):
                Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(path / f"{seed:06d}.png")
        return path

    def official() -> Call:
        model = StockGenerator(net, OFFICIAL, dtype)
        return peers.under_tf32(lambda: one_by_one(model, "official"), False)

    def stock() -> Call:
        model = peers.stock_generator(net, BEST, dtype)
        return peers.under_tf32(lambda: one_by_one(model, "stock"), True)

    def ours(own: torch.dtype) -> Call:
        generator = OneStepGenerator.from_network(net, device=device, dtype=own)
        path = root / "ours.zip"

        def call() -> Path:
            path.unlink(missing_ok=True)
            with reserve(path) as output, output.writer(seeds, {"network": network}) as writer:
                for part in to_host(launch(generator, seeds, batch=batch)):
                    writer.put(part.seeds, part.images, part.classes)
            return path

        return call

    few = seeds[:_COMPARED]
    with peers.tf32(False, trials=True):
        expected = images_of(StockGenerator(net, OFFICIAL, torch.float32), few).float()
        eager = images_of(StockGenerator(net, BEST, dtype), few).float()
    # of 256 levels, on average; rounding to bytes alone may move a level
    limit = 0.05 + FACTOR * float((eager - expected).abs().mean())

    def check(path: Path) -> None:
        found = read_images(path)
        if len(found) != count:
            raise MismatchError(f"{len(found)} of {count} images")
        images = torch.from_numpy(np.stack(found[: len(few)])).reshape(expected.shape).float().to(device)
        error = float((images - expected).abs().mean())
        if not error <= limit:
            raise MismatchError(f"off by {error:.3g} levels on average, and at most {limit:.3g} are allowed")

    makers = {"official": official, "stock": stock, "gdd_fast": partial(ours, dtype)}
    if dtype != torch.float32:  # in which trained networks are exported, and the command samples unless told otherwise
        makers["gdd_fast defaults"] = partial(ours, torch.float32)
    return Bench(makers, check, images=count, counts_memory=False, keep=folder)


def _half(device: torch.device) -> torch.dtype:
    """What a device samples faster in than in float32, if anything."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def read_images(path: Path) -> list[np.ndarray]:
    """The PNGs of a zip or a folder, by name."""
    from PIL import Image

    if path.is_dir():
        return [np.asarray(Image.open(name)) for name in sorted(path.rglob("*.png"))]
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]


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


def _data(batch: int, device: torch.device) -> Bench:
    package("PIL.Image")  # writes what is read
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
        """As public code reads it: one PIL image an item; each loader process opens the file once."""

        def __init__(self) -> None:
            self.archive: zipfile.ZipFile | None = None
            with zipfile.ZipFile(path) as archive:
                self.names = sorted(name for name in archive.namelist() if name.endswith(".png"))

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, index: int) -> np.ndarray:
            from PIL import Image

            self.archive = self.archive or zipfile.ZipFile(path)
            return np.array(Image.open(io.BytesIO(self.archive.read(self.names[index])))).transpose(2, 0, 1)

    def official() -> Call:
        dataset, order = Zip(), np.random.default_rng(0)

        def endless() -> Iterator[int]:
            while True:
                yield from order.permutation(len(dataset)).tolist()

        options = {"num_workers": _PUBLIC_WORKERS, "prefetch_factor": 2, "pin_memory": device.type == "cuda"}
        batches = iter(torch.utils.data.DataLoader(dataset, batch, sampler=endless(), **options))
        return lambda: next(batches).to(device)

    def check(images: Tensor) -> None:
        if images.shape != (batch, 3, 32, 32) or images.dtype != torch.uint8 or images.device.type != device.type:
            raise MismatchError(f"a batch of {images.dtype} {tuple(images.shape)} on {images.device}")
        if not bool((images[:, :, ::4, ::4] == images[:, :, 3::4, 3::4]).all()):
            raise MismatchError("the images are not those of the file")

    ours = {"gdd_fast streamed": partial(stream, 0), "gdd_fast in memory": partial(stream, 1 << 30)}
    return Bench({"official": official, **ours}, check, images=batch, counts_memory=False, keep=folder)


def _features(count: int, batch: int, device: torch.device) -> Bench:
    """The loop that gathers a population, bytes to 2,048 features, beside torch-fidelity's own loop.

    On the published weights if they are at hand, else on random ones, which take as long.
    """
    from gdd_fast.metrics.features.inception import InceptionFeatures
    from gdd_fast.metrics.population import Needs, gather

    weights = _weights()
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = InceptionFeatures(weights, device=device)

    def gathered() -> list[Tensor]:
        return [gather(images.split(batch), [ours], [Needs(statistics=False, rows=True)])[0].rows]

    closeness = Closeness(gathered(), 1e-3)

    def fidelity() -> Call:
        package("torchvision")
        module = package("torch_fidelity.feature_extractor_inceptionv3")
        loop = package("torch_fidelity.utils").get_featuresdict_from_dataset
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pth"
            torch.save(weights, path)
            theirs = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            ).to(device)
        data = torch.utils.data.Subset(images, range(count))  # a Dataset is asked for
        # without loader processes (`save_cpu_ram`): the images are in memory, and the CPU time is that of one process
        return lambda: [loop(data, theirs, batch, device.type == "cuda", True, False)["2048"].to(device)]

    return Bench({"torch-fidelity": fidelity, "gdd_fast": lambda: gathered}, closeness.check, images=count)


def _weights() -> dict[str, Tensor]:
    from gdd_fast.errors import WeightsError
    from gdd_fast.metrics.features.inception import FILE, InceptionV3, canonical

    try:
        # torch-fidelity takes whole networks alone, and files may lack the classifier, which no feature depends on
        return {**InceptionV3().state_dict(), **canonical(FILE.read(None))}
    except WeightsError:
        torch.manual_seed(0)
        network = InceptionV3()
        for parent, conv, _ in network.conv_norms():
            weight = parent.get_submodule(conv).weight
            weight.data.normal_(std=(2 / weight[0].numel()) ** 0.5)
        return network.state_dict()
