"""Layers whose forward, parameters or surroundings are not what they were: hooks, offloading, casting, quantised and
parametrized weights, torch.func and tracing. An accelerated network computes what the original does, before and after.
"""

import copy

import pytest
import torch
from test_stale_weights import fresh
from torch import Tensor, nn

from gdd_fast import accelerate, restore
from gdd_fast.errors import InputError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pair(name: str, *, frozen: bool = True) -> tuple[nn.Module, nn.Module]:
    """A network, and the same accelerated."""
    net = fresh(name).requires_grad_(not frozen)
    return net, accelerate(copy.deepcopy(net), backend="torch" if name != "conv and batch norm" else "auto")


def assert_same(fast: nn.Module, net: nn.Module, x: Tensor = X) -> None:
    results = []
    for n in (fast, net):
        image = x.clone().requires_grad_()
        y = n(image)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), image)[0]))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


def triple(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 3 * forward(*args, **kwargs)


LAYERS = [
    *[("conv and batch norm", layer) for layer in ("conv", "norm", "relu", "out", "")],
    *[("EDM", f"net.enc.{layer}") for layer in ("8x8_block0.norm0", "8x8_block0.conv0", "8x8_block0.norm2")],
    *[("EDM", f"net.enc.{layer}") for layer in ("8x8_block0.affine", "8x8_block0", "8x8_aux_residual")],
    *[("diffusers", f"net.mid_block.resnets.0.{layer}") for layer in ("norm1", "conv1", "nonlinearity")],
    *[("diffusers", f"net.mid_block.attentions.0.{layer}") for layer in ("to_q", "group_norm", "to_out.0")],
]


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("when", ["after", "before"])
def test_a_forward_replaced_on_the_instance_runs(name: str, layer: str, when: str) -> None:
    net, fast = pair(name)
    if when == "before":
        fast = restore(fast)
    plain = net(X)
    for n in (net, fast):
        triple(n.get_submodule(layer))
    if when == "before":
        _, report = accelerate(fast, backend="torch", report=True)
        assert not any(entry.path == layer for entry in report.replaced)
    assert_same(fast, net)
    assert (net(X) - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("name", ["conv and batch norm", "EDM", "diffusers"])
def test_hooks_for_all_modules_are_heard(name: str) -> None:
    net, fast = pair(name)
    plain = net(X)
    kinds = (
        nn.GroupNorm,
        nn.BatchNorm2d,
        type(net.get_submodule("net.enc.8x8_block0.norm0")) if name == "EDM" else nn.ReLU,
    )

    def double(module, inputs, output):
        return 2 * output if isinstance(module, kinds) else None

    with nn.modules.module.register_module_forward_hook(double):
        assert_same(fast, net)
        assert (net(X) - plain).norm() > 1e-2 * plain.norm()
    assert_same(fast, net)


@pytest.fixture
def hf():
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", ["conv and batch norm", "EDM", "diffusers"])
def test_hooks_of_accelerate_and_restoring_under_them(hf, name: str) -> None:
    net, fast = pair(name)
    for module in fast.modules():
        hf.hooks.add_hook_to_module(module, hf.hooks.AlignDevicesHook(execution_device=torch.device("cpu")))
    assert_same(fast, net)
    assert_same(restore(fast), net)  # the hooks have kept the methods of the time between
    hf.hooks.remove_hook_from_module(fast, recurse=True)
    assert_same(fast, net)


@pytest.mark.parametrize("name", ["conv and batch norm", "EDM", "diffusers"])
def test_sequential_offload(hf, name: str) -> None:
    net, fast = pair(name)
    hf.cpu_offload(fast, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(p.is_meta for p in fast.parameters())
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="sequential offload"):
        accelerate(fast)


@pytest.mark.parametrize("when", ["after", "before"])
def test_layerwise_casting(when: str) -> None:
    net, fast = pair("diffusers")
    fast = restore(fast) if when == "before" else fast
    plain = net(X)
    for n in (net, fast):
        n.net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if when == "before":
        accelerate(fast, backend="torch", report=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
        assert (net(X) - plain).norm() > 1e-3 * plain.norm()


# --- weights of a class of their own


class Int8(Tensor):
    """A weight in int8 with a scale a row that can be multiplied and nothing else, as torchao's."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> "Int8":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data, scale

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"Int8: {function}")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return nn.functional.linear(x, weight.data8 * weight.scale, bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def quantise(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8.of(module.weight.detach()), requires_grad=False)


def torchao(net: nn.Module) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(net, Int8WeightOnlyConfig())


@pytest.mark.parametrize("way", [quantise, torchao])
@pytest.mark.parametrize("when", ["after", "before"])
def test_quantised_weights(way, when: str) -> None:
    net, fast = pair("diffusers")
    fast = restore(fast) if when == "before" else fast
    way(net), way(fast)
    if when == "before":
        accelerate(fast, backend="torch")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrized_after_accelerating_and_trained() -> None:
    net, fast = pair("conv and batch norm")
    for n in (net, fast):
        for layer, name in ((n.conv, "weight"), (n.norm, "weight")):
            nn.utils.parametrize.register_parametrization(layer, name, Halved())
    assert_same(fast, net)
    grads = []
    for n in (net, fast):
        originals = [layer.parametrizations.weight.original.requires_grad_() for layer in (n.conv, n.norm)]
        grads.append(torch.autograd.grad(n(X).square().sum(), originals))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="conv has become a ParametrizedConv2d"):
        restore(fast)
    for layer in (fast.conv, fast.norm):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(restore(fast).conv) is nn.Conv2d


@pytest.mark.parametrize("name", ["conv and batch norm", "EDM", "diffusers"])
def test_functional_call(name: str) -> None:
    net, fast = pair(name)
    fast(X)
    state = {k: p.detach() / 2 for k, p in net.named_parameters()}
    got, want = (torch.func.functional_call(n, state, (X,)) for n in (fast, net))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# --- transforms and tracing


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["conv and batch norm", "EDM", "diffusers"])
def test_torch_func(name: str, frozen: bool) -> None:
    net, fast = pair(name, frozen=frozen)
    loss = lambda n: torch.func.grad(lambda x: n(x).square().sum())(X)
    torch.testing.assert_close(loss(fast), loss(net), rtol=1e-4, atol=1e-4)

    def gradients(n: nn.Module) -> dict[str, Tensor]:
        call = lambda parameters: torch.func.functional_call(n, parameters, (X,)).square().sum()
        return torch.func.grad(call)({k: p.detach() for k, p in n.named_parameters()})

    torch.testing.assert_close(gradients(fast), gradients(net), rtol=1e-3, atol=1e-3)


def test_forward_mode() -> None:
    net, fast = pair("conv and batch norm")
    torch.testing.assert_close(*(torch.func.jvp(n, (X,), (X.cos(),)) for n in (fast, net)), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X.cos())
        got, want = (torch.autograd.forward_ad.unpack_dual(n(dual)).tangent for n in (fast, net))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv and batch norm", "EDM"])
def test_a_trace_is_of_pytorch_alone(name: str) -> None:
    net, fast = pair(name)
    traced = torch.jit.trace(fast, (X,))
    assert "gdd_fast" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X.cos()), net(X.cos()), rtol=1e-4, atol=1e-4)


def test_symbolic_trace_and_export() -> None:
    net, fast = pair("conv and batch norm")
    for traced in (torch.fx.symbolic_trace(fast), torch.export.export(fast, (X,)).module()):
        torch.testing.assert_close(traced(X.cos()), net(X.cos()), rtol=1e-4, atol=1e-4)
