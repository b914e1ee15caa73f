"""`python -m benchmarks.reports.accelerated [NAME ...]`: frozen networks of timm, plain and by `gdd_fast.accelerate`.

Forward and backward into the images, as a discriminator's features are used in a G step. The two take their turns in
alternation, in processor time of the threads that `OMP_NUM_THREADS` gives, so that a machine whose speed drifts slows
both; the ratio is the median of the pairs'. Weights are random: what is computed does not depend on them.
"""

import argparse
import copy
import statistics
import sys
import time

import torch
from torch import Tensor, nn

import gdd_fast
from benchmarks.harness.case import UnavailableError
from benchmarks.harness.operator_case import package

NETWORKS = ("resnet18", "resnet50", "vgg11_bn", "mobilenetv2_100", "tf_efficientnet_lite0", "convnext_atto")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def seconds(net: nn.Module, x: Tensor) -> float:
    """Processor time of one forward and backward into x (N, 3, H, W)."""
    x.grad = None
    began = time.process_time()
    net(x).sum().backward()
    return time.process_time() - began


def compare(name: str, layout: str, batch: int, size: int, rounds: int) -> str:
    """A row of the table."""
    plain = package("timm").create_model(name).eval().requires_grad_(False).to(memory_format=LAYOUTS[layout])
    fast = gdd_fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    pairs = [(seconds(plain, x), seconds(fast, x)) for _ in range(rounds + 1)][1:]
    least = [1e3 * min(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(ours / stock for stock, ours in pairs)
    return f"| {name} | {layout} | {least[0]:.1f} | {least[1]:.1f} | {ratio:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reports.accelerated", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("names", nargs="*", default=NETWORKS, help="names of timm.create_model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if min(options.batch, options.size, options.rounds) < 1:
        parser.error("--batch, --size and --rounds must be at least 1")
    try:
        unknown = set(options.names) - set(package("timm").list_models())
    except UnavailableError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"timm has no {', '.join(sorted(unknown))}")
    print("| network | memory format | plain, ms | accelerated, ms | ratio |\n|---|---|---|---|---|")
    for name in options.names:
        for layout in LAYOUTS:
            print(compare(name, layout, options.batch, options.size, options.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
