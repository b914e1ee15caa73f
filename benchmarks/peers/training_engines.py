"""A training step of plain PyTorch as one CUDA graph.

By PyTorch's own instructions: gradients None when the capture begins, so that they lie in the graph's memory, an Adam
whose count is on the device (`capturable`), and inputs that stay where they are. A step changes weights, so what the
warm-up did is undone before the capture: the first replay is the first step.
"""

from benchmarks.harness.timing import Call
from benchmarks.peers.networks import graphed
from benchmarks.peers.training import Training


def captured(training: Training, step: Call) -> Call:
    """`step`, one of `training`'s with fixed inputs, replayed; its outputs are the graph's, written anew each time."""
    return graphed(step, training.undo())
