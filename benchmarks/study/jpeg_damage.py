"""How far a JPEG copy of CIFAR-10 is from the photographs themselves, at 32x32 and reduced to 16x16.

    python -m benchmarks.study.jpeg_damage --assets FOLDER

The assets hold the whole set as JPEG and some thousand images exactly. Each exact image is paired with the copy that is
nearest to it; what remains between the two is JPEG's doing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from gdd_fast.cli import command
from gdd_fast.data.dataset import open_dataset
from gdd_fast.metrics.features import FeatureExtractor, build_extractor
from gdd_fast.metrics.frechet import Statistics, frechet_distance

LOSSLESS = "cifar10-lossless-partial.npz"
COPY = "cifar10-jpeg-32x32-{split}.zip"
_LOOK_SIZE = 8  # pixels at which copies are looked for


def measure(exact: Tensor, copies: Tensor, judge: FeatureExtractor) -> dict[str, dict[str, float]]:
    """Between uint8 images (N, 3, 32, 32) and their copies, at 32 and at 16 pixels.

    `rmse`: in gray levels of 255. `share`: of the images' variance about their own means, in percent, that the error
    is. `frechet`: distance of the two sets by `judge`.
    """
    found = {}
    for size in (32, 16):
        a, b = (_reduced(images, size) for images in (exact, copies))
        error = (a.double() - b.double()).square().mean()
        variance = (a.double() - a.double().mean(dim=(2, 3), keepdim=True)).square().mean()
        found[str(size)] = {
            "rmse": float(error.sqrt()),
            "share": float(100 * error / variance),
            "frechet": frechet_distance(*(_statistics(images, judge) for images in (a, b))),
        }
    return found


def pair(exact: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the copy nearest to each image, and the share of pairs whose two are each other's nearest."""
    a, b = (adaptive_avg_pool2d(images.float(), _LOOK_SIZE).flatten(1) for images in (exact, copies))
    nearest = torch.cat([torch.cdist(part, b).argmin(1) for part in a.split(500)])
    back = torch.cdist(b[nearest], a).argmin(1) if len(a) <= 6000 else torch.arange(len(a))
    return nearest, (back == torch.arange(len(a))).double().mean()


def _reduced(images: Tensor, size: int) -> Tensor:
    """As `gdd_fast.prepare --filter box` does: means of whole blocks, rounded."""
    factor = images.shape[-1] // size
    return images if factor == 1 else avg_pool2d(images.float(), factor).round().to(torch.uint8)


def _statistics(images: Tensor, judge: FeatureExtractor) -> Statistics:
    features = torch.cat([judge(part) for part in images.split(64)])
    found = Statistics(features.shape[1], judge.name)
    found.update(features)
    return found


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.study.jpeg_damage", description=__doc__)
    options.add_argument("--assets", type=Path, required=True)
    options.add_argument("--split", choices=("train", "test"), default="train")
    asked = options.parse_args(arguments)
    with np.load(asked.assets / LOSSLESS) as arrays:
        exact = torch.from_numpy(arrays[f"{asked.split}_x"]).permute(0, 3, 1, 2).contiguous()
    copies = open_dataset(asked.assets / COPY.format(split=asked.split))
    pixels = torch.from_numpy(np.stack([copies.image(index) for index in range(len(copies))]))
    nearest, mutual = pair(exact, pixels)
    found = measure(exact, pixels[nearest], build_extractor("resnet56"))
    print(json.dumps({"images": len(exact), "mutual": float(mutual), **found}))


if __name__ == "__main__":
    main()
