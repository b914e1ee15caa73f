"""`python -m benchmarks.reports.predictions`: images/s on GPUs that nobody has measured here, to be held against them.

Writes the table in docs/roofline.md: a prediction, no measurement. FLOP, bytes, kernels and operators are counted
(benchmarks/counts/step_kernels.py); the rest is assumed:

- A matrix product runs at ATTAINED of the data sheet's dense rate for its type, on the multiprocessors that its results
  fill in tiles of TILE x TILE; a weight's gradient fills all. The time of a kernel is that, or its bytes at
  ATTAINED["memory"] of the bandwidth, or LAUNCH, whichever is longest. Kernels do not overlap.
- The host needs HOST per dispatched operator, ours or PyTorch's, and works ahead of the device: an eager iteration
  takes the longer of the two times. HOST is from an iteration of 5,000 operators in 100 ms; the counts here include
  views, so eager rows that the host bounds are pessimistic. A graph takes the device's time alone.
- Adam and the average move OPTIMIZER bytes per trained weight, in OPTIMIZER operators per tensor.
- `public`: the public code's settings on PyTorch's modules, `official` in the benchmarks, and not `--precision
  public`, which runs our operators. It computes in float32 without TF32 except for the generator, in bf16, and samples
  in float32. `fast`: gdd_fast's defaults, R1 in TF32; it samples with the folded engine in bf16, which has to be asked
  for: trained networks are exported in float32.
- `max-autotune`: the best plain PyTorch in bf16. Everything between two products is one kernel without intermediate
  results, and replayed as a graph; R1 and the optimizers stay eager and unfused. Compiled code cannot do better.
- Data, logging and the exchange between GPUs are free, and there is enough memory.
"""

import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts.dispatched import build, fake_engine, inputs
from benchmarks.counts.step_kernels import IMAGES, Count, Kernel, count_kernels, fused, on_a_gpu
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator
from benchmarks.peers.training import OFFICIAL_SETTINGS, OUR_SETTINGS, STOCK_SETTINGS, Settings, Setup, Training
from gdd_fast.distill.memory_forecast import losses_of_nothing, without_values
from gdd_fast.sampling.sampler import one_step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "roofline.md"
BEGIN, END = "<!-- predictions:begin -->", "<!-- predictions:end -->"
PRESET, NETWORK, R1_INTERVAL = "cifar10-uncond-gdd-i", "ncsnpp-32", 16
TRAINING, SAMPLING = (256, 128, 64, 32), (1, 256)
ROWS = ("public", "fast, eager", "fast, graph", "max-autotune")

ATTAINED = {"bf16": 0.4, "tf32": 0.4, "fp32": 0.6, "memory": 0.85}
LAUNCH = 2.5e-6
"""Seconds from one small kernel to the next."""
HOST = 20e-6
"""Seconds for an operator, its autograd included: an iteration of 5,000 took 100 ms of a server's core."""
TILE = 64
"""Rows and columns: the small tiles that libraries take where larger ones would leave multiprocessors idle."""
OPTIMIZER = {"public": (100, 3.0), "fast": (36, 0.05), "max-autotune": (44, 0.05)}
"""Bytes for each weight: 25, 9 and 11 passes in float32; and operators for each tensor."""

PUBLISHED = """There is one published figure, of a network with more work per image (ImageNet at 64 pixels): 5 M images
in 6 hours on 8 A100s with the public code, 29 images/s per GPU."""


@dataclass(frozen=True)
class Gpu:
    """Dense FLOP/s by type, bytes/s and multiprocessors, by the data sheet."""

    bf16: float
    tf32: float
    fp32: float
    memory: float
    multiprocessors: int


GPUS = {
    "A100": Gpu(312e12, 156e12, 19.5e12, 2.04e12, 108),
    "H100": Gpu(989e12, 495e12, 67e12, 3.35e12, 132),
    "H200": Gpu(989e12, 495e12, 67e12, 4.8e12, 132),
    "B200": Gpu(2250e12, 1125e12, 75e12, 7.7e12, 148),
}


def device_seconds(kernels: Sequence[Kernel], gpu: Gpu, *, tf32: bool) -> float:
    """By the first of the module's assumptions."""
    return sum(_seconds(kernel, gpu, "tf32" if tf32 else "fp32") for kernel in kernels)


def _seconds(kernel: Kernel, gpu: Gpu, wide: str) -> float:
    kind = wide if kernel.dtype == torch.float32 else "bf16"
    tiles = -(-kernel.rows // TILE) * -(-kernel.columns // TILE)
    filled = min(1.0, tiles / gpu.multiprocessors) if tiles else 1.0
    computing = kernel.flop / (getattr(gpu, kind) * ATTAINED[kind] * filled)
    return max(computing, kernel.bytes / (gpu.memory * ATTAINED["memory"]), LAUNCH)


@dataclass(frozen=True)
class Steps:
    """The counts of the three steps, and what their optimizers have to do."""

    settings: Settings
    row: str
    steps: dict[str, Count]
    weights: dict[str, int]
    tensors: dict[str, int]

    def images_per_second(self, gpu: Gpu, images: int, row: str) -> float:
        shares = {"G": 1.0, "D": 1.0, "R1": 1 / R1_INTERVAL}
        size, calls = OPTIMIZER[self.row]
        device = host = compiled_r1 = 0.0
        for name, share in shares.items():
            count = self.steps[name].at(images)
            compiled = row == "max-autotune" and name != "R1"
            kernels = fused(count.kernels) if compiled else count.kernels
            own = share * device_seconds(kernels, gpu, tf32=self.settings.tf32)
            dispatched = share * HOST * (0 if compiled else count.dispatched)
            operators = share * calls * self.tensors[name]
            update = share * size * self.weights[name] / (gpu.memory * ATTAINED["memory"])
            if row == "max-autotune" and name == "R1":
                compiled_r1 = max(own, dispatched)
                own = dispatched = 0.0
            device += own + max(update, operators * LAUNCH)
            host += dispatched + operators * HOST
        if row == "max-autotune":
            return images / (device + compiled_r1)
        return images / (device if row == "fast, graph" else max(device, host))


def count_training(row: str, setup: Setup) -> Steps:
    """`row` is a key of OPTIMIZER; the setup's batch has to be `IMAGES`."""
    settings = {"public": OFFICIAL_SETTINGS, "fast": OUR_SETTINGS, "max-autotune": STOCK_SETTINGS}[row]
    training = Training(setup, settings, torch.device("cpu"))
    r1_features = copy.deepcopy(training.features).to(torch.float32) if row == "fast" else training.features
    with FakeTensorMode(allow_non_fake_inputs=True), on_a_gpu() if row == "fast" else nullcontext():
        g, f, r, h = map(without_values, (training.generator, training.features, r1_features, training.heads))
        trained = {name: [p for p in net.parameters() if p.requires_grad] for name, net in (("G", g), ("D", h))}
        trained["R1"] = trained["D"]
        steps = {}
        for name, loss in losses_of_nothing(setup.config.loss.logit_reduction, g, f, r, h).items():
            for p in trained["D"]:
                p.requires_grad_(name != "G")
            steps[name] = count_kernels(lambda loss=loss: loss(setup.batch).backward())
            for p in [*g.parameters(), *h.parameters()]:
                p.grad = None
    weights = {name: sum(p.numel() for p in found) for name, found in trained.items()}
    return Steps(settings, row, steps, weights, {name: len(found) for name, found in trained.items()})


def count_sampling(row: str, channels: int = 128) -> Count:
    """One step of NETWORK, that wide, without gradient."""
    if row == "fast":
        with fake_engine(NETWORK, channels) as (net, unet, _), torch.no_grad():
            return count_kernels(lambda: unet(inputs(net, "cuda", IMAGES)[0], None))
    dtype, style = (torch.float32, OFFICIAL) if row == "public" else (torch.bfloat16, BEST)
    net = build(NETWORK, channels)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        stock = without_values(StockGenerator(net, style, dtype))
        return count_kernels(lambda: one_step(stock, torch.empty(IMAGES, 3, 32, 32), None))


def sampling_rate(count: Count, gpu: Gpu, images: int, row: str) -> float:
    kernels = count.at(images).kernels
    device = device_seconds(fused(kernels) if row == "max-autotune" else kernels, gpu, tf32=False)
    return images / (device if row in ("fast, graph", "max-autotune") else max(device, HOST * count.dispatched))


def table(training: dict[str, Steps], sampling: dict[str, Count]) -> str:
    """Markdown: a row for each GPU and way of running, a column for each batch."""
    heads = [f"train {n}" for n in TRAINING] + [f"sample {n}" for n in SAMPLING]
    lines = [f"| GPU | | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for name, gpu in GPUS.items():
        for row in ROWS:
            key = row.split(",")[0]
            rates = [training[key].images_per_second(gpu, n, row) for n in TRAINING]
            rates += [sampling_rate(sampling[key], gpu, n, row) for n in SAMPLING]
            lines.append(f"| {name} | {row} | {' | '.join(_short(rate) for rate in rates)} |")
    return "\n".join(lines)


def counted(training: dict[str, Steps]) -> str:
    """Markdown: what the table is made of."""
    heads = "| per image at batch 256 | GFLOP fp32 | GFLOP bf16 | MB | kernels per step | operators |"
    lines = [heads, "|---|---|---|---|---|---|"]
    for row, found in training.items():
        for name, count in found.steps.items():
            at, images = count.at(TRAINING[0]), TRAINING[0]
            wide = sum(k.flop for k in at.kernels if k.dtype == torch.float32)
            parts = (wide / images / 1e9, (at.flop - wide) / images / 1e9, at.bytes / images / 1e6)
            cells = [f"{part:.3g}" if part < 1000 else f"{part:,.0f}" for part in parts]
            cells += [f"{len(count.kernels):,}", f"{count.dispatched:,}"]
            lines.append(f"| {row}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(rate: float) -> str:
    """Two digits: the assumptions are worth no more."""
    return f"{float(f'{rate:.2g}'):,.0f}"


def section() -> str:
    """What stands between BEGIN and END of the page."""
    training = {row: count_training(row, Setup(PRESET, IMAGES)) for row in OPTIMIZER}
    sampling = {row: count_sampling(row) for row in OPTIMIZER}
    assumptions = __doc__[__doc__.index("FLOP, bytes") :].strip()
    return "\n\n".join(
        [
            f"{BEGIN}\n## Predictions",
            "**Arithmetic, not measured**; made by `python -m benchmarks.reports.predictions`. Images/s of one GPU\n"
            f"that trains {PRESET}, or samples its generator in one step, by the number of images in a batch:",
            table(training, sampling),
            PUBLISHED,
            assumptions,
            "\n".join(f"- {line}" for line in _numbers()),
            f"{counted(training)}\n{END}",
        ]
    )


def _numbers() -> list[str]:
    """The assumptions that are numbers, a line each."""
    updates = [f"{row} {size} bytes, {calls:g} operators" for row, (size, calls) in OPTIMIZER.items()]
    lines = [
        f"ATTAINED: {', '.join(f'{kind} {share}' for kind, share in ATTAINED.items())}",
        f"LAUNCH {LAUNCH * 1e6:g} us, HOST {HOST * 1e6:g} us, TILE {TILE}",
        f"OPTIMIZER: {'; '.join(updates)}",
    ]
    for name, gpu in GPUS.items():
        rates = [f"{rate / 1e12:g}" for rate in (gpu.bf16, gpu.tf32, gpu.fp32, gpu.memory)]
        lines.append(f"{name}: {', '.join(rates[:3])} TFLOP/s in bf16, TF32 and float32, {rates[3]} TB/s, ")
        lines[-1] += f"{gpu.multiprocessors} multiprocessors"
    return lines


def insert(page: str, section: str) -> str:
    """`page` with the section in the place of the one it has, or at its end."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{section}\n"
    return page[: page.index(BEGIN)] + section + page[page.index(END) + len(END) :]


def main() -> int:
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), section()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
