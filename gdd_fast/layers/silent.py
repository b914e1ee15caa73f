"""Whether a layer has to be called, or its container may compute it."""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_PLAIN = (Tensor, nn.Parameter)


def silent(module: nn.Module) -> bool:
    """Whether `module` computes just what its class does, with plain parameters and without hooks.

    Hooks, global ones included, observe or change results; those of accelerate and diffusers (offloading, casting)
    replace `forward` on the instance.
    """
    # written out for speed: this runs for many layers in every call
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
        and plain(module)
    )


def plain(module: nn.Module) -> bool:
    """Whether all parameters of `module` itself are of PyTorch's own class, not quantised or distributed, and none is
    parametrized: some parametrisations change at every use, so the module's class must decide how often that is."""
    return "parametrizations" not in module._modules and all(
        p is None or type(p) in _PLAIN for p in module._parameters.values()
    )
