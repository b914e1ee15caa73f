"""A training step of plain PyTorch as one CUDA graph.

By PyTorch's own instructions: warmed up on a side stream, gradients None when the capture begins, so that they lie in
the graph's memory, an Adam whose count is on the device (`capturable`), and inputs that stay where they are. A step
changes weights, so what the warm-up did is undone before the capture: the first replay is the first step.
"""

import torch

from benchmarks.timing import Call
from benchmarks.training import Training

_WARM_UP = 3


def captured(training: Training, step: Call) -> Call:
    """`step`, one of `training`'s with fixed inputs, replayed; its outputs are the graph's, written anew each time."""
    before = [t.detach().clone() for t in training.changing()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        torch._foreach_copy_(training.changing(), before)
    training.forget_moments()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> object:
        graph.replay()
        return outputs

    replay.own_outputs = outputs
    return replay
