"""accelerate on frozen feature networks: the same function, gradients and state, less kept for backward."""

import copy
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edm_style
from benchmarks.counts.saved_bytes import saved_bytes
from gdd_fast import accelerate
from gdd_fast.acceleration import frozen
from gdd_fast.backend import obstacle
from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops import frozen_conv2d_relu
from whole_networks import assert_accelerates, assert_restores, results

CALL = lambda net, x: net(x)

needs_bits = pytest.mark.skipif(
    obstacle(frozen_conv2d_relu.OPERATOR, "cpp", "cpu") is not None, reason="the extension is not built"
)


@pytest.fixture(autouse=True)
def small_maps_count(monkeypatch):
    monkeypatch.setattr(frozen, "SMALL", 0)


@pytest.fixture(scope="module")
def libraries():
    return pytest.importorskip("vision_libraries", reason="needs timm and torchvision", exc_type=ImportError)


def randomise(net: nn.Module) -> nn.Module:
    """Weights and statistics that matter, frozen, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return net.eval().requires_grad_(False)


def backbone(libraries, name: str) -> nn.Module:
    """A network of timm's or torchvision's; "vgg" is a narrow one of torchvision's layers."""
    torch.manual_seed(0)
    library, _, model = name.rpartition(" ")
    if model == "vgg":
        return randomise(libraries.torchvision.models.vgg.make_layers([16, "M", 32, 32, "M", 64, "M"], batch_norm=True))
    make = libraries.torchvision.models.get_model if library else libraries.timm.create_model
    return randomise(make(model))


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU, called twice."""

    def __init__(self, cin: int = 8, cout: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, padding="same"), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += x
        return self.relu(h)


def small() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)]
    return randomise(nn.Sequential(*stem, Block(), nn.MaxPool2d(2), Block(), nn.Conv2d(8, 4, 1)))


def image(*shape: int, grad: bool = True, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


X = (2, 3, 16, 16)


@needs_bits
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet26", "torchvision vgg", "torchvision resnet18"])
def test_backbones_of_timm_and_torchvision(libraries, name):
    net, x = backbone(libraries, name), image(1, 3, 64, 64)
    before = saved_bytes(net, (x,))
    report = assert_accelerates(net, CALL, (x,))
    left = {entry.kind for entry in report.left}
    assert not left & {"Conv2d", "Conv2dSame", "BatchNorm2d", "BatchNormAct2d", "ReLU", "ReLU6"}, str(report)
    assert saved_bytes(net, (x,)) < 0.25 * before  # of resnet18 most is its 3x3 pooling's
    assert_restores(net, CALL, (x.detach(),))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision vgg16_bn", "torchvision resnet50", "resnet50", "torchvision inception_v3"]
)
def test_large_backbones(libraries, name):
    """In float64: a ReLU of the last maps, of few pixels, that float32's rounding opens in one run and closes in the
    other moves the gradient by a hundredth, whichever run is right."""
    net, x = backbone(libraries, name).double(), image(1, 3, 96, 96)
    want = results(net, CALL, (x,), torch.float64)
    _, report = accelerate(net, report=True)
    assert report.counts["replaced"]["Conv2d"] + report.counts["replaced"]["Conv2dSame"] > 10
    got = results(net, CALL, (x,), torch.float64)
    assert got.keys() == want.keys() >= {"output", "input 0"}
    for result, expected in zip(got.values(), want.values(), strict=True):
        assert (result - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_output_and_gradients(layout, backend):
    net = small().to(memory_format=layout)
    report = assert_accelerates(net, CALL, (image(*X).contiguous(memory_format=layout),), backend=backend)
    assert report.counts["replaced"] >= Counter(Conv2d=6, BatchNorm2d=5)
    assert_restores(net, CALL, (image(*X),))


def test_state_dict_loads_and_saves():
    net, other = accelerate(small()), small()
    x = image(*X, grad=False)
    net(x)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(0.9)
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    with torch.no_grad():
        net[1].running_mean.add_(1)
        other[1].running_mean.add_(1)
    torch.testing.assert_close(net(x), other(x))


def test_training_mode_and_unfreezing_after_the_fact():
    net, stock = accelerate(small()), small()
    x = image(*X)
    net(x)
    for module in (net, stock):
        module.train()
        module.requires_grad_(True)
        module(x).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch.testing.assert_close(net[1].running_var, stock[1].running_var)
    for module in (net, stock):
        module.eval()
    torch.testing.assert_close(net(x), stock(x))
    for module in (net, stock):
        module.requires_grad_(False)
    torch.testing.assert_close(net(x), stock(x))


def test_layers_called_by_themselves_are_what_they_were():
    net, stock = accelerate(small()), small()
    x = image(*X, grad=False)
    assert torch.equal(net[0](x), stock[0](x))
    h = stock[0](x)
    assert torch.equal(net[1](h), stock[1](h))
    seen = []
    for module in (net, stock):
        h = x
        for layer in module:  # a loop of the user's, not the network's own forward
            h = layer(h)
        seen.append(h)
    torch.testing.assert_close(*seen)


def test_hooks_see_what_they_saw():
    net, stock = accelerate(small()), small()
    x = image(*X, grad=False)
    seen = {}
    for name, module in (("fast", net), ("stock", stock)):
        for layer in (0, 1, 3):
            module[layer].register_forward_hook(
                lambda _, inputs, y, key=(name, layer): seen.__setitem__(key, (inputs[0].clone(), y.clone()))
            )
        module(x)
    for layer in (0, 1, 3):
        torch.testing.assert_close(seen["fast", layer], seen["stock", layer])


def test_a_cpus_small_maps_have_pytorchs_batch_norm(monkeypatch):
    """Which costs less than autograd in Python, and keeps them."""
    net = accelerate(randomise(nn.Sequential(nn.BatchNorm2d(4))))
    monkeypatch.setattr(frozen, "SMALL", 2 * 4 * 8 * 8)
    assert saved_bytes(net, (image(2, 4, 8, 7),)) > 0 == saved_bytes(net, (image(2, 4, 8, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_batch_norm_keeps_no_map_and_computes_the_same_bits(dtype):
    """Anywhere: here before its convolution, as in DenseNet, and its parameters in float32 whatever the map is."""
    net = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))).append(nn.BatchNorm2d(3, affine=False).eval())
    stock, x = copy.deepcopy(net), image(*X).detach().to(dtype).requires_grad_()
    accelerate(net)
    assert saved_bytes(net, (x,)) == 0 < saved_bytes(stock, (x,))
    results = [(n(x), *torch.autograd.grad(n(x).sin().sum(), x)) for n in (net, stock)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_replaced_is_left_with_a_reason():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.Sequential(Own(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(3, 2, 1))
    net.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)))
    net.requires_grad_(False)
    trained = nn.Conv2d(3, 3, 1)
    with pytest.warns(UserWarning, match="nothing could be replaced"):
        accelerate(trained)
    _, report = accelerate(nn.Sequential(*net, trained, nn.ReLU()), report=True)
    notes = {entry.path: entry.note for entry in report.left}
    assert not report.replaced
    for path, words in {
        "0": "forward of its own",
        "1": "reflect",
        "2": "2x2",
        "3": "forward of its own|parametrized",
        "4": "requires_grad",
        "5": "trained",
    }.items():
        assert any(word in notes[path] for word in words.split("|")), (path, notes[path])
    assert "2x2" in str(report)


def test_copies_and_pickles():
    net = accelerate(small())
    x = image(*X)
    y = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), y)
    assert saved_bytes(twin, (x,)) == saved_bytes(net, (x,))
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert torch.equal(net(x), y) and not torch.equal(twin(x), y)
    data = pickle.dumps(net)
    assert b"gdd_fast" not in data
    torch.testing.assert_close(pickle.loads(data)(x), y)


def test_autocast_and_half_precision():
    x = image(*X)
    for dtype in (torch.bfloat16, torch.float32):
        net, stock = accelerate(small().to(dtype)), small().to(dtype)
        want = small().double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            got, eager = net(x.to(dtype)), stock(x.to(dtype))
        assert got.dtype == eager.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 2 * (eager.double() - want).norm()


def test_compiles_to_one_graph():
    net, x = accelerate(small()), image(*X)
    y = net(x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    (g,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(g, torch.autograd.grad(net(x).sum(), x)[0])


def test_second_derivatives():
    net, stock = accelerate(small()), small()
    got = []
    for module in (net, stock):
        x = image(*X)
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        got.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


def test_modes_of_gradients_may_change_between_calls():
    net, stock = accelerate(small()), small()
    x = image(*X, grad=False)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), stock(x))
    x = image(*X)
    torch.testing.assert_close(*(torch.autograd.grad(n(x).sum(), x)[0] for n in (net, stock)))
    net.double(), stock.double()
    x = x.detach().double()
    torch.testing.assert_close(net(x), stock(x))


def test_in_place_relu_writes_where_it_did():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)).requires_grad_(False)
    accelerate(net)
    x = image(*X)
    h = F.conv2d(x, net[0].weight, net[0].bias)
    y = net[1](h)
    assert y is h and (h >= 0).all()


def test_threads_do_not_disturb_each_other():
    net, x = accelerate(small()), image(*X, grad=False)
    y = net(x)
    alone = small()[0](x)
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(net, x) for _ in range(40)]
        layers = [pool.submit(net[0], x) for _ in range(40)]
        assert all(torch.equal(done.result(), y) for done in whole)
        assert all(torch.equal(done.result(), alone) for done in layers)


def test_mistakes_are_one_error():
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        accelerate("resnet50")
    with pytest.raises(BackendError, match="unknown backend"):
        accelerate(small(), backend="fast")
    with pytest.raises(InputError, match="meta device"):
        accelerate(nn.Conv2d(3, 3, 1, device="meta"))
    net = small()
    with pytest.raises(BackendError, match="takes CUDA tensors"):
        accelerate(nn.Sequential(edm_style.Conv2d(4, 4, 3, up=True), net), backend="cuda")
    assert type(net[0]) is nn.Conv2d
