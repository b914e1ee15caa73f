"""Which operator is measured on what: the distinct layers of the real networks, by batch and type.

On a CPU, moreover, what docs/cpu_operators.md speaks of: the extension's operators at the shapes stated there.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import operator_inputs
from benchmarks.cases.adam_cases import adam_cases
from benchmarks.cases.layer_calls import (
    ResampleCall,
    attention_calls,
    convolution_calls,
    norm_calls,
    pool_calls,
    resample_calls,
    residual_calls,
)
from benchmarks.harness.case import Case
from benchmarks.harness.operator_case import Problem, operator_case

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def operator_cases(full: bool) -> list[Case]:
    """All cases: on a CPU a sample in fp32 at batch 2, `full` every shape in bf16 at batch 64 (backbones: 32).

    The operators take turns, so that a run that is cut off has seen something of each.
    """
    return _in_turns(full)[0]


def compiled_cases() -> list[Case]:
    """The peer torch.compile alone, at the first of the `full` shapes of each operator."""
    return _in_turns(True)[1]


def _in_turns(full: bool) -> tuple[list[Case], list[Case]]:
    batch, dtype = (64, torch.bfloat16) if full else (2, torch.float32)
    groups = []
    compiled: list[Case] = []
    for group, calls, problem, size, directions in operators(batch):
        dtype_here = torch.float32 if group == "to_uint8" else dtype
        cases = []
        for layer in calls if full else moderate(calls):
            name = f"{size}x{_shape(layer)} {_NAMES[dtype_here]}"
            build = partial(problem, layer, size, dtype_here)
            cases += [operator_case(group, name, build, backward=backward) for backward in directions]
            if full and layer is calls[0]:
                compiled += [operator_case(group, name, build, backward=b, compiled=True) for b in directions]
        groups.append(cases)
    groups.append(adam_cases())
    turns = itertools.zip_longest(*groups)
    cases = [case for turn in turns for case in turn if case is not None]
    return (cases if full else cases + stated_cases()), compiled


def operators(batch: int) -> list[tuple[str, Sequence[Any], Callable[..., Problem], int, tuple[bool, ...]]]:
    """By operator: its calls in the networks, what makes a `Problem` of one, images, and whether with gradients."""
    small, both = min(batch, 32), (False, True)
    return [
        ("group_norm_silu", norm_calls(), operator_inputs.norm_problem, batch, both),
        ("residual", residual_calls(), operator_inputs.residual_problem, batch, both),
        ("resample2d", resample_calls(), operator_inputs.resample_problem, batch, both),
        ("attention", attention_calls(), operator_inputs.attention_problem, batch, both),
        ("frozen_conv2d_relu", convolution_calls(), operator_inputs.conv_problem, small, both),
        ("max_pool2x2", pool_calls(), operator_inputs.pool_problem, small, both),
        ("discriminator_input", [32, 64], operator_inputs.input_problem, small, both),
        ("to_uint8", [32, 64], operator_inputs.bytes_problem, 16 * batch, (False,)),
    ]


def stated_cases() -> list[Case]:
    """The extension's operators on a CPU, in every type and memory format that they have code of their own for."""
    cases = []
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for dtype, (layout, form) in itertools.product((torch.float32, torch.bfloat16), layouts.items()):
        for up, taps in itertools.product((True, False), ((1.0, 1.0), (1.0, 3.0, 3.0, 1.0))):
            layer = ResampleCall(256, 32, up, taps, len(taps) // 2 - 1)
            build = partial(operator_inputs.resample_problem, layer, 8, dtype, layout=form, diffusers=False)
            name = f"8x{_shape(layer)} {_NAMES[dtype]} {layout}"
            case = operator_case("resample2d", name, build, backward=False)
            cases.append(replace(case, larger=layout == "channels_last"))  # as those of the networks are
    for dtype, backward in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        build = partial(operator_inputs.input_problem, 32, 8, dtype)
        name = f"8x{_shape(32)} {_NAMES[dtype]}"
        cases.append(operator_case("discriminator_input", name, build, backward=backward))
    build = partial(operator_inputs.bytes_problem, 64, 64, torch.float32)
    return [*cases, operator_case("to_uint8", f"64x{_shape(64)} fp32", build, backward=False)]


def _shape(layer: Any) -> str:
    """For names: channels x resolution, and what else tells two layers of one operator apart."""
    match layer:
        case int():
            return f"3x{layer}²"
        case operator_inputs.ConvCall(size=size, resolution=r, stride=stride, groups=groups):
            kind = f"{size[0]}x{size[1]}x{size[2]}x{size[3]}" + (f"/{stride}" if stride > 1 else "")
            return f"{size[1] * groups}x{r}² {'depthwise ' if groups > 1 else ''}{kind}"
        case operator_inputs.NormCall(channels=channels, resolution=r):
            marks = [mark for mark, given in (("add", layer.add), ("scale", layer.scale)) if given]
            return " ".join(["+".join(map(str, channels)) + f"x{r}²", *marks, *([] if layer.silu else ["no silu"])])
        case operator_inputs.ResampleCall(channels=channels, resolution=r):
            return f"{channels}x{r}² {'up' if layer.up else 'down'} {len(layer.taps)} taps"
        case operator_inputs.AttentionCall(channels=channels, resolution=r):
            return f"{channels}x{r}² {layer.heads} heads"
    return f"{layer.channels}x{layer.resolution}²"


def moderate(layers: Sequence[Any]) -> list[Any]:
    """Two layers for a CPU: from a quarter and from the middle of the order of their sizes."""
    if isinstance(layers[0], int):
        return list(layers[:1])
    by_size = sorted(layers, key=_elements)
    return list(dict.fromkeys(by_size[round(share * (len(by_size) - 1))] for share in (0.25, 0.5)))


def _elements(layer: Any) -> int:
    channels = layer.size[1] * layer.groups if isinstance(layer, operator_inputs.ConvCall) else layer.channels
    channels = sum(channels) if isinstance(channels, tuple) else channels
    return channels * layer.resolution**2
