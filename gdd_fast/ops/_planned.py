"""Triton's kernels without Python per call: launch plans, which the extension keeps and repeats (csrc/launch_plan.h).

An operator asks `plans(planner)` for the cache of its plans. A plan is kept by the shapes, strides, types, devices,
alignments and numbers of a call; `planner` checks a call of a new kind and decides who computes it, once. Without the
extension, under a compiler, a mode or for a tensor of another kind the operators of torch.library run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdd_fast.backend import extension
from gdd_fast.ops._memory_format import runs_eagerly

Planner = Callable[[str, str, Sequence[Tensor | None], tuple[float, ...]], tuple | None]
"""(direction, backend, inputs, numbers) -> what `gdd_fast.kernels._plans.plan` returned, or None: not by Triton."""


def wanted(x: Tensor, backend: str) -> bool:
    """Whether a call with x may be one for a plan."""
    return (x.is_cuda or backend == "triton") and backend in ("auto", "triton") and runs_eagerly(x)


@functools.cache
def plans(planner: Planner) -> Any | None:
    """The extension and its cache of the plans that `planner` makes, or None where it is not built."""
    module = extension()
    if module is None or not _knows_streams(module):
        return None
    return module, module.LaunchPlans(planner)


@functools.cache
def _knows_streams(module: Any) -> bool:
    """Whether this PyTorch tells C++ which stream of a GPU is the current one, as 2.11 on does where it is asked.

    Asked on a stream of its own: the handle of the default stream is 0, as is that of a stream that is not known.
    """
    if not torch.cuda.is_available():
        return True
    x = torch.empty(0, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            return module.current_stream(x) == torch.cuda.current_stream().cuda_stream
        except (NotImplementedError, RuntimeError):
            return False
