"""`--engine compile`: a step's loss under torch.compile, forward and backward.

A loss is a function of tensors; torch.compile traces it as a whole (a part that it would have to leave out is an error)
for the shapes of its first call, and its backward pass with it. What surrounds it stays as it is: latents, the sum over
micro-batches, the ranks' exchange, the optimizer. The R1 step differentiates its loss' gradient once more, which
AOTAutograd does not compile, so it runs eagerly under this engine.
"""

from collections.abc import Callable
from typing import Any

import torch

from gdd_fast.errors import BackendError

COMPILER = "inductor"


def compiled(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss` compiled in its first call, which takes from seconds to minutes; `name` is the step's, for messages.

    Other shapes, types, trained weights or TF32 switches than those of a call before are compiled anew.

    Raises:
        BackendError: from the first call, if torch.compile cannot take the whole of it or has no compiler here.
    """
    whole = torch.compile(loss, fullgraph=True, dynamic=False, backend=COMPILER)

    def call(*inputs: Any) -> Any:
        try:
            return whole(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise BackendError(
                f"--engine compile: torch.compile fails at the {name} step ({type(error).__name__}: {reason}); "
                "use --engine eager, or auto"
            ) from error

    return call
