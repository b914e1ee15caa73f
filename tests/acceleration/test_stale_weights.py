"""Weights may change in any way, and what is computed next is of the new ones.

PyTorch counts changes of a tensor in `_version`; fused optimizers, writes through `.data` or shared memory and FSDP2 do
not move it. So each test lets a network compute, in all turns and types, changes its weights in one way, and compares
it with a network that was made anew with the same state and never computed before.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import edm_style
from gdd_fast import accelerate
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.precond import EDMPrecond

Change = Callable[[nn.Module], None]


# --- networks


class Block(nn.Module):
    """Convolution, norm and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.norm(self.conv(x))))


class At(nn.Module):
    """A denoiser as a function of the image alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x, torch.tensor([1.0, 2.0]))
        return y if isinstance(y, Tensor) else y.sample


def diffusers() -> ModuleType:
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    pytest.importorskip("diffusers.training_utils")
    return sys.modules["diffusers"]


def edm() -> nn.Module:
    return At(edm_style.UNet(channels=8))


def ours() -> nn.Module:
    net = EDMPrecond(16, 3, **ncsnpp(model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[16]))
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) / 10)  # some start at zero
    net.dtype = torch.bfloat16
    return At(net)


def unet2d() -> nn.Module:
    return At(
        diffusers().UNet2DModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )


NETWORKS = {"conv and batch norm": Block, "EDM": edm, "diffusers": unet2d, "gdd_fast": ours}


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def fast(name: str) -> nn.Module:
    """The network on our operators."""
    net = fresh(name)
    return net if name == "gdd_fast" else accelerate(net.requires_grad_(False))


def outcome(net: nn.Module) -> list[Tensor]:
    """Outputs and gradients of the image in every way that a layer could remember its weights for."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    trained = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(False)
    results = []
    with torch.no_grad():
        results.append(net(x))
    with torch.inference_mode():
        results.append(net(x).clone())
    with torch.autocast("cpu", torch.bfloat16):
        results.append(net(x.clone().requires_grad_()).detach().float())
    image = x.clone().requires_grad_()
    y = net(image)
    results += [y.detach(), *torch.autograd.grad(y.square().sum(), image)]
    for p, wanted in zip(net.parameters(), trained, strict=True):
        p.requires_grad_(wanted)
    return results


def assert_follows(name: str, change: Change, net: nn.Module | None = None) -> None:
    net = fast(name) if net is None else net
    before = outcome(net)
    change(net)
    other = fresh(name)
    other.load_state_dict(net.state_dict())
    got, want = outcome(net), outcome(other)
    for i, (a, b, old) in enumerate(zip(got, want, before, strict=True)):
        tolerance = 0.03 if i == 2 or name == "gdd_fast" else 1e-3
        assert (a - b).norm() <= tolerance * b.norm(), f"result {i} is off by {((a - b).norm() / b.norm()).item():.3f}"
        assert (b - old).norm() > 2 * tolerance * b.norm(), "the change would not have shown"


# --- ways to change weights


def halved(net: nn.Module) -> dict[str, Tensor]:
    return {name: t / 2 if t.is_floating_point() else t for name, t in net.state_dict().items()}


def every(function: Callable[[nn.Parameter], object]) -> Change:
    return lambda net: [function(p) for p in net.parameters()] and None


def numpy_view(p: nn.Parameter) -> None:
    p.detach().numpy()[...] *= 0.5


def set_(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.set_(p.detach() / 2)


def no_version(p: nn.Parameter) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
        p.mul_(0.5)


def foreach(net: nn.Module) -> None:
    torch._foreach_mul_([p.detach() for p in net.parameters()], 0.5)


def assign(net: nn.Module) -> None:
    net.load_state_dict(halved(net), assign=True)


def to_empty(net: nn.Module) -> None:
    state = {name: t.clone() for name, t in halved(net).items()}
    net.to_empty(device="cpu").load_state_dict(state)


def vector(net: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net.parameters()) / 2, net.parameters())


def swapped(net: nn.Module) -> None:
    for name, p in list(net.named_parameters()):
        holder, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(holder), leaf, nn.Parameter(p.detach() / 2, requires_grad=p.requires_grad))


def tensors_swapped(net: nn.Module) -> None:
    for p in net.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() / 2, requires_grad=p.requires_grad))


def diffusers_average(net: nn.Module) -> None:
    average = diffusers().training_utils.EMAModel(net.parameters(), decay=0.9)
    for p in average.shadow_params:
        p.mul_(0.5)
    average.store(net.parameters())
    average.copy_to(net.parameters())


def diffusers_restore(net: nn.Module) -> None:
    diffusers_average(net)
    average = diffusers().training_utils.EMAModel(net.parameters(), decay=0.9)
    average.store(net.parameters())
    every(lambda p: p.data.fill_(0.1))(net)
    outcome(net)
    average.restore(net.parameters())


def inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        for p in net.parameters():
            p.mul_(0.5)


def fused_adam(net: nn.Module) -> None:
    """Frozen in one turn and trained in the other, as a critic or a fake score is."""
    optimizer = torch.optim.AdamW(net.requires_grad_(True).parameters(), lr=0.05, fused=True)
    for _ in range(2):
        net(torch.ones(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outcome(net)
    net.requires_grad_(False)


CHANGES: dict[str, Change] = {
    "in place": every(lambda p: p.detach().mul_(0.5)),
    "data in place": every(lambda p: p.data.mul_(0.5)),
    "data replaced": every(lambda p: setattr(p, "data", p.data / 2)),
    "numpy": every(numpy_view),
    "set_": every(set_),
    "version kept": every(no_version),
    "foreach": foreach,
    "load_state_dict": lambda net: net.load_state_dict(halved(net)) and None,
    "assign": assign,
    "to_empty": to_empty,
    "vector_to_parameters": vector,
    "parameters replaced": swapped,
    "tensors swapped": tensors_swapped,
    "EMAModel.copy_to": diffusers_average,
    "EMAModel.restore": diffusers_restore,
    "inference mode": inference_mode,
    "fused Adam between turns": fused_adam,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NETWORKS)
def test_changes_are_followed(name: str, change: str) -> None:
    assert_follows(name, CHANGES[change])


@pytest.mark.parametrize("change", ["data in place", "fused Adam between turns"])
def test_changes_of_statistics_are_followed(change: str) -> None:
    def all_of_it(net: nn.Module) -> None:
        CHANGES[change](net)
        for buffer in net.buffers():
            buffer.data.add_(1)

    assert_follows("conv and batch norm", all_of_it)


# --- optimizers


def optimizers() -> list[tuple[str, str]]:
    """Every optimizer of torch.optim with each implementation that it has on a CPU, and those that CUDA graphs can
    capture: these refuse a CPU by its name alone, and compute there what they do on a GPU."""
    found = []
    for name, kind in vars(torch.optim).items():
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        known = inspect.signature(kind).parameters.keys()
        for option in ("plain", "foreach", "fused", "capturable", "capturable foreach"):
            if option != "plain" and not set(option.split()) <= known:
                continue
            try:
                take_step(nn.Linear(2, 2, bias=False), name, option)
            except (RuntimeError, ValueError, AssertionError):
                continue
            found.append((name, option))
    return sorted(found)


def take_step(net: nn.Module, name: str, option: str) -> None:
    """Two steps along random gradients."""
    generator = torch.Generator().manual_seed(2)
    parameters = [p.requires_grad_() for p in net.parameters() if name != "Muon" or p.ndim == 2]
    options = {} if option == "plain" else dict.fromkeys(option.split(), True)
    lr = {"Adadelta": 50.0, "Rprop": 0.05, "SGD": 0.2, "ASGD": 0.2, "LBFGS": 100.0, "Adafactor": 0.5}.get(name, 0.1)
    optimizer = getattr(torch.optim, name)(parameters, lr=lr, **options)

    def loss() -> Tensor:
        for p in parameters:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad.to_sparse() if name == "SparseAdam" else grad
        return torch.ones(())

    with contextlib.ExitStack() as stack:
        for module in [sys.modules[kind.__module__] for kind in type(optimizer).__mro__ if "capturable" in option]:
            if hasattr(module, "_get_capturable_supported_devices"):
                stack.enter_context(patch.object(module, "_get_capturable_supported_devices", lambda **_: ["cpu"]))
        for _ in range(2):
            optimizer.step(loss)
    for p in parameters:
        p.grad = None
    net.requires_grad_(False)


OPTIMIZERS = optimizers()


def test_the_list_of_optimizers_is_one() -> None:
    assert {("Adam", "fused"), ("AdamW", "fused"), ("SGD", "fused"), ("Adagrad", "fused")} <= set(OPTIMIZERS)
    capturable = {"Adadelta", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"}
    for option in ("capturable", "capturable foreach"):
        assert {name for name, kind in OPTIMIZERS if kind == option} >= capturable
    names = {"Adadelta", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"}
    assert names <= dict(OPTIMIZERS).keys()


@pytest.mark.parametrize(("name", "option"), OPTIMIZERS)
def test_optimizers_are_followed(name: str, option: str) -> None:
    # Muon takes matrices alone, which diffusers' attention packs
    assert_follows("diffusers" if name == "Muon" else "conv and batch norm", lambda net: take_step(net, name, option))


# --- averages that are networks of their own


def ema_pytorch_average(net: nn.Module) -> nn.Module:
    average = pytest.importorskip("ema_pytorch").EMA(net, beta=0.5, update_after_step=0, update_every=1)
    average.update()
    outcome(average.ema_model)
    every(lambda p: p.data.mul_(0.25))(net)
    average.update()
    average.update()
    return average.ema_model


def timm_average(net: nn.Module) -> nn.Module:
    pytest.importorskip("vision_libraries", reason="needs timm", exc_type=ImportError)
    average = pytest.importorskip("timm.utils").ModelEmaV3(net, decay=0.5)
    outcome(average.module)
    every(lambda p: p.data.mul_(0.25))(net)
    average.update(net)
    return average.module


def swa_average(net: nn.Module) -> nn.Module:
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    outcome(average.module)
    every(lambda p: p.data.mul_(0.25))(net)
    average.update_parameters(net)
    return average.module


@pytest.mark.parametrize("name", ["conv and batch norm", "EDM", "gdd_fast"])
@pytest.mark.parametrize("average", [ema_pytorch_average, timm_average, swa_average])
def test_averages_are_followed(name: str, average: Callable[[nn.Module], nn.Module]) -> None:
    net = fast(name)
    outcome(net)
    averaged = average(net)
    other = fresh(name)
    other.load_state_dict(averaged.state_dict())
    for got, want in zip(outcome(averaged), outcome(other), strict=True):
        assert (got - want).norm() <= 0.03 * want.norm()


# --- nothing is there to grow old


@pytest.mark.parametrize("name", NETWORKS)
def test_no_tensor_is_kept_but_parameters_and_buffers(name: str) -> None:
    net = fast(name)
    outcome(net)
    known = {id(t) for t in (*net.parameters(), *net.buffers())}
    seen: set[int] = set()

    def walk(value: object, path: str) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            assert id(value) in known, f"{path} keeps a tensor {tuple(value.shape)}"
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")
        elif isinstance(value, list | tuple | set):
            for item in value:
                walk(item, f"{path}[]")
        elif hasattr(value, "__dict__") and not inspect.isclass(value) and not inspect.isroutine(value):
            walk(vars(value), path)

    walk(net, "net")
    assert len(seen) > 50
