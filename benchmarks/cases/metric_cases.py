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
    """`full`: the batch that evaluating uses instead of the smallest one."""
    batch = 64 if full else 2
    return [Case("Inception features", f"3x32² batch {batch}", partial(_features, batch))]


def _features(batch: int, device: torch.device) -> Bench:
    """FID's Inception with random weights, bytes to 2,048 features, beside torch-fidelity's."""
    from gdd_fast.metrics.features.inception import InceptionFeatures, InceptionV3

    torch.manual_seed(0)
    network = InceptionV3()
    for parent, conv, _ in network.conv_norms():
        weight = parent.get_submodule(conv).weight
        weight.data.normal_(std=(2 / weight[0].numel()) ** 0.5)
    weights = network.state_dict()
    images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    ours = InceptionFeatures(weights, device=device)
    closeness = Closeness([ours(images)], 1e-3)

    def official() -> Call:
        package("torchvision")
        module = package("torch_fidelity.feature_extractor_inceptionv3")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pth"
            torch.save(weights, path)
            theirs = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            ).to(device)

        def call() -> list[Tensor]:
            with torch.no_grad():
                return [theirs(images)[0]]

        return call

    return Bench({"official": official, "gdd_fast": lambda: lambda: [ours(images)]}, closeness.check, images=batch)
