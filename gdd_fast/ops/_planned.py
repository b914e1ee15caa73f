"""Triton kernels without Python in each call: launch plans that the extension keeps and repeats (csrc/launch_plan.h).

An operator asks `plans(planner)` for its cache of plans, keyed by the shapes, strides, dtypes, devices, alignments and
numbers of a call; for each new kind of call, `planner` checks it and decides once what computes it. Without the
extension, under a compiler or dispatch mode, or for a tensor subclass, the operators of torch.library run.
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
    """Whether a call with x may use a plan."""
    return (x.is_cuda or backend == "triton") and backend in ("auto", "triton") and runs_eagerly(x)


@functools.cache
def plans(planner: Planner) -> Any | None:
    """The extension and its cache of plans from `planner`; None if it is not built or does not know streams."""
    module = extension()
    if module is None or not _knows_streams(module):
        return None
    return module, module.LaunchPlans(planner)


@functools.cache
def _knows_streams(module: Any) -> bool:
    """Whether this PyTorch (2.11 or later) can tell C++ which GPU stream is the current one.

    Tested on a new stream: the handle of the default stream is 0, as is that of an unknown one.
    """
    if not torch.cuda.is_available():
        return True
    x = torch.empty(0, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            return module.current_stream(x) == torch.cuda.current_stream().cuda_stream
        except (NotImplementedError, RuntimeError):
            return False
