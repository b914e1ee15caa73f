"""What the layers of a diffusion network do at each noise level: the analysis behind GDD-I.

Zheng & Yang (arXiv 2405.20750) freeze most layers because "layers are differentially activated at different time
steps": different layers of a diffusion network hold what a one-step generator needs all at once. Three values are
measured for every residual branch, at the states that EDM's sampler passes through from fixed noise:

    relative_norm   ||h|| / ||h + s||, for a branch's output h and the skip connection s that it is added to
    output_change   ||F - F'|| / ||F||, where F is the network's own share of the denoised image,
                    D(x; sigma) = c_skip x + c_out F, and F' the same with the branch's output replaced by zeros
    image_change    the root mean square over pixels of D - D', for images in [-1, 1]

each averaged over images. A one-step student has one noise level, 80, where its input equals the teacher's.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.layers.backends import set_backend
from gdd_fast.models.edm import layer_role
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.sampling.sampler import heun, noise_levels
from gdd_fast.sampling.seeds import latents

FORMAT = "gdd_fast.layer_analysis"
MEASURES = ("relative_norm", "output_change", "image_change")

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Branch:
    """A residual branch: the layer whose output is added to a skip connection.

    Args:
        name: the block's name in the U-Net, such as `enc.16x16_block0`.
        kind: "conv", "attention", or "input" for NCSN++'s branch from the image to each encoder level.
        layer: its last layer.
        sum_at, at_input: the module whose input or output is the sum, and whether it is the input.
        scale: the factor that multiplies the sum.
    """

    name: str
    kind: str
    layer: nn.Module
    sum_at: nn.Module
    at_input: bool
    scale: float


def branches(net: EDMPrecond) -> list[Branch]:
    """The residual branches of a U-Net in the order of computation.

    Raises WeightsError for a network without any.
    """
    found = []
    for part in ("enc", "dec"):
        layers = list(getattr(net.model, part, nn.ModuleDict()).items())
        for index, (key, layer) in enumerate(layers):
            name = f"{part}.{key}"
            if isinstance(layer, UNetBlock):
                attends = layer.num_heads > 0
                sum_at = layer.norm2 if attends else layer
                found.append(Branch(name, "conv", layer.conv1, sum_at, attends, layer.skip_scale))
                if attends:
                    found.append(Branch(name, "attention", layer.proj, layer, False, layer.skip_scale))
            elif layer_role(key) in ("aux_residual", "aux_skip"):
                scale = 0.5**0.5 if layer_role(key) == "aux_residual" else 1.0
                found.append(Branch(name, "input", layer, layers[index + 1][1], True, scale))
    if not found:
        raise WeightsError(
            f"{type(net).__name__} has no residual branches that this analysis knows: it is for EDM's U-Nets"
        )
    return found


@torch.no_grad()
def sampler_states(net: EDMPrecond, z: Tensor, labels: Tensor | None, steps: int) -> dict[float, Tensor]:
    """The noisy images (N, C, H, W) at every level of the Heun sampler from latents `z`, by sigma, highest first."""
    states: dict[float, Tensor] = {}

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        states[float(sigma[0])] = x  # the second of the two calls at a level has the corrected state
        return net(x, sigma, labels)

    heun(denoise, z, labels, steps=steps, sigma_min=max(0.002, net.sigma_min), sigma_max=min(80.0, net.sigma_max))
    return dict(sorted(states.items(), reverse=True))


@torch.no_grad()
def measure(
    net: EDMPrecond, states: dict[float, Tensor], labels: Tensor | None, progress: Progress = lambda levels: None
) -> dict[str, Any]:
    """`sigmas`, and each of `MEASURES` as a list over branches of lists over noise levels. `states` is by sigma."""
    found = branches(net)
    table = {name: [[] for _ in found] for name in MEASURES}
    for sigma, x in states.items():
        norms: list[Tensor] = [torch.empty(0)] * len(found)
        with _recording(found, norms):
            whole = net(x, sigma, labels)
        if not bool(whole.isfinite().all()):
            raise WeightsError(f"the network's output at noise level {sigma:g} is not finite: its weights are broken")
        own = whole - _skip_weight(net, sigma) * x
        for row, branch in enumerate(found):
            with _dropped(branch.layer):
                change = whole - net(x, sigma, labels)
            table["relative_norm"][row].append(float(norms[row].mean()))
            table["output_change"][row].append(float((_norm(change) / _norm(own)).mean()))
            table["image_change"][row].append(float(change.square().mean(dim=(1, 2, 3)).sqrt().mean()))
        progress(1)
    return {"sigmas": list(states), **table}


def analyze(
    teacher: EDMPrecond,
    student: EDMPrecond | None = None,
    *,
    levels: int = 18,
    seeds: range = range(16),
    progress: Progress = lambda levels: None,
) -> dict[str, Any]:
    """Measure a teacher at its sampler's `levels` noise levels, and a one-step student at its only one; JSON types.

    The networks must be in evaluation mode. They are set to their operators' PyTorch definitions, which leave every
    branch's output visible. `progress` is called with 1 after every noise level of either network.

    Raises:
        ConfigError: networks with different branches, or fewer than 2 levels.
        WeightsError: a network that is not one of EDM's U-Nets, or whose output is not finite.
    """
    rows = branches(teacher)
    names = [(branch.name, branch.kind) for branch in rows]
    if student is not None and [(branch.name, branch.kind) for branch in branches(student)] != names:
        raise ConfigError("the student's layers differ from the teacher's: give the teacher that it was distilled from")
    noise_levels(levels)
    for net in (teacher, student):
        if net is not None:
            set_backend(net, "torch")
    device = next(teacher.parameters()).device
    shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    z, labels = latents(seeds, shape, teacher.label_dim, device)
    result = {
        "format": FORMAT,
        "images": len(seeds),
        "layers": [{"name": name, "kind": kind} for name, kind in names],
        "teacher": measure(teacher, sampler_states(teacher, z, labels, levels), labels, progress),
    }
    if student is not None:
        result["student"] = measure(student, {student.sigma_init: z * student.sigma_init}, labels, progress)
    return result


def _skip_weight(net: EDMPrecond, sigma: float) -> float:
    """c_skip of gdd_fast.models.precond."""
    variance = net.sigma_data**2
    return variance / ((sigma - net.sigma_eps) ** 2 + variance)


def _norm(x: Tensor) -> Tensor:
    """Per image, (N,)."""
    return x.float().flatten(1).norm(dim=1)


@contextlib.contextmanager
def _dropped(layer: nn.Module) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _recording(found: list[Branch], norms: list[Tensor]) -> Iterator[None]:
    """Put each branch's relative norm per image, (N,), into `norms` during a forward pass."""
    handles = []
    outputs: dict[int, Tensor] = {}

    def watch(row: int, branch: Branch) -> None:
        def sum_seen(summed: Any) -> None:
            summed = summed[0] if isinstance(summed, tuple) else summed
            norms[row] = outputs.pop(row) * branch.scale / _norm(summed)

        def branch_seen(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            outputs[row] = _norm(output)

        handles.append(branch.layer.register_forward_hook(branch_seen))
        if branch.at_input:
            handles.append(branch.sum_at.register_forward_pre_hook(lambda module, inputs: sum_seen(inputs[0])))
        else:
            handles.append(branch.sum_at.register_forward_hook(lambda module, inputs, output: sum_seen(output)))

    for row, branch in enumerate(found):
        watch(row, branch)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
