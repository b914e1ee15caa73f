"""`--engine compile`: a step's loss under torch.compile, forward and backward.

A loss is a function of tensors; torch.compile traces it as a whole (a part that it would have to leave out is an error)
for the shapes of its first call, and its backward pass with it. What surrounds it stays as it is: latents, the sum over
micro-batches, the ranks' exchange, the optimizer. The R1 step differentiates its loss' gradient once more, which
AOTAutograd does not compile, so it runs eagerly under this engine.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gdd_fast.errors import BackendError

COMPILER = "inductor"


def compiled(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss` compiled in its first call, which takes from seconds to minutes, as its backward pass does in its own.

    Other shapes, types, trained weights or TF32 switches than those of a call before are compiled anew.
    """
    return torch.compile(loss, fullgraph=True, dynamic=False, backend=COMPILER)


def check_compiler(device: torch.device) -> None:
    """Raise BackendError if nothing can be compiled here; seconds. For a run whose first step comes much later."""
    with compiling("trial"):
        compiled(lambda x: x.sin() + 1)(torch.ones(2, device=device))


@contextlib.contextmanager
def compiling(step: str) -> Iterator[None]:
    """What a compiled loss raises inside, forward or backward, becomes one line; `step` is the step's name.

    Raises:
        BackendError: torch.compile cannot take the whole of a loss or of its gradient, or has no compiler here.
    """
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"--engine compile: torch.compile fails at the {step} step ({type(error).__name__}: {reason}); "
            "use --engine eager, or auto"
        ) from error
