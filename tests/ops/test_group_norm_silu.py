"""group_norm_silu: the formula, and as accurate as eager torch in every form, dtype and layer of the networks."""

import pytest
import torch

from benchmarks.cases.layer_calls import layers
from gdd_fast.ops.group_norm_silu import OPERATOR, group_norm_silu, group_norm_silu_ref
from gdd_fast.ops.residual import residual
from norm_case import BACKENDS, LAYOUTS, Case
from parity import backends, device_for

CALLS = layers().norms


def test_definition_is_the_formula():
    case = Case((2, 6, 3, 4), 3, dtype=torch.float64)
    x, weight, bias, add, scale, shift = case.inputs
    u = (x + add[:, :, None, None]).reshape(2, 3, 2 * 12)
    xhat = (u - u.mean(2, keepdim=True)) / (u.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    z = xhat.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    t = z * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(case.ref(*case.inputs), t / (1 + torch.exp(-t)))


FORMS = {
    "plain": {"rows": ()},
    "no activation": {"rows": (), "activation": None},
    "ncsn": {"rows": ("add",)},
    "adm": {"rows": ("scale", "shift")},
    "shift alone": {"rows": ("shift",), "activation": None},
    "everything": {},
    "one row": {"one_row": True},
    "pair": {"pair": 28},  # groups of 6 straddle the seam at 20
    "float32 rows": {"dtype": torch.bfloat16, "row_dtype": torch.float32},
}


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, backend):
    """Odd sizes: no tile is full, channel blocks neither."""
    channels, groups = (20, 8) if form == "pair" else (24, 4)
    Case((2, channels, 3, 5), groups, backend=backend, **FORMS[form]).check()


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_of_one_is_split_over_programs(dtype, layout, backend):
    Case((1, 12, 12, 12), 3, dtype=dtype, layout=layout, backend=backend).check()
    Case((1, 10, 9, 15), 4, pair=6, dtype=dtype, layout=layout, backend=backend, rows=("add",)).check()


@BACKENDS
@LAYOUTS
def test_many_samples_take_one_kernel(layout, backend):
    Case((9, 8, 3, 3), 2, layout=layout, backend=backend).check()


@pytest.mark.parametrize("one", CALLS, ids=str)
@pytest.mark.parametrize("backend", ["torch"])
def test_layers_of_the_networks(one, backend):
    """Their channels and groups, on fewer pixels."""
    check_layer(one, backend)


@pytest.mark.slow
@pytest.mark.parametrize("one", CALLS, ids=str)
@pytest.mark.parametrize("backend", [b for b in backends(OPERATOR) if b.values[0] != "torch"])
def test_layers_of_the_networks_fused(one, backend):
    check_layer(one, backend)


def check_layer(one, backend: str) -> None:
    rows = (("add",) if one.add else ()) + (("scale", "shift") if one.scale else ())
    channels, *pair = one.channels
    activation = "silu" if one.silu else None
    size = one.resolution if device_for(backend) == "cuda" else 4
    Case(
        (2, channels, size, size),
        one.num_groups,
        pair=sum(pair),
        rows=rows,
        activation=activation,
        backend=backend,
    ).check()


def test_the_networks_norms_are_those_of_the_paper():
    """Groups of 4 to 48 channels, many no power of two, and pairs whose seam lies within a group."""
    sizes = {sum(one.channels) // one.num_groups for one in CALLS}
    assert min(sizes) == 4 and max(sizes) == 48 and {6, 12, 18, 36} <= sizes
    assert {sum(one.channels) for one in CALLS} >= {128, 192, 256, 384, 576, 768, 960, 1152, 1536}
    straddling = [c for c in CALLS if len(c.channels) == 2 and c.channels[0] % (sum(c.channels) // c.num_groups)]
    assert straddling


@BACKENDS
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 8, 20, 20)], ids=["one kernel", "split"])
@pytest.mark.parametrize("known", [False, True], ids=["", "known statistics"])
def test_a_mean_far_above_the_spread(shape, known, backend):
    """Where E[x^2] - E[x]^2 has no digit left in float32; the channels' means differ by as little as their values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device_for(backend)) + 3000
    weight, bias = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    want = group_norm_silu_ref(x.double(), 2, weight.double(), bias.double())
    _, statistics = residual(
        x, torch.zeros_like(x), statistics=True, backend="triton" if backend == "triton" else "torch"
    )
    got = group_norm_silu(x, 2, weight, bias, statistics=statistics if known else None, backend=backend)
    # x itself is rounded to 2^-12, one part in 4096 of its spread; nothing more may be lost
    assert (got - want).abs().max() < 1e-3


@BACKENDS
def test_statistics_of_a_residual_spare_the_norm_its_own(backend):
    generator = torch.Generator().manual_seed(0)
    h, skip = (torch.randn((2, 12, 12, 12), generator=generator).to(device_for(backend)) for _ in range(2))
    y, s = residual(h, skip, scale=0.7, statistics=True, backend=backend if backend == "triton" else "torch")
    other = torch.randn((2, 4, 12, 12), generator=generator).to(y.device)
    weight, bias = (torch.randn(16, generator=generator).to(y.device) for _ in range(2))
    want = group_norm_silu((y, other), 4, weight, bias, backend=backend)
    got = group_norm_silu((y, other), 4, weight, bias, statistics=(s, None), backend=backend)
    torch.testing.assert_close(got, want)
