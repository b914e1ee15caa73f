"""What the battery of gpu_battery.py consists of: its parts, the most important first, and the cases of each.

A part gets a share of the time that is left when it starts; the last one of a run gets the rest. What it would take on
an H200, were it not cut off, by arithmetic: 4.3 TB/s of copies, 400 TFLOP/s of bf16 and 50 of fp32 in convolutions, a
second of one core for a Triton kernel that is not in the cache, 5 s for a process to start.

    defaults      training at 256 and 32 images with 3 settings, 20 s each with kernels compiled on the way, and images
                  to disk, 15 s: 135 s
    correctness   127 cases, 125 kernels, float64 definitions (3 TFLOP at 1 TFLOP/s), 6 cases of whole networks:
                  240 s in one process, 50 in six
    inference     9 generators of 7 peers, 5 cases of pieces; 1.6 s per peer, of which 0.5 are timed: 130 s
    train         a case is 5 s of definitions in fp32 and 6 to 8 s per peer: 25 s, 7 cases 175 s; R1 in the rounds of
                  4 iterations 25 s more, most of it of the public settings' fp32 (0.5 s each time at batch 128)
    ops           242 cases of 5 peers, 0.1 s per peer and 0.2 s per case: 180 s
    pipelines     45 s, of which SciPy's square root of a matrix takes 40
    tune          5 entries of 17 settings, 3 kernels to compile each: 340 s, which wants a run of its own
    compiled      1 to 2 min per case of torch.compile, 3 to 5 of max-autotune: 15 min, only when asked for
    waterfall     18 peers of two cases, 10 s each: 180 s, only when asked for
"""

from dataclasses import dataclass

import torch

from benchmarks.cases.default_cases import default_cases
from benchmarks.cases.network_cases import compiled_cases as compiled_networks
from benchmarks.cases.network_cases import generator_case, network_cases
from benchmarks.cases.operator_cases import compiled_cases as compiled_operators
from benchmarks.cases.operator_cases import operator_cases
from benchmarks.cases.pipeline_cases import pipeline_cases
from benchmarks.cases.training_cases import STEPS, training_cases
from benchmarks.cases.training_cases import compiled_cases as compiled_training
from benchmarks.cases.waterfall_cases import sampling_case, waterfall_cases
from benchmarks.harness.case import Case


@dataclass(frozen=True)
class Part:
    """`share` of the time left; `seconds` a peer is timed, 0 for none; `processes` that share the cases."""

    share: float
    seconds: float = 0.0
    processes: int = 1


PARTS = {
    "defaults": Part(0.4, 1.0),  # what a user feels, first
    "correctness": Part(0.2, processes=6),  # nothing is timed, and kernels are compiled for all that follows
    "inference": Part(0.3, 0.4),
    "train": Part(0.35, 1.0),
    "ops": Part(0.6, 0.06),
    "pipelines": Part(0.6, 0.3),
    "tune": Part(0.6),
    "compiled": Part(0.8, 0.4),
    "waterfall": Part(1.0, 0.4),
}
DEFAULT = tuple(name for name in PARTS if name not in ("compiled", "waterfall"))
"""The parts of a run that names none."""

PROCESS_BYTES = 12 << 30
"""How much of a GPU's memory one of several checking processes gets. The largest shapes in float64 take 14 GB: where
they meet, those that get none are checked again alone."""

_BF16 = torch.bfloat16


def cases_of(part: str, smoke: bool) -> list[Case]:
    """The cases of a part, the most important first; `smoke`: a few small ones, for a CPU."""
    match part:
        case "defaults":
            return [*default_cases(not smoke), pipeline_cases(not smoke)[0]]
        case "correctness":
            return operator_cases(False)[:9] if smoke else _correctness()
        case "inference":
            cases = network_cases(not smoke)
            return cases[:3] if smoke else cases  # one generator is enough
        case "train":
            return training_cases(not smoke, steps=("iteration",) if smoke else STEPS)
        case "ops":
            return operator_cases(not smoke)[: 9 if smoke else None]
        case "pipelines":
            return pipeline_cases(not smoke)[1 : 3 if smoke else None]
        case "compiled":
            if smoke:
                return compiled_operators(False)
            networks = compiled_networks()
            return [*networks[:2], compiled_training()[0], *networks[2:], *compiled_operators()]
        case "waterfall":
            return [sampling_case("demo", 1)] if smoke else waterfall_cases(True)
    raise ValueError(f"{part} has no cases")


def _correctness() -> list[Case]:
    """Operators at every full shape, and whole networks, whose operators hand each other statistics.

    Both directions cover a forward alone. The networks take longest and come early, but for the
    first operators: what is wrong with one of those is better read there.
    """
    operators = [c for c in operator_cases(True) if not c.group.endswith(" forward")]
    first = 2 * PARTS["correctness"].processes
    # the largest batch of the largest network is checked where it is timed, alone on the GPU
    batches = (("ncsnpp-32", 256), ("ncsnpp-32", 16), ("ncsnpp-32", 1), ("adm-64", 16), ("ncsnpp-64", 16))
    networks = [training_cases(True)[0], *(generator_case(name, n, _BF16) for name, n in batches)]
    return [*operators[:first], *networks, *operators[first:]]
