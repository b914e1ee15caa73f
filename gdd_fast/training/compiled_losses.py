"""`--engine compile`: a step's loss under torch.compile, forward and backward.

A loss is a function of tensors; torch.compile traces all of it (a graph break is an error) and its backward pass, for
the shapes of its first call. Everything around it stays eager: latents, the sum over micro-batches, the ranks'
exchange, the optimizer. The R1 step differentiates a gradient, which AOTAutograd does not compile, so it runs eagerly
under this engine.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gdd_fast.errors import BackendError

COMPILER = "inductor"


def compiled(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss`, compiled in its first call, which takes seconds to minutes, as does its first backward pass.

    It is compiled again for new shapes, dtypes, sets of trained weights or TF32 switches.
    """
    return torch.compile(loss, fullgraph=True, dynamic=False, backend=COMPILER)


def check_compiler(device: torch.device) -> None:
    """Raise BackendError if nothing can be compiled here. Takes seconds; for runs whose first step comes much later."""
    with compiling("trial"):
        compiled(lambda x: x.sin() + 1)(torch.ones(2, device=device))


@contextlib.contextmanager
def compiling(step: str) -> Iterator[None]:
    """Turn errors of compiling within the block, forward or backward, into one line; `step` is the step's name.

    Raises:
        BackendError: torch.compile cannot compile all of a loss or of its gradient, or has no compiler here.
    """
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"--engine compile: torch.compile fails at the {step} step ({type(error).__name__}: {reason}); "
            "use --engine eager, or auto"
        ) from error
