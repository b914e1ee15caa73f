"""Whether a layer has to be called, or may be computed by what holds it."""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_PLAIN = (Tensor, nn.Parameter)


def silent(module: nn.Module) -> bool:
    """Whether `module` computes what its class computes, with plain parameters and without hooks.

    Hooks observe or change results, those that are registered for all modules too; those of accelerate and diffusers
    (offloading, casting) replace `forward` on the instance.
    """
    # written out: this runs for many layers at every call
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
        and plain(module)
    )


def plain(module: nn.Module) -> bool:
    """Whether every parameter that `module` itself holds is a tensor of PyTorch's own class, not one that is quantised
    or distributed, and none is parametrized: some parametrisations change at every use, so its class decides how often
    that is."""
    return "parametrizations" not in module._modules and all(
        p is None or type(p) in _PLAIN for p in module._parameters.values()
    )
