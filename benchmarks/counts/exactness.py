"""`python -m benchmarks.counts.exactness`: the engine's images against the plain network's, in levels of a byte.

Both make the same seeds from the same weights; the plain network computes in float32 and in the engine's compute type.
The numbers are the largest difference over all pixels, and the shares of values that differ at all and by more than
two levels. Without paths, it compares the bundled teacher.

The last line is the verdict. The status is 1 if the engine and the plain network of its compute type are further apart
than LIMITS allows in any of the comparisons.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.cli import command
from gdd_fast.device import full_float32
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.sampling.sampler import one_step
from gdd_fast.sampling.seeds import latents

TEACHER = Path(__file__).resolve().parents[2] / "gdd_fast" / "assets" / "teacher"
LIMITS = {"float32": 1, "bfloat16": 2, "float16": 2}
"""Levels of a byte that engine and plain network may differ by. In float32 it is one: a value that lies on the border
of two levels falls to either side, however small the difference."""


class Difference:
    """Differences in bytes: the largest, how many there are, and how many of more than two levels."""

    def __init__(self) -> None:
        self.largest = self.differing = self.visible = self.values = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        levels = (a.int() - b.int()).abs()
        self.largest = max(self.largest, int(levels.max()))
        self.differing += int(levels.count_nonzero())
        self.visible += int((levels > 2).count_nonzero())
        self.values += levels.numel()

    def __str__(self) -> str:
        share, visible = (100 * number / max(self.values, 1) for number in (self.differing, self.visible))
        return f"{self.largest:>3} levels, {share:6.2f} % of values, {visible:.4f} % by more than 2"


def batches(net: EDMPrecond, images: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    for start in range(0, images, batch):
        yield latents(range(start, min(start + batch, images)), shape, net.label_dim, device)


@torch.no_grad()
@full_float32()
def compare(generator: OneStepGenerator, images: int, batch: int) -> dict[str, Difference]:
    """Differences by name, over `images` seeds. float32 is computed in full, not in TF32."""
    net = generator.network.to(generator.device)
    own = net.dtype
    found = {name: Difference() for name in ("engine, plain", "engine, float32", "plain, float32")}
    try:
        for z, labels in batches(net, images, batch, generator.device):
            engine = to_uint8(generator.run(z, None if labels is None else labels.argmax(1)))
            net.dtype = generator.dtype
            plain = to_uint8(one_step(net, z, labels))
            net.dtype = torch.float32
            full = to_uint8(one_step(net, z, labels))
            for name, (a, b) in zip(found, ((engine, plain), (engine, full), (plain, full)), strict=True):
                found[name].add(a, b)
    finally:
        net.dtype = own
    return found


@command
@full_float32()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.exactness", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("nets", nargs="*", type=Path, default=[TEACHER], help=".pkl, network folder or run folder")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=LIMITS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.batch < 1:
        parser.error("--images and --batch must be at least 1")
    verdicts, exceeded = [], False
    for path in options.nets:
        for dtype in options.dtypes:
            generator = OneStepGenerator.from_pretrained(path, device=options.device, dtype=dtype)
            print(f"{path.name}, {dtype}, {options.images} images, engine {generator.engine} on {generator.device}")
            found = compare(generator, options.images, options.batch)
            for name, difference in found.items():
                print(f"    {name:<18}{difference}", flush=True)
            worst = found["engine, plain"].largest
            verdicts.append(f"{path.name} {dtype} {worst} of at most {LIMITS[dtype]}")
            exceeded |= worst > LIMITS[dtype]
    head = "NOT exact: engine and plain network differ by" if exceeded else "exact: engine and plain network differ by"
    print(f"{head} {', '.join(verdicts)} levels")
    if exceeded:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
