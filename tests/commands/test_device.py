"""float32 on a GPU as it is promised, and the switches of others as they were."""

from collections.abc import Callable

import pytest
import torch
from torch.backends import cuda, cudnn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counts import exactness
from gdd_fast import evaluate, sample
from gdd_fast.device import full_float32, gpu_arithmetic


def read() -> dict[str, object]:
    """What PyTorch says of itself; of an interface that it finds at odds with the other, that it is."""

    def ask(question: Callable[[], object]) -> object:
        try:
            return question()
        except RuntimeError as error:
            assert "mix of the legacy and new" in str(error)
            return "mixed"

    questions = {
        "products": lambda: cuda.matmul.fp32_precision,
        "convolutions": lambda: cudnn.conv.fp32_precision,
        "products, older": lambda: cuda.matmul.allow_tf32,
        "convolutions, older": lambda: cudnn.allow_tf32,
    }
    return {name: ask(question) for name, question in questions.items()}


CHOICES = {
    "default": lambda: None,
    "older, no TF32": lambda: setattr(cudnn, "allow_tf32", False),
    "older, all TF32": lambda: torch.set_float32_matmul_precision("high"),
    "newer, convolutions": lambda: setattr(cudnn.conv, "fp32_precision", "ieee"),
    "newer, products": lambda: setattr(cuda.matmul, "fp32_precision", "tf32"),
    "newer, everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


BLOCKS = {
    "full": (full_float32, "ieee"),
    "fp32 and bf16": (lambda: gpu_arithmetic("fp32", "bf16"), "ieee"),
    "tf32": (lambda: gpu_arithmetic("bf16", "tf32"), "tf32"),
}


def arithmetic() -> tuple[str, str]:
    """What operators go by."""
    return cuda.matmul.fp32_precision, cudnn.conv.fp32_precision


@pytest.mark.parametrize(("block", "precision"), BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES.keys())
def test_arithmetic_is_for_its_block_alone(switches, choose, block, precision):
    choose()
    before = read(), cudnn.benchmark
    with pytest.raises(KeyError), block():
        assert arithmetic() == (precision, precision)
        assert cudnn.benchmark == (block is not full_float32)
        raise KeyError
    assert (read(), cudnn.benchmark) == before


@pytest.mark.parametrize("inner", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("outer", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES.keys())
def test_blocks_within_blocks(switches, choose, outer, inner):
    choose()
    before = read()
    with outer[0]():
        with inner[0]():
            assert arithmetic() == (inner[1], inner[1])
        assert arithmetic() == (outer[1], outer[1])
    assert read() == before


class Watch(TorchDispatchMode):
    """Notes in which arithmetic convolutions and products are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(word in str(operator) for word in ("conv", "mm", "linear")):
            self.seen.add(arithmetic())
        return operator(*args, **(kwargs or {}))


COMMANDS = {
    "one step": (sample.main, "--net demo --seeds 0-1 --out {out}"),
    "many steps": (sample.main, "--net demo --seeds 0-1 --out {out} --sampler heun --steps 2"),
    "evaluate": (evaluate.main, "--net demo --data demo-test --images 2 --data-images 2 --features pixels"),
    "exactness": (exactness.main, "--images 2 --batch 2"),
}


@pytest.mark.parametrize(("main", "options"), COMMANDS.values(), ids=COMMANDS.keys())
def test_commands_compute_float32_in_full(switches, tmp_path, main, options):
    with Watch() as watch:
        main([*options.format(out=tmp_path / "out.npz").split(), "--device", "cpu"])
    assert watch.seen == {("ieee", "ieee")}
    assert cudnn.allow_tf32, "and leave the process as it was"
