"""Inputs for one call of group_norm_silu, and the call itself and its definition as functions of its tensors."""

import pytest
import torch
from torch import Tensor

from gdd_fast.ops.group_norm_silu import OPERATOR, group_norm_silu, group_norm_silu_ref
from parity import assert_as_accurate_as_torch, backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])


class Case:
    """Inputs for one call, and the call as a function of its tensors."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        *,
        pair: int = 0,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
        rows: tuple[str, ...] = ("add", "scale", "shift"),
        row_dtype: torch.dtype | None = None,
        one_row: bool = False,
        activation: str | None = "silu",
        backend: str = "torch",
        requires_grad: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        n, c, h, w = shape

        def normal(*size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            return mean + std * torch.randn(size, generator=generator, dtype=torch.float64)

        device = device_for(backend)
        maps = [normal(n, width, h, w, mean=0.5) for width in (c, pair) if width]
        maps = [t.to(device, dtype).contiguous(memory_format=layout) for t in maps]
        c += pair
        parameters = [t.to(device, torch.promote_types(dtype, torch.float32)) for t in (normal(c, mean=1), normal(c))]
        given = [normal(1 if one_row else n, c, std=0.5).to(device, row_dtype or dtype) for _ in rows]
        self.inputs = [t.requires_grad_(requires_grad) for t in (*maps, *parameters, *given)]
        self.groups, self.pair, self.rows, self.activation, self.backend = groups, pair, rows, activation, backend

    def call(self, function, *tensors: Tensor, **options) -> Tensor:
        x, rest = (tensors[:2], tensors[2:]) if self.pair else (tensors[0], tensors[1:])
        given = dict(zip(self.rows, rest[2:], strict=True))
        return function(x, self.groups, *rest[:2], activation=self.activation, **given, **options)

    def fused(self, *tensors: Tensor, **options) -> Tensor:
        return self.call(group_norm_silu, *tensors, backend=self.backend, **options)

    def ref(self, *tensors: Tensor) -> Tensor:
        return self.call(group_norm_silu_ref, *tensors)

    def check(self) -> None:
        assert_as_accurate_as_torch(self.fused, self.ref, self.inputs)
