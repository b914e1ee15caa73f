"""Which operator is measured on what: the distinct layers of the real networks, by batch and type."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import operator_problems as problems
from benchmarks.adam_cases import adam_cases
from benchmarks.case import Case
from benchmarks.layers import attention_calls, backbone_calls, resample_calls
from benchmarks.operators import operator_case
from benchmarks.shapes import norm_calls, residual_calls

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def operator_cases(full: bool) -> list[Case]:
    """All cases: on a CPU a sample in fp32 at batch 2, `full` every shape in bf16 at batch 64 (backbones: 32).

    The first case of each operator also has torch.compile as a peer.
    """
    batch, dtype = (64, torch.bfloat16) if full else (2, torch.float32)
    small = min(batch, 32)
    convolutions, pools = backbone_calls()
    cases: list[Case] = []
    for group, calls, problem, size, directions in (
        ("group_norm_silu", norm_calls(), problems.norm_problem, batch, (False, True)),
        ("residual", residual_calls(), problems.residual_problem, batch, (False, True)),
        ("resample2d", resample_calls(), problems.resample_problem, batch, (False, True)),
        ("attention", attention_calls(), problems.attention_problem, batch, (False, True)),
        ("frozen_conv2d_relu", convolutions, problems.conv_problem, small, (False, True)),
        ("max_pool2x2", pools, problems.pool_problem, small, (False, True)),
        ("discriminator_input", [32, 64], problems.input_problem, small, (False, True)),
        ("to_uint8", [32, 64], problems.bytes_problem, 16 * batch, (False,)),
    ):
        dtype_here = torch.float32 if group == "to_uint8" else dtype
        chosen = calls if full else spread(calls, 2)
        for index, layer in enumerate(chosen):
            name = f"{size}x{_shape(layer)} {_NAMES[dtype_here]}"
            build = partial(problem, layer, size, dtype_here)
            for backward in directions:
                compiled = full and index == 0 and group != "frozen_conv2d_relu"
                cases.append(operator_case(group, name, build, backward=backward, compiled=compiled))
    return cases + adam_cases(full)


def _shape(layer: Any) -> str:
    """For names: channels x resolution, and what else tells two layers of one operator apart."""
    match layer:
        case int():
            return f"3x{layer}²"
        case problems.ConvCall(size=size, resolution=r, stride=stride, groups=groups):
            kind = f"{size[0]}x{size[1]}x{size[2]}x{size[3]}" + (f"/{stride}" if stride > 1 else "")
            return f"{size[1] * groups}x{r}² {'depthwise ' if groups > 1 else ''}{kind}"
        case problems.NormCall(channels=channels, resolution=r):
            marks = [mark for mark, given in (("add", layer.add), ("scale", layer.scale)) if given]
            return " ".join(["+".join(map(str, channels)) + f"x{r}²", *marks, *([] if layer.silu else ["no silu"])])
        case problems.ResampleCall(channels=channels, resolution=r):
            return f"{channels}x{r}² {'up' if layer.up else 'down'} {len(layer.taps)} taps"
        case problems.AttentionCall(channels=channels, resolution=r):
            return f"{channels}x{r}² {layer.num_heads} heads"
    return f"{layer.channels}x{layer.resolution}²"


def spread(some: Sequence[Any], count: int) -> list[Any]:
    """`count` of `some`, evenly spaced from the first to the last; all of them if there are no more."""
    if len(some) <= count:
        return list(some)
    return [some[round(i * (len(some) - 1) / max(count - 1, 1))] for i in range(count)]
