"""attention: EDM's definition, the Triton kernels against it, and who is chosen."""

import json

import pytest
import torch
from torch.library import opcheck

from benchmarks.counts.offline import TritonCase, compile_triton
from gdd_fast import backend as backends_module
from gdd_fast.backend import resolve
from gdd_fast.errors import BackendError, InputError
from gdd_fast.kernels import __path__ as kernels_path
from gdd_fast.layers.self_attention import QkvConv2d
from gdd_fast.ops.attention import HEAD_DIMS, OPERATOR, _tokens, attention, attention_formula, attention_ref
from parity import assert_as_accurate_as_torch, backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
TRITON = pytest.mark.parametrize("backend", [b for b in backends(OPERATOR) if b.values[0] == "triton"])
ORDERS = pytest.mark.parametrize("order", ["interleaved", "blocks"])
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# batch, heads, channels a head, H, W: one tile and several, full and part
SHAPES = [(2, 2, 16, 3, 5), (1, 1, 64, 5, 7), (1, 2, 32, 2, 16), (1, 1, 16, 1, 1)]


def packed(n, heads, dim, h, w, dtype=torch.float32, layout=CHANNELS_LAST, backend="torch"):
    qkv = torch.randn(n, 3 * heads * dim, h, w, generator=torch.Generator().manual_seed(0))
    return qkv.to(device_for(backend), dtype).contiguous(memory_format=layout).requires_grad_()


def edm(qkv, heads):
    """Karras et al.'s attention, as their paper's code computes it."""
    n, channels, h, w = qkv.shape
    q, k, v = qkv.reshape(n * heads, channels // (3 * heads), 3, h * w).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q.float(), k.float() / k.shape[1] ** 0.5).softmax(2).to(q.dtype)
    return torch.einsum("nqk,nck->ncq", weights, v).reshape(n, channels // 3, h, w)


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_edm(shape, backend):
    qkv = packed(*shape, backend=backend)
    got, want = attention(qkv, shape[1], backend=backend), edm(qkv, shape[1])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(y.sin().sum(), qkv)[0] for y in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_orders_are_permutations_of_each_other():
    qkv = packed(1, 2, 16, 3, 3)
    blocks = qkv.unflatten(1, (2, 16, 3)).permute(0, 3, 1, 2, 4, 5).flatten(1, 3)
    torch.testing.assert_close(attention(blocks, 2, "blocks"), attention(qkv, 2))
    torch.testing.assert_close(attention_formula(blocks, 2, "blocks"), attention(qkv, 2))


@BACKENDS
@ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, order, backend):
    # the interpreter has no bfloat16 products; float16 takes the same path
    heads = shape[1]
    fused = lambda qkv: attention(qkv, heads, order, backend)
    assert_as_accurate_as_torch(fused, lambda qkv: attention_ref(qkv, heads, order), [packed(*shape, dtype)])


@BACKENDS
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
def test_memory_formats_and_slices(layout, backend):
    qkv = packed(2, 1, 16, 4, 4, layout=layout, backend=backend)
    y = attention(qkv, 1, backend=backend)
    assert y.is_contiguous(memory_format=layout)
    inside = torch.cat([qkv.detach()] * 2, 1)[:, 48:]
    torch.testing.assert_close(attention(inside, 1, backend=backend), y)


@TRITON
@ORDERS
def test_second_derivative(order, backend):
    qkv = packed(1, 1, 16, 2, 3, backend=backend)

    def second(function):
        (g,) = torch.autograd.grad(function(qkv).sin().sum(), qkv, create_graph=True)
        return torch.autograd.grad(g.square().sum(), qkv)[0]

    want = second(lambda x: attention_formula(x, 1, order))
    torch.testing.assert_close(second(lambda x: attention(x, 1, order, backend)), want, rtol=1e-4, atol=1e-5)


@TRITON
def test_large_logits_do_not_overflow(backend):
    qkv = packed(1, 1, 16, 4, 10, backend=backend).detach() * 10  # exp of the logits would overflow
    got, want = attention(qkv, 1, backend=backend), attention_formula(qkv.double(), 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


@TRITON
def test_keeps_input_output_and_a_number_a_query(backend):
    qkv, kept = packed(2, 2, 16, 4, 4, backend=backend), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = attention(qkv, 2, backend=backend)
    assert {t.data_ptr() for t in kept} >= {qkv.data_ptr(), y.data_ptr()}
    assert sum(t.numel() for t in kept) == qkv.numel() + y.numel() + 2 * 2 * 16


@TRITON
def test_repeats_to_the_bit_and_registers(backend):
    qkv = packed(2, 1, 16, 6, 6, backend=backend)
    first, again = (torch.autograd.grad(attention(qkv, 1, backend=backend).sin().sum(), qkv)[0] for _ in range(2))
    assert torch.equal(first, again)
    with torch.no_grad():
        opcheck(torch.ops.gdd_fast.attention.default, (qkv.detach(), 1, True))
        y, lse = torch.ops.gdd_fast.attention(qkv, 1, True)
        opcheck(torch.ops.gdd_fast.attention_backward.default, (y, qkv.detach(), y, lse, 1, True))
    function = lambda qkv: attention(qkv * 2, 1, backend=backend).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(qkv), qkv)[0] for f in (compiled, function)))


@BACKENDS
def test_empty_batch(backend):
    qkv = packed(0, 1, 16, 4, 4, backend=backend)
    y = attention(qkv, 1, backend=backend)
    assert y.shape == (0, 16, 4, 4) and torch.autograd.grad(y.sum(), qkv)[0].shape == qkv.shape


@ORDERS
def test_gradients_of_the_definitions_once_and_twice(order):
    qkv = packed(1, 2, 2, 2, 2).double().detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, 2, order, "torch"), (qkv,))
    assert torch.autograd.gradcheck(lambda x: attention_formula(x, 2, order), (qkv,))
    assert torch.autograd.gradgradcheck(lambda x: attention_formula(x, 2, order), (qkv,))


def test_blocks_in_channels_last_are_not_copied():
    qkv = packed(2, 2, 16, 3, 3)
    q, k, v = _tokens(qkv, 2, "blocks")
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} == {qkv.untyped_storage().data_ptr()}
    assert attention(qkv, 2, "blocks", "torch").is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("frozen", [False, True])
def test_qkv_convolution_gives_blocks_and_keeps_edms_order(frozen):
    """Its parameters, and their gradients, are those of a plain convolution whose result is interleaved."""
    torch.manual_seed(0)
    layer, x = QkvConv2d(16, 2), torch.randn(2, 16, 3, 3).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    torch.nn.init.normal_(layer.bias)
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    inputs = [x] if frozen else [x, layer.weight, layer.bias]
    want = edm(plain, 2)
    expected = torch.autograd.grad(want.sin().sum(), inputs)
    layer.requires_grad_(not frozen)
    y = attention(layer(x), 2, "blocks")
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(y.sin().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_auto_is_pytorch_until_something_is_measured(monkeypatch):
    monkeypatch.setattr(backends_module, "_triton_obstacle", lambda device: None)
    assert resolve("auto", OPERATOR, "cuda") == resolve("auto", OPERATOR, "cpu") == "torch"
    assert resolve("triton", OPERATOR, "cuda") == "triton"


def test_bad_calls_are_refused():
    with pytest.raises(InputError, match="for 2 heads"):
        attention(torch.zeros(1, 9, 4, 4), 2)
    with pytest.raises(InputError, match="'qkv'"):
        attention(torch.zeros(1, 48, 4, 4), 1, "qkv")
    with pytest.raises(BackendError, match="no cuda implementation"):
        attention(torch.zeros(1, 48, 4, 4), 1, backend="cuda")


@TRITON
def test_what_the_kernels_do_not_take_is_refused(backend):
    for qkv in (torch.zeros(1, 36, 4, 4), torch.zeros(1, 48, 4, 4, dtype=torch.float64)):
        with pytest.raises(BackendError, match="heads of 16, 32"):
            attention(qkv.to(device_for(backend)), 1, backend=backend)
    if device_for(backend) == "cpu":
        with pytest.raises(BackendError, match="bfloat16"):
            attention(torch.zeros(1, 48, 4, 4, dtype=torch.bfloat16), 1, backend=backend)


def kernel_cases(name: str, entry: dict[str, int], strides: tuple[int, int, int]) -> list[TritonCase]:
    direction, head_dim, kind = name.split("-")
    data = "*bf16" if kind == "half" else "*fp32"
    tail = {"tokens": "i32", "heads": "i32", "scale": "fp32"}
    stride_h, stride_c, stride_j = strides
    layout = {"C": 256, "D": int(head_dim), "STRIDE_H": stride_h, "STRIDE_C": stride_c, "STRIDE_J": stride_j}
    options = {key: entry[key] for key in ("num_warps", "num_stages", "maxnreg") if key in entry}
    constants = layout | {key: entry[key] for key in ("BLOCK_Q", "BLOCK_K")}
    if direction == "forward":
        signatures = {"forward_kernel": {"qkv_ptr": data, "y_ptr": data, "lse_ptr": "*fp32"}}
    else:
        ends = {"dy_ptr": data, "lse_ptr": "*fp32", "delta_ptr": "*fp32", "dqkv_ptr": data}
        signatures = {
            "backward_q_kernel": {"qkv_ptr": data, "y_ptr": data, **ends},
            "backward_kv_kernel": {"qkv_ptr": data, **ends},
        }
    from gdd_fast.kernels.attention import channels_at_once

    chunk = {"CHUNK": channels_at_once(int(head_dim), 2 if kind == "half" else 4)}
    return [
        TritonCase(kernel, types | tail, constants | (chunk if kernel == "backward_q_kernel" else {}), options)
        for kernel, types in signatures.items()
    ]


def entries() -> dict[str, dict[str, int]]:
    with open(f"{kernels_path[0]}/tuned.json") as file:
        return json.load(file)["attention"]["default"]


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("forward-64-half", "backward-256-half") else pytest.param(n, marks=pytest.mark.slow)
        for n in entries()
    ],
)
def test_kernels_compile_for_ampere_and_hopper(name):
    """At every head width and type of the networks, in both orders, without spilling."""
    pytest.importorskip("triton")
    head_dim = int(name.split("-")[1])
    assert head_dim in HEAD_DIMS
    cases = []
    for strides in ((3 * head_dim, 3, 1), (head_dim, 1, 256)):
        cases += kernel_cases(name, entries()[name], strides)
    for resources in compile_triton("gdd_fast.kernels.attention", cases):
        resources.assert_no_spills()
        assert resources.shared <= 160 * 1024, resources
