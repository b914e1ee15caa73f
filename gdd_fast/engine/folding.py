"""What folding any network needs: layers made from float64 weights, and how a label acts on them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gdd_fast.engine.folded_layers import Convolution, FusedResidual, Identity, Norm, Target


class Conditioning(nn.Module):
    """How a label acts on a folded network: computes its rows, float32 (N, sum of row_sizes).

    Rows of classes come from a table; those of soft labels are computed in each call.
    """

    def __init__(
        self, rows: Callable[[Tensor], Tensor], label_dim: int, device: torch.device, *, anywhere: bool = False
    ) -> None:
        """`rows`: takes labels float64 (N, label_dim), on the CPU or, if `anywhere`, on any device."""
        super().__init__()
        self._rows, self._anywhere = rows, anywhere
        self.table = nn.Buffer(rows(torch.eye(label_dim, dtype=torch.float64)).to(device))

    def forward(self, labels: Tensor) -> Tensor:
        """Classes int64 (N,) or soft labels float32 (N, label_dim)."""
        if labels.is_floating_point():
            if self._anywhere:
                return self._rows(labels.double())
            return self._rows(labels.cpu().double()).to(labels.device)
        return self.table.index_select(0, labels)


class Folding:
    """Makes the folded layers for one target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def norm(self, norm: nn.Module, *, silu: bool = True, gain: float = 1.0) -> Norm:
        """The norm for a map that arrives multiplied by `gain`."""
        return Norm(norm.weight, norm.bias, norm.num_groups, norm.eps * gain**2, self.target, silu=silu)  # type: ignore[arg-type,operator]

    def before_norm(
        self,
        weight: Tensor,
        padding: int,
        offset: Tensor | None,
        norm: nn.Module,
        rows: list[Tensor],
        silu: bool = True,
    ) -> tuple[Convolution, Norm]:
        """A convolution and the norm after it. `offset` is added between them, by whichever of the two adds it for
        free; `rows` are the norm's constant scale and shift, or empty."""
        scale, bias = f64(norm.weight), f64(norm.bias)  # type: ignore[arg-type]
        if rows:
            scale, bias = scale * (1 + rows[0]), bias * (1 + rows[0]) + rows[1]
        late = self.target.late_bias
        conv = Convolution(weight, None if late else offset, padding, self.target)
        add = offset if late else None
        return conv, Norm(scale, bias, norm.num_groups, norm.eps, self.target, silu=silu, add=add)  # type: ignore[arg-type]

    def identity(
        self, weight: Tensor, bias: Tensor, padding: int, scale: float
    ) -> tuple[Convolution, Identity | FusedResidual]:
        """The last convolution of a branch, and its sum with an unchanged map."""
        if self.target.residual == "torch":
            return Convolution(weight * scale, bias * scale, padding, self.target), Identity(scale)
        return Convolution(weight, None, padding, self.target), FusedResidual(scale, bias, self.target)


def f64(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)
