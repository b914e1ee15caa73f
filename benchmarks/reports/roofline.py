"""`python -m benchmarks.reports.roofline`: how far each part is from what the machine could do, technique by technique.

Writes docs/roofline.md and docs/waterfall-<device>.png, and keeps its rows in benchmarks/results/<device>.json.
`--draw` only writes the pages anew from the results that are there. The pictures need matplotlib.

FLOP are those of the convolutions and products of the plain networks, counted on the meta device. Bytes are the least
that has to move: every weight once, every gradient of a trained weight once, inputs and outputs of the part once a
pass. The floor is the larger of FLOP by matrix rate and bytes by copy bandwidth, both as measured on this machine.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cases.training_cases import settings_for
from benchmarks.counts.flops import count_flops
from benchmarks.harness import machine
from benchmarks.harness.case import Bench, Case, Effort, measure_case
from benchmarks.harness.checks import tensors
from benchmarks.harness.results import FOLDER, Results, Row, format_seconds
from benchmarks.peers.networks import under_tf32
from benchmarks.peers.training import STOCK_SETTINGS, Batch, Settings, Setup, Training
from benchmarks.reports.tables import load_all
from benchmarks.reports.waterfall import SAMPLING, TRAINING, waterfall_cases
from gdd_fast.distill.losses import discriminator_loss, r1_penalty
from gdd_fast.sampling.sampler import one_step

DOCS = Path(__file__).resolve().parents[2] / "docs"
GROUP = "roofline"
_FULL = Effort(1.5, least=5)


def parts(training: Training, batch: Batch) -> dict[str, Callable[[], object]]:
    """The parts of an iteration, as a user of the networks calls them; the same on meta tensors."""
    generator, features, heads = training.generator, training.features, training.heads
    z, real, labels = batch.z, batch.real, batch.labels
    with torch.no_grad():
        maps = features(real)
        shape_of_fakes = torch.empty_like(real)

    def generator_forward() -> Tensor:
        with torch.no_grad():
            return one_step(generator, z, labels)

    def generator_both() -> None:
        one_step(generator, z, labels).backward(shape_of_fakes)
        generator.zero_grad(set_to_none=True)

    def backbones_forward() -> list[list[Tensor]]:
        with torch.no_grad():
            return features(real)

    def backbones_both() -> Tensor:
        images = real.detach().requires_grad_()
        outputs = tensors(features(images))
        return torch.autograd.grad(outputs, images, tensors(maps))[0]

    def heads_both() -> None:
        logits = heads(maps, labels)
        discriminator_loss(logits, logits, "rows", len(real)).backward()
        heads.zero_grad(set_to_none=True)

    def r1() -> None:
        images = real.detach().requires_grad_()
        r1_penalty(images, heads(features(images), labels)).sum().backward()
        heads.zero_grad(set_to_none=True)

    return {
        "generator forward": generator_forward,
        "generator forward+backward": generator_both,
        "backbones forward": backbones_forward,
        "backbones forward+input gradient": backbones_both,
        "heads forward+backward": heads_both,
        "R1": r1,
    }


def least_bytes(training: Training, batch: Batch) -> dict[str, int]:
    """What the module docstring says, by part."""
    g_size, d_size = (t.itemsize for t in (training.settings.generator_dtype, training.settings.discriminator_dtype))
    images = batch.real.numel() * 4
    with torch.no_grad():
        maps = sum(t.numel() for t in tensors(training.features(batch.real))) * d_size
    generator, heads = _count(training.generator) * g_size, _count(training.heads) * d_size
    trained_g, trained_h = (_count(m, trained=True) * 4 for m in (training.generator, training.heads))
    features = _count(training.features) * d_size + images + maps
    return {
        "generator forward": generator + 2 * images,
        "generator forward+backward": 2 * generator + trained_g + 4 * images,
        "backbones forward": features,
        "backbones forward+input gradient": 2 * features,
        "heads forward+backward": 2 * heads + trained_h + maps,
        "R1": 3 * features + 3 * heads + trained_h,
    }


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def on_meta(setup: Setup, settings: Settings) -> tuple[Training, Batch]:
    """The plain networks without memory, to count."""
    training = Training(setup, settings, torch.device("cpu"))
    for module in (training.generator, training.features, training.heads):
        module.to("meta")
    batch = Batch.draw(training)
    moved = [None if t is None else t.to("meta") for t in (batch.z, batch.real, batch.labels)]
    return training, Batch(*moved)


def roofline_rows(setup: Setup, device: torch.device, effort: Effort) -> Iterator[Row]:
    """A row a part, with its FLOP and bytes. What the parts compute is compared in the cases of training."""
    settings = settings_for(device)["gdd_fast"]
    dtypes = {"generator_dtype": torch.float32, "discriminator_dtype": settings.discriminator_dtype}
    plain, shapes = on_meta(setup, replace(STOCK_SETTINGS, **dtypes))
    counted, moved = parts(plain, shapes), least_bytes(plain, shapes)
    training = Training(setup, settings, device)
    precision = "bf16" if settings.generator_dtype == torch.bfloat16 else "fp32"
    for name, call in parts(training, Batch.draw(training)).items():
        bench = Bench(
            {"gdd_fast": partial(under_tf32, call, settings.tf32)},
            lambda outputs: None,
            bytes=moved[name],
            flops=count_flops(counted[name]),
            images=setup.batch,
            precision=precision,
        )
        case = Case(GROUP, f"{name}, {setup.preset} batch {setup.batch}", lambda _, bench=bench: bench)
        yield from measure_case(case, device, effort)


def page(records: Sequence[Results]) -> str:
    """docs/roofline.md."""
    method = __doc__[__doc__.index("FLOP are") :].strip()
    lines = [f"# Roofline\n\nMade by `python -m benchmarks.reports.roofline`.\n\n{method}"]
    for record in records:
        rows = [row for row in record.rows if row.group == GROUP and row.seconds]
        if not rows:
            continue
        lines.append(f"\n## {record.machine['device']}\n")
        lines.append("| part | GFLOP | least MB | floor | measured | times the floor |\n|---|---|---|---|---|---|")
        for row in rows:
            floor = floor_of(row, record.rates)
            cells = [row.case, f"{row.flops / 1e9:.4g}", f"{row.bytes / 1e6:.4g}", format_seconds(floor)]
            lines.append(f"| {' | '.join([*cells, format_seconds(row.seconds), f'{row.seconds / floor:.2f}'])} |")
        steps = {group: steps_of(record, group) for group in (TRAINING, SAMPLING)}
        if any(steps.values()):
            lines.append(f"\n![Time after each technique]({picture(record).name})")
        for group, found in steps.items():
            if found:
                lines.append(f"\n{group.capitalize()}, {found[0].case}:\n")
                lines.append("| with, in this order | time | against the first |\n|---|---|---|")
                first = found[0].seconds
                cells = [(row.peer, format_seconds(row.seconds), f"{first / row.seconds:.2f} x") for row in found]
                lines += [f"| {' | '.join(cell)} |" for cell in cells]
    return "\n".join(lines) + "\n"


def floor_of(row: Row, rates: dict[str, float]) -> float:
    """The least seconds that the machine's rates allow."""
    return max(row.flops / rates[row.precision], row.bytes / rates["copy"])


def steps_of(record: Results, group: str) -> list[Row]:
    """The bars of a waterfall that have a time."""
    return [row for row in record.rows if row.group == group and row.seconds]


def picture(record: Results) -> Path:
    """Where a record's picture lies."""
    gpu = record.machine["type"] == "cuda"
    name = machine.slug(record.machine["device"] + ("" if gpu else f" {record.machine['cores']} threads"))
    return DOCS / f"waterfall-{name}.png"


def draw(record: Results, path: Path) -> None:
    """A bar a technique, training above sampling; the whiskers are the 20 % and 80 % quantiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [rows for group in (TRAINING, SAMPLING) if (rows := steps_of(record, group))]
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 1.2 + 0.38 * sum(map(len, groups))), squeeze=False)
    for axis, rows in zip(axes[:, 0], groups, strict=True):
        middle = [row.seconds * 1e3 for row in rows]
        spread = [[(m - row.times[0] * 1e3) for m, row in zip(middle, rows, strict=True)]]
        spread.append([(row.times[2] * 1e3 - m) for m, row in zip(middle, rows, strict=True)])
        colours = ["tab:orange" if "gdd_fast" in row.peer else "tab:blue" for row in rows]
        bars = axis.barh([row.peer for row in rows], middle, xerr=spread, color=colours)
        axis.bar_label(bars, [f"{m:.3g} ms  {middle[0] / m:.2f} x" for m in middle], padding=4)
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set_title(f"{rows[0].group.capitalize()}, {rows[0].case} ({record.machine['device']})", fontsize=10)
        axis.set_xlabel("ms; each bar adds its technique to those above")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_pages(folder: Path = FOLDER) -> None:
    """docs/roofline.md and the pictures, from the results."""
    records = load_all(folder)
    for record in records:
        if any(steps_of(record, group) for group in (TRAINING, SAMPLING)):
            draw(record, picture(record))
    (DOCS / "roofline.md").write_text(page(records), encoding="utf-8")


def take(device: torch.device, results: Results, path: Path, *, smoke: bool) -> None:
    """Measure everything, saving after each row."""
    setup = Setup("cifar10-uncond-gdd-i", 128) if device.type == "cuda" else Setup("demo", 4 if smoke else 16)
    effort = Effort(0.02, least=2) if smoke else _FULL
    for row in roofline_rows(setup, device, effort):
        results.add([row])
        results.save(path)
    for case in waterfall_cases(device, smoke=smoke):
        for row in measure_case(case, device, effort):
            print(f"{row.group} | {row.peer}: {row.failure or format_seconds(row.seconds)}", flush=True)
            results.add([row])
            results.save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reports.roofline", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", action="store_true", help="measure nothing, write the pages from the results")
    parser.add_argument("--smoke", action="store_true", help="small and short, for a dry run")
    parser.add_argument("--out", type=Path, help="keep the rows here and write no pages")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if not args.draw:
        path = args.out or FOLDER / machine.file_name(device)
        rates = machine.rates(device, seconds=0.05 if args.smoke else 0.5)
        results = Results.continued(path, machine.describe(device), rates)
        take(device, results, path, smoke=args.smoke)
    if args.out is None:
        write_pages()
    return 0


if __name__ == "__main__":
    sys.exit(main())
