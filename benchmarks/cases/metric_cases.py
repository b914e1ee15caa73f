"""Cases of metrics: features of images, beside the tool that most of the field extracts them with."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.case import Bench, Case
from benchmarks.harness.checks import Closeness
from benchmarks.harness.operator_case import package
from benchmarks.harness.timing import Call


def metric_cases(full: bool) -> list[Case]:
    """`full`: more images than a check needs."""
    images, batch = (64, 32) if full else (16, 8)
    return [Case("Inception features", f"{images} images 3x32² batch {batch}", partial(_features, images, batch))]


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
        data = _Images(images)
        # without loader processes (`save_cpu_ram`): the images are in memory, and the CPU time is that of one process
        return lambda: [loop(data, theirs, batch, device.type == "cuda", True, False)["2048"].to(device)]

    return Bench({"torch-fidelity": fidelity, "gdd_fast": lambda: gathered}, closeness.check, images=count)


class _Images(torch.utils.data.Dataset):
    """One uint8 image (3, H, W) an item, as torch-fidelity asks for."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


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
