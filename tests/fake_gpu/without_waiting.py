"""Run by tests/distill/test_fake_gpu.py in a process that has the fake GPU. Tensors have shapes and no values; the
operators are those that a GPU runs by default, without what their kernels compute."""

from dataclasses import replace

import pytest
import torch
from edm_reference import SIZE, SMALL, fill
from tiny_run import ALONE, BATCH, CLASSES, tiny_config, write_inputs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from gdd_fast.config import RECIPES
from gdd_fast.device import fast_layout
from gdd_fast.distill import components, gdd
from gdd_fast.distill.gdd import Distillation
from gdd_fast.engine.fold import fold, make_target
from gdd_fast.models.backbones import build_backbone
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.training.exchange import GradientExchange
from gdd_fast.training.optimizer import StepGuard, make_adam
from rehearsal import CaptureError, forbid_waiting

GPU = torch.device("cuda", 0)
LOGGED = {"loss_g", "loss_d", "r1_penalty", "grad_norm_g", "grad_norm_d", "grad_norm_r1"}
LOGGED |= {f"{name}_{kind}" for name in ("logit", "sign_accuracy") for kind in ("fake", "real")}


class Called(TorchDispatchMode):
    """The names of our operators that are called, and the maps and weights that convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.maps: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("gdd_fast::"):
            self.names.add(name.removeprefix("gdd_fast::"))
        if name.startswith("aten::convolution"):
            self.maps += args[: 3 if "backward" in name else 2]
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def to_gpu(module: nn.Module) -> None:
    """Tensors without values in place of the module's own, laid out like these."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, t in kept.items():
                if t is not None:
                    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU)
                    kept[name] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake


def check(maps: list[Tensor], layouts: dict[torch.dtype, torch.memory_format]) -> None:
    """Each is in the memory format of its type: from any other, cuDNN would copy it."""
    wrong = [(t.dtype, tuple(t.shape), t.stride()) for t in maps if not t.is_contiguous(memory_format=layouts[t.dtype])]
    assert maps and not wrong, (len(maps), wrong[:5])


WAITS = {
    "item": Tensor.item,
    "bool": bool,
    "nonzero": Tensor.nonzero,
    "to the host": Tensor.cpu,
    "into the host's": lambda t: torch.zeros(t.shape).copy_(t),
    "from the host": lambda t: t.copy_(torch.zeros(t.shape)),
    "a number": lambda t: torch.tensor(2.0, device=t.device),
}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("wait", WAITS)
def test_waiting_would_be_seen(wait, shape):
    t = torch.ones(shape, device=GPU)
    with forbid_waiting(), pytest.raises(CaptureError):
        WAITS[wait](t + 1)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    write_inputs(folder, CLASSES)
    return folder


@pytest.mark.parametrize(
    ("precision", "processes", "others"),
    [("fast", 1, {}), ("public", 2, {}), ("fast", 1, {"cond": True, "reuse_fakes": True})],
    ids=["fast", "public", "with classes"],
)
def test_nothing_in_an_iteration_waits(inputs, conditional, monkeypatch, precision, processes, others):
    """Through all three steps and the optimizers; of two processes, what comes before and after their exchange."""
    # for operators and memory formats; networks are built on the CPU
    monkeypatch.setattr(components, "pick_device", lambda option: GPU)
    monkeypatch.setattr(gdd, "fast_layout", lambda _, precision: fast_layout(GPU, precision))
    weights = lambda name, path: build_backbone(name, None, 32).state_dict()
    monkeypatch.setattr(components, "load_backbone_weights", weights)
    with unset_fake_temporarily():
        backbones = {"backbones": ("vgg16_bn", "tf_efficientnet_lite0"), "batch_gpu": 2}
        folder = conditional if others else inputs
        config = tiny_config(folder, **backbones, r1_interval=3, r1_gamma=0.1, **{**RECIPES[precision], **others})
        task = Distillation(config, components.build(config), ALONE)
    task.random.generator = None  # a generator of numbers belongs to a device that has some
    task.world = type(ALONE)(0, processes, GPU)
    layouts = {torch.bfloat16: torch.channels_last, torch.float32: fast_layout(GPU, config.discriminator.d_precision)}
    for module in {task.generator, task.features, task.r1_features, task.heads}:
        to_gpu(module)
    task.adversary.weights = [p for p in task.heads.parameters() if p.requires_grad]
    for name, net in (("g_guard", task.generator), ("d_guard", task.heads), ("r1_guard", task.heads)):
        guard = StepGuard.__new__(StepGuard)  # whose own would pin memory
        guard.name, guard.nonfinite = name, config.run.nonfinite
        averages = {p: torch.empty_like(p) for p in net.parameters()} if net is task.generator else None
        guard.optimizer = make_adam(net.parameters(), 1e-3, averages=averages)
        guard.optimizer.read_rates()
        guard.count = torch.zeros_like(guard.optimizer.skipped)
        guard._ranks = GradientExchange(net.parameters(), task.world) if processes > 1 else None
        setattr(task, name, guard)
    real = torch.empty(BATCH, 1, 16, 16, device=GPU)
    labels = torch.empty(BATCH, CLASSES, device=GPU) if others else None
    task._fakes = None if task._fakes is None else torch.empty_like(real)
    values: dict[str, Tensor] = {}
    maps: list[Tensor] = []
    with forbid_waiting(), Called() as called:
        for kind, step in (
            ("g", lambda: task._generator_step(labels)),
            ("d", lambda: task._discriminator_step(real, labels)),
            ("r1", lambda: task._r1_step(real, labels)),
        ):
            values |= step()
            maps, called.maps = maps if kind == "r1" else maps + called.maps, []  # not those of second derivatives
            if processes > 1:
                values |= task._apply(kind)
    assert {name: (value.device, value.dim()) for name, value in values.items()} == dict.fromkeys(LOGGED, (GPU, 0))
    kernels = {"group_norm_silu", "group_norm_silu_backward", "residual", "relu_bits_", "max_pool2x2", "adam_ema_"}
    assert kernels <= called.names
    assert {t.dtype for t in maps} == {module.dtype for module in (task.generator, task.heads)}
    if not others:  # the gradients of conditional heads' last maps, of a few pixels, come in NCHW
        check(maps, layouts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_the_engine_neither_waits_nor_changes_the_memory_format(name, dtype):
    target = make_target(GPU, dtype)
    assert {target.norm, target.residual} == {"triton"}
    with unset_fake_temporarily():
        net = fill(GDDPrecond(SIZE, 3, **SMALL[name])).requires_grad_(False)
        unet, conditioning = fold(net, replace(target, device=torch.device("cpu")))
    to_gpu(unet)
    to_gpu(conditioning)
    z, classes = torch.empty(2, 3, SIZE, SIZE, device=GPU), torch.zeros(2, dtype=torch.int64, device=GPU)
    with torch.no_grad(), forbid_waiting(), Called() as called:
        images = unet(z, conditioning(classes))
    assert (images.device, images.dtype, images.shape) == (GPU, torch.float32, z.shape)
    assert {"group_norm_silu", "residual", "pointwise"} <= called.names
    check(called.maps, {dtype: target.layout})
