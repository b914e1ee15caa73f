"""Training steps that are recorded once and replayed, so that an iteration does not wait for the host.

A step is a function of tensors with effects on tensors: it takes the batch, draws from the run's generator, and changes
weights, moments, averages and counts in place. What it reads and writes has to lie at the same addresses each time:

- inputs are copied to buffers of their own before a replay;
- learning rates, the average's weight and the counts of `AdamEma` are tensors, filled outside the step;
- whether a step is left out is decided on the device; the host looks at its count between steps (`StepGuard`);
- gradients begin and end within the step, with every accumulation over micro-batches. Between several processes a step
  ends where they are packed into a buffer that stays; the ranks add the buffers up, and what follows is a step of its
  own (training/exchange.py): no graph holds a collective, and no rank depends on whether another one captures;
- values for the log are returned, and added up by the caller before the next replay.

`Recorder` is the interface. `CudaGraphs` is that of a GPU. The tests have another, tests/rehearsal.py, which replays on
any device, operator by operator, and finds what breaks the rules above. The first calls of a step run as they are: they
choose cuDNN's algorithms, compile kernels and make the optimizer's state, and are part of the training.

With a `Trial` the first replays have to agree with the step as it is, or all steps go on as they are.
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
"""(inputs) -> values for the log, of one number each."""

WARM_UP = 3


class Recorder(Protocol):
    """Makes a replay of a step out of one that has run."""

    warm_up: int
    """Calls of each step that run as they are before it is recorded."""

    def eagerly(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        """One call as it is, in the surroundings that a recording needs."""

    def record(self, step: Step, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """A replay on `inputs`, which are the caller's to fill and the replay's to read."""


class CapturedSteps:
    """Steps by name; each is recorded after its first calls and replayed from then on.

    A step whose inputs change in shape, type or presence is recorded anew for those.
    """

    def __init__(self, recorder: Recorder | None, trial: Trial | None = None) -> None:
        """Without a recorder every call runs as it is."""
        self.recorder, self.trial = recorder, trial
        self.reset()

    def reset(self) -> None:
        """Forget all recordings: for whoever puts other tensors in the place of those that steps change."""
        self._calls: dict[object, int] = {}
        self._recorded: dict[object, tuple[list[Tensor | None], Callable[[], dict[str, Tensor]]]] = {}

    def __call__(self, name: str, step: Step, *inputs: Tensor | None) -> dict[str, Tensor]:
        """`step(*inputs)`. What it returns is valid until the next call."""
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
            print(f"Steps run eagerly, as a captured one did not do what it should: {reason}", file=sys.stderr)
        return values


class CudaGraphs:
    """CUDA graphs in one memory pool; `generator` is what the steps draw from.

    A capture runs nothing, so its first replay is the call that it was made for. Steps are replayed on the current
    stream, one after the other: what one leaves in the pool is read before the next overwrites it.
    """

    warm_up = WARM_UP

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._generator = generator
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def eagerly(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        """On the stream of the capture: workspaces and autograd's threads belong to streams."""
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
    """What "auto" is: "graph" on a GPU if steps are `fixed`, on trial; on a CPU "threads" for one process whose G and D
    steps can be taken `apart`, if PyTorch has two threads or more; else "eager".

    "compile" runs anywhere, and its steps are not captured: see `compiled_losses`.

    Raises ConfigError for an unknown name and for threads that cannot be; BackendError for the wrong device.
    """
    if engine not in get_args(StepEngine):
        raise ConfigError(f"--engine is one of {', '.join(get_args(StepEngine))}, not {engine!r}")
    threads = apart and processes == 1
    if engine == "auto":
        if device.type == "cuda":
            return "graph" if fixed else "eager"
        return "threads" if threads and device.type == "cpu" and torch.get_num_threads() > 1 else "eager"
    if engine == "graph" and device.type != "cuda":
        raise BackendError(f"--engine graph is of CUDA graphs and cannot run on {device}; use eager, or auto")
    if engine == "threads" and device.type != "cpu":
        raise BackendError(f"--engine threads is for CPUs and cannot run on {device}; use auto")
    if engine == "threads" and not threads:
        raise ConfigError(
            "--engine threads takes the G and the D step of the same images at once: it needs --reuse-fakes, one "
            "process, a whole batch at a time, and neither other losses nor --debug-finite; use auto"
        )
    return engine
