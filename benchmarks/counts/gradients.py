"""Gradients of a training iteration in bfloat16 and float32 against float64, tensor by tensor. No clock; any machine.

    python -m benchmarks.counts.gradients                                       the demo, seconds
    python -m benchmarks.counts.gradients --preset cifar10-uncond-gdd-i         NCSN++ 32 at full width, a few minutes
    python -m benchmarks.counts.gradients --preset ... --backbone-weights vgg16_bn=vgg16_bn.pth --json FILE

The three steps of an iteration (G, D, R1), from the same weights, latents and images, in float64 throughout, in
float32, and with the activations of all networks in bfloat16 but parameters, norms' statistics, spectral norms, logits,
losses and the penalty's sum in float32; then with only the generator, only the backbones or only the heads in bfloat16.
For each tensor of weights: the cosine between its gradient and float64's, and the ratio of their norms.
"other z" are float64's gradients for other latents and images: how far a step is from the next anyway.

A bias before a batch norm has no gradient but rounding, in any type; such tensors are counted and left out.

Backbones have published weights where they are found (`tf_efficientnet_lite0` comes with the demo), else random ones
that keep the scale of activations; the network's are random too, but for the demo's, which is the bundled teacher.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.networks import one_of_each_class
from benchmarks.peers.training import OUR_SETTINGS, Batch, Setup, Step, Training
from gdd_fast.bundled import BUNDLED_TEACHER
from gdd_fast.config import DEMO, PRESETS
from gdd_fast.errors import WeightsError
from gdd_fast.models.backbone_weights import load_backbone_weights
from gdd_fast.models.backbones import build_backbone, fold_batch_norm
from gdd_fast.models.files.load import load_generator

WORST = 6
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
KINDS = {
    "fp64": (F64, F64, F64),
    "other z": (F64, F64, F64),
    "fp32": (F32, F32, F32),
    "bf16": (BF16, BF16, BF16),
    "bf16 generator": (BF16, F32, F32),
    "bf16 backbones": (F32, BF16, F32),
    "bf16 heads": (F32, F32, BF16),
}
"""Types of the generator, the backbones with their projections, and the heads."""
NOTHING = 1e-9
"""A gradient of this share of the step's largest, or less, in float64 is rounding."""
COSINE, RATIO = 0.98, 0.05
"""What is told of a tensor: a cosine below the first, a norm that is off by more than the second."""


@dataclass(frozen=True)
class Agreement:
    """A gradient against float64's: cosine, and norm over norm."""

    name: str
    cosine: float
    ratio: float

    @classmethod
    def of(cls, name: str, found: Tensor, expected: Tensor) -> "Agreement":
        found, expected = found.double().flatten(), expected.double().flatten()
        cosine = F.cosine_similarity(found, expected, dim=0, eps=0.0)
        return cls(name, float(cosine), float(found.norm() / expected.norm()))


def gradients(
    preset: str, batch: int, kind: str, weights: Mapping[str, Path], seed: int
) -> dict[str, dict[str, Tensor]]:
    """Those of the three steps from one state, by step and tensor, in the types of `kind`; no step is applied."""
    generator, dtype, heads_dtype = KINDS[kind]
    options = {"generator_dtype": generator, "discriminator_dtype": dtype, "tf32": False, "optimizer": "loop"}
    training = Training(Setup(preset, batch), replace(OUR_SETTINGS, **options), torch.device("cpu"))
    net, heads, backbones = training.generator, training.heads, training.features.backbones
    if preset.startswith(DEMO):
        net.load_state_dict(load_generator(BUNDLED_TEACHER).state_dict(), strict=False)
    for name in backbones:
        state = _published(name, weights.get(name))
        if state is not None:
            folded = fold_batch_norm(build_backbone(name, state, PRESETS[preset].discriminator.disc_resolution))
            backbones[name].load_state_dict(folded.to(dtype).state_dict())
    heads.dtype = heads_dtype
    if dtype == torch.float64:
        net.double(), heads.double()
    names = {step: [name for name, p in m.named_parameters() if p.requires_grad] for step, m in _trained(training)}
    random = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(training.shape, generator=random) for _ in range(2))
    drawn = Batch(z, _smooth(noise), one_of_each_class(batch, training.label_dim, training.device))
    return {step: dict(zip(names[step], training.gradients(step, drawn), strict=True)) for step in names}


def _trained(training: Training) -> list[tuple[Step, torch.nn.Module]]:
    return [("G", training.generator), ("D", training.heads), ("R1", training.heads)]


def _published(name: str, path: Path | None) -> Mapping[str, Tensor] | None:
    """Weights of a backbone, None where there are none here."""
    try:
        return load_backbone_weights(name, path)
    except WeightsError:
        if path is not None:
            raise
        return None


def compare(
    preset: str, batch: int, weights: Mapping[str, Path], seed: int = 0
) -> dict[str, dict[str, list[Agreement]]]:
    """For each step and kind how every tensor's gradient agrees with float64's."""
    found = {kind: gradients(preset, batch, kind, weights, seed + (kind == "other z")) for kind in KINDS}
    compared = {}
    for step, tensors in found["fp64"].items():
        least = NOTHING * max(float(t.norm()) for t in tensors.values())
        told = {name: t for name, t in tensors.items() if float(t.norm()) > least}
        compared[step] = {
            kind: [Agreement.of(name, found[kind][step][name], expected) for name, expected in told.items()]
            for kind in KINDS
            if kind != "fp64"
        }
    return compared


def _smooth(noise: Tensor) -> Tensor:
    """Images in [-1, 1] whose neighbours are alike, as those of pictures are."""
    coarse = F.interpolate(F.avg_pool2d(noise, 4), noise.shape[-2:], mode="bilinear", align_corners=False)
    return (coarse * 2 + 0.1 * noise).clamp(-1, 1)


def lines(compared: Mapping[str, Mapping[str, list[Agreement]]]) -> list[str]:
    """A table of all tensors of a step together, then the tensors of bf16 that agree least."""
    row = "{:5}{:16}{:>8}{:>16}{:>10}{:>20}{:>8}".format
    shown = [row("step", "type", "tensors", "cosine: least", "median", "norm ratio: least", "most")]
    for step, kinds in compared.items():
        for kind, tensors in kinds.items():
            cosines, ratios = [t.cosine for t in tensors], [t.ratio for t in tensors]
            figures = f"{min(cosines):.6f}", f"{statistics.median(cosines):.6f}"
            shown.append(row(step, kind, len(tensors), *figures, f"{min(ratios):.4f}", f"{max(ratios):.4f}"))
    for step, kinds in compared.items():
        off = [t for t in kinds["bf16"] if t.cosine < COSINE or abs(t.ratio - 1) > RATIO]
        shown.append(f"{step}: {len(off)} of {len(kinds['bf16'])} tensors below {COSINE} or off by {RATIO:.0%} in bf16")
        worst = sorted(off, key=lambda t: t.cosine)[:WORST]
        shown += [f"    {t.name:52} cosine {t.cosine:.4f}   norm {t.ratio:.3f}" for t in worst]
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default=DEMO)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backbone-weights", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--json", type=Path, help="write every tensor's figures there")
    asked = parser.parse_args()
    if asked.batch < 1:
        parser.error("--batch must be at least 1")
    weights = {name: Path(path) for name, _, path in (entry.partition("=") for entry in asked.backbone_weights)}
    compared = compare(asked.preset, asked.batch, weights)
    print("\n".join(lines(compared)))
    if asked.json:
        rows = {s: {k: [vars(t) for t in ts] for k, ts in kinds.items()} for s, kinds in compared.items()}
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
