"""Which operator is measured on what: the distinct layers of the real networks, by batch and type."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cases import operator_inputs as inputs
from benchmarks.cases.adam_cases import adam_cases
from benchmarks.cases.layer_calls import layers
from benchmarks.harness.case import Case
from benchmarks.harness.operator_case import Problem, operator_case

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def operators(batch: int) -> list[tuple[str, Sequence[Any], Callable[..., Problem], int]]:
    """By operator: its calls in the networks, what makes a `Problem` of one, and images."""
    found, small = layers(), min(batch, 32)
    return [
        ("group_norm_silu", found.norms, inputs.norm_problem, batch),
        ("residual", found.residuals, inputs.residual_problem, batch),
        ("resample2d", found.resamples, inputs.resample_problem, batch),
        ("attention", found.attentions, inputs.attention_problem, batch),
        ("frozen_conv2d_relu", found.convolutions, inputs.conv_problem, small),
        ("max_pool2x2", found.pools, inputs.pool_problem, small),
    ]


def operator_cases(full: bool) -> list[Case]:
    """All cases: on a CPU a sample in fp32 at batch 2, `full` every shape in bf16 at batch 64 (backbones: 32).

    The operators take turns, so that a run that is cut off has seen something of each.
    """
    batch, dtype = (64, torch.bfloat16) if full else (2, torch.float32)
    groups = [
        [
            _case(group, problem, call, images, dtype, backward)
            for call in (calls if full else moderate(calls))
            for backward in (False, True)
        ]
        for group, calls, problem, images in operators(batch)
    ]
    turns = itertools.zip_longest(*groups, adam_cases())
    return [case for turn in turns for case in turn if case is not None]


def compiled_cases(full: bool = True) -> list[Case]:
    """The peer torch.compile alone, at the first of the `full` shapes of each operator; on a CPU one small case."""
    if not full:
        group, calls, problem, images = operators(2)[1]
        return [_case(group, problem, moderate(calls)[0], images, torch.float32, False, compiled=True)]
    return [
        _case(group, problem, calls[0], images, torch.bfloat16, backward, compiled=True)
        for group, calls, problem, images in operators(64)
        for backward in (False, True)
    ]


def _case(
    group: str,
    problem: Callable[..., Problem],
    call: Any,
    batch: int,
    dtype: torch.dtype,
    backward: bool,
    compiled: bool = False,
) -> Case:
    name = f"{batch}x{call.title} {_NAMES[dtype]}"
    return operator_case(group, name, partial(problem, call, batch, dtype), backward=backward, compiled=compiled)


def moderate(calls: Sequence[Any]) -> list[Any]:
    """Two calls for a CPU: from a quarter and from the middle of the order of their sizes."""
    by_size = sorted(calls, key=lambda call: call.elements)
    return list(dict.fromkeys(by_size[round(share * (len(by_size) - 1))] for share in (0.25, 0.5)))
