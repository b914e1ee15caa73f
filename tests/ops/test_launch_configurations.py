"""kernels/tuned.json: what overrides what, and the nearest of the measured shapes."""

import contextlib
import importlib
import json
import re
import types

import pytest
import torch

pytest.importorskip("triton")

from gdd_fast import backend
from gdd_fast.errors import BackendError
from gdd_fast.kernels import _launch
from gdd_fast.ops import attention as attention_operator
from gdd_fast.ops import residual

DIRECTIONS = ("group_norm_silu.forward", "group_norm_silu.backward")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def table(monkeypatch):
    """A table of one operator, on a device of architecture 9.0."""
    measured = [
        {"shape": [1, 256, 1024], "options": {"elements": 1}},
        {"shape": [64, 256, 1024], "options": {"elements": 64, "num_warps": 2}},
        {"shape": [64, 768, 64], "options": {"elements": 3}},
    ]
    entries = {
        "default": {"elements": 9, "num_warps": 4, "maxnreg": 5},
        "sm_90": {"num_warps": 8, "measured": measured},
    }
    attention = {"default": {}, "faster_than_sdpa": {"sm_90": [[64, 64, "bfloat16"]]}}
    monkeypatch.setattr(_launch, "table", lambda: {"op": entries, "attention": attention})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _launch.configuration.cache_clear()
    yield
    _launch.configuration.cache_clear()


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((1, 256, 1024), (1, 8)),
        ((3, 256, 1024), (1, 8)),  # in ratio, 3 is nearer to 1 than to 64
        ((512, 128, 1024), (64, 2)),
        ((32, 1152, 64), (3, 8)),
        ((), (9, 8)),
    ],
)
def test_the_nearest_measured_shape_overrides_architecture_and_default(table, shape, want):
    options = _launch.configuration("op", GPU, shape)
    assert (options["elements"], options["num_warps"], options["maxnreg"]) == (*want, 5)


def test_other_architectures_and_the_interpreter_run_by_rule(table, monkeypatch):
    rule = {"elements": 9, "num_warps": 4, "maxnreg": 5}
    assert _launch.configuration("op", CPU, (1, 256, 1024)) == rule
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _launch.configuration("op", GPU, (1, 256, 1024)) == rule


def test_auto_takes_the_attention_kernels_where_they_were_measured_to_be_faster(table):
    qkv = torch.empty(1, 3 * 128, 8, 8, dtype=torch.bfloat16)
    assert attention_operator._measured_faster(qkv.to("meta"), 2) is True
    assert attention_operator._measured_faster(qkv.to("meta"), 1) is False  # another width
    assert attention_operator._measured_faster(qkv.float().to("meta"), 2) is False


def test_every_kernel_has_a_rule_and_measurements_are_well_formed():
    folder = _launch.Path(_launch.__file__).parent
    table = json.loads((folder / "tuned.json").read_text())
    assert table.pop("frozen_conv2d_relu").keys() == {"faster_by_cudnn"}  # whose kernels are those of relu_bits
    sources = "".join(path.read_text() for path in folder.glob("*.py"))
    asked = re.findall(r'configuration\(f?"([^"]+)"', sources)
    wanted = {name for one in asked for name in (DIRECTIONS if "{" in one else [one])}
    assert wanted == table.keys()
    for operator, entries in table.items():
        assert entries["default"], operator
        for name, entry in entries.items():
            assert name in ("default", "faster_than_sdpa") or name.startswith("sm_"), f"{operator}: {name}"
            for measured in entry.get("measured", ()):
                assert len(measured["shape"]) == 3 and measured["options"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"BLOCK": 256, "num_warps": 4',
            '"BLOCK": 1000, "num_warps": 4',
            "relu_bits, default, BLOCK: a power of two .*1000",
        ),
        ('"elements": 4096, ', "", "group_norm_silu.forward, default: elements missing"),
        ('"num_warps"', '"num_wraps"', "num_warps missing"),
        ('"residual"', '"resldual"', "the table: residual missing"),
        (
            '"faster_by_cudnn": {}',
            '"faster_by_cudnn": {"sm_90": [[64, 64, 3, 1, 224, "float32"]]}',
            "frozen_conv2d_relu, faster_by_cudnn, sm_90: .*kernel, stride, side, float16",
        ),
        ("{", "[" * 100_000 + "{", "cannot be read"),
    ],
)
def test_a_damaged_table_is_named_and_the_kernels_are_not_passed_over(monkeypatch, tmp_path, old, new, said):
    damaged = tmp_path / "tuned.json"
    damaged.write_text(_launch.TABLE.read_text().replace(old, new, 1))
    monkeypatch.setattr(_launch, "TABLE", damaged)
    for cached in (_launch.table, backend._check_launch_table):
        cached.cache_clear()
    try:
        with pytest.raises(BackendError, match=rf"tuned\.json: .*{said}"):
            backend.resolve("auto", residual.OPERATOR, "cuda")
    finally:
        _launch.table.cache_clear()


LAUNCHERS = {
    "attention": ("attention", "attention_backward"),
    "group_norm_silu": ("statistics", "forward", "backward"),
    "max_pool2x2": ("max_pool2x2", "max_pool2x2_backward"),
    "relu_bits": ("relu_bits_", "mask_bits"),
    "residual": ("residual",),
}


@pytest.mark.parametrize("operator", LAUNCHERS)
def test_launchers_run_on_the_gpu_of_their_tensor(operator, monkeypatch):
    """Triton launches on the current device, which need not be the tensor's."""
    current = [0]

    @contextlib.contextmanager
    def device(other: torch.device):
        current.append(other.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    module = importlib.import_module(f"gdd_fast.kernels.{operator}")
    for name in LAUNCHERS[operator]:
        launcher = getattr(module, name)
        seen = _launch.on_its_device(lambda x: current[-1])  # as it is around the launcher
        assert launcher.__code__ is seen.__code__, f"{operator}.{name} is not on its device"
        for index in (0, 1):
            assert seen(types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))) == index
    assert seen(types.SimpleNamespace(is_cuda=False)) == 0 and current == [0]
