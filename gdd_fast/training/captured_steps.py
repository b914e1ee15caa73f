"""Training steps that are recorded once and replayed, so that an iteration does not wait for the host.

A step is a function of tensors with side effects on tensors: it takes the batch, draws from the run's generator, and
changes weights, moments, averages and counts in place. What it reads and writes must stay at the same addresses:

- inputs are copied to fixed buffers before a replay;
- learning rates, the average's weight and the counts of `AdamEma` are tensors, filled outside the step;
- whether a step is skipped is decided on the device; the host reads the count between steps (`StepGuard`);
- gradients are made and consumed within the step, with all accumulation over micro-batches. With several processes, a
step ends once they are packed into a fixed buffer; the ranks sum these buffers, and the rest is a separate step
(training/exchange.py): no graph holds a collective, and no rank depends on whether another one captures;
- values for the log are returned, and the caller accumulates them before the next replay.

`Recorder` is the interface, `CudaGraphs` the implementation for GPUs. The tests have another, tests/rehearsal.py, which
replays on any device, operator by operator, and finds what breaks the rules above. The first calls of a step run
eagerly: they choose cuDNN's algorithms, compile kernels and make the optimizer's state, and are part of training.

With a `Trial`, the first replays have to agree with the eager step; otherwise all steps stay eager.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Protocol, get_args

import torch
from torch import Tensor

from gdd_fast.config import StepEngine
from gdd_fast.errors import BackendError, ConfigError
from gdd_fast.training.trial import CHECKS, Trial

Inputs = Sequence[Tensor | None]
Step = Callable[..., dict[str, Tensor]]
"""(inputs) -> values for the log, each a scalar."""

WARM_UP = 3


class Recorder(Protocol):
    """Records a step that has run before, for replaying."""

    warm_up: int
    """How many calls of each step run eagerly before it is recorded."""

    def eagerly(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        """One eager call, in the environment that a recording needs."""

    def record(self, step: Step, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """A replay that reads `inputs`, which the caller fills."""


class CapturedSteps:
    """Steps by name; each is recorded after its first calls and replayed from then on.

    A step whose inputs change in shape, strides, dtype or presence is recorded again for these.
    """

    def __init__(self, recorder: Recorder | None, trial: Trial | None = None) -> None:
        """Without a recorder every call runs eagerly."""
        self.recorder, self.trial = recorder, trial
        self.reset()

    def reset(self) -> None:
        """Forget all recordings; to be called when tensors that steps change are replaced by others."""
        self._calls: dict[object, int] = {}
        self._recorded: dict[object, tuple[list[Tensor | None], Callable[[], dict[str, Tensor]]]] = {}

    def __call__(self, name: str, step: Step, *inputs: Tensor | None) -> dict[str, Tensor]:
        """`step(*inputs)`. The result is valid until the next call."""
        if self.recorder is None:
            return step(*inputs)
        key = (name, *((None if t is None else (t.shape, t.dtype, t.stride())) for t in inputs))
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= self.recorder.warm_up:
            return self.recorder.eagerly(step, inputs)
        if self.trial is not None and calls <= self.recorder.warm_up + CHECKS:
            return self._on_trial(self.trial, self.recorder, key, step, inputs)
        return self._replay(self.recorder, key, step, inputs)

    def _replay(self, recorder: Recorder, key: object, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        if key not in self._recorded:
            buffers = [None if t is None else t.detach().clone() for t in inputs]
            self._recorded[key] = buffers, recorder.record(step, buffers)
        buffers, replay = self._recorded[key]
        for buffer, given in zip(buffers, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer.copy_(given)
        return replay()

    def _on_trial(self, trial: Trial, recorder: Recorder, key: object, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        values, reason = trial.run(
            lambda: recorder.eagerly(step, inputs), lambda: self._replay(recorder, key, step, inputs)
        )
        if reason is not None:
            self.recorder = None
            self.reset()
            print(f"Steps run eagerly, as a captured one failed its check: {reason}", file=sys.stderr)
        return values


class CudaGraphs:
    """CUDA graphs in one memory pool; the steps draw random numbers from `generator`.

    A capture does not execute anything, so the first replay is the call it was made for. Steps are replayed on the
    current stream, one after the other: the results of one in the pool are read before the next overwrites them.
    """

    warm_up = WARM_UP

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._generator = generator
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def eagerly(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        """Runs on the capture's stream: workspaces and autograd's threads belong to streams."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            values = step(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return values

    def record(self, step: Step, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # loader and decoder threads may go on calling CUDA
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            values = step(*inputs)

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return values

        return replay


def choose_step_engine(
    engine: StepEngine, device: torch.device, processes: int, *, fixed: bool = True, apart: bool = True
) -> StepEngine:
    """`engine`, with "auto" resolved: "graph", on trial, on a GPU if steps are `fixed`; "threads" on a CPU for one
    process whose G and D steps can be taken `apart`, if PyTorch has two threads or more; else "eager".

    "compile" runs anywhere, and its steps are not captured: see `compiled_losses`.

    Raises ConfigError for an unknown name or unsuitable settings for "threads", BackendError for the wrong device.
    """
    if engine not in get_args(StepEngine):
        raise ConfigError(f"--engine must be one of {', '.join(get_args(StepEngine))}, not {engine!r}")
    threads = apart and processes == 1
    if engine == "auto":
        if device.type == "cuda":
            return "graph" if fixed else "eager"
        return "threads" if threads and device.type == "cpu" and torch.get_num_threads() > 1 else "eager"
    if engine == "graph" and device.type != "cuda":
        raise BackendError(f"--engine graph needs CUDA and cannot run on {device}; use eager, or auto")
    if engine == "threads" and device.type != "cpu":
        raise BackendError(f"--engine threads is for CPUs and cannot run on {device}; use auto")
    if engine == "threads" and not threads:
        raise ConfigError(
            "--engine threads takes the G and D steps on the same images at once: it needs --reuse-fakes, one "
            "process, the whole batch in one pass, and neither other losses nor --debug-finite; use auto"
        )
    return engine
