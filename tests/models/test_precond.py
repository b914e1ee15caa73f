"""Preconditioning: EDM's and GDD's own outputs, the formula's fixed points, and input that does not fit."""

import json
import math
from pathlib import Path

import pytest
import torch
from edm_reference import SIZE, SMALL, fill, inputs
from safetensors.torch import load_file

from gdd_fast.errors import ConfigError
from gdd_fast.models.precond import EDMPrecond, GDDPrecond

OUTPUTS = load_file(Path(__file__).parents[1] / "fixtures" / "edm_outputs.safetensors")
COND = SMALL["ncsnpp_cond"]


@pytest.fixture(scope="module")
def net() -> EDMPrecond:
    return fill(EDMPrecond(SIZE, 3, **COND))


@pytest.mark.parametrize(
    ("cls", "key"),
    [(EDMPrecond, f"{name}.D") for name in SMALL] + [(GDDPrecond, "ncsnpp_cond.GDD"), (GDDPrecond, "adm.GDD")],
)
def test_output_equals_the_original(cls: type[EDMPrecond], key: str) -> None:
    config = SMALL[key.partition(".")[0]]
    with torch.no_grad():
        y = fill(cls(SIZE, 3, **config))(**inputs(config))
    expected = OUTPUTS[key]
    # Each image apart: the two noise levels give outputs of different size.
    errors = (y - expected).abs().amax(dim=(1, 2, 3)) / expected.abs().amax(dim=(1, 2, 3))
    assert errors.max() <= 1e-5


def test_gdd_differs_from_edm_by_the_documented_formula(net: EDMPrecond) -> None:
    gdd = GDDPrecond(SIZE, 3, **COND).eval()
    gdd.load_state_dict(net.state_dict())
    call = inputs(COND)
    sigma = torch.tensor([0.1, 3.0]).reshape(2, 1, 1, 1)
    x = call["x"]
    with torch.no_grad():
        f = net.model(x / (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4, call["class_labels"])
        y = gdd(x, sigma, call["class_labels"])
    offset = sigma - 0.002
    expected = 0.25 / (offset**2 + 0.25) * x + offset * 0.5 / (sigma**2 + 0.25).sqrt() * f
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(gdd(x, 0.002), x, rtol=0, atol=0)


def test_sigma_and_labels_are_broadcast(net: EDMPrecond) -> None:
    x = inputs(COND)["x"]
    labels = torch.eye(10)[[3]]
    with torch.no_grad():
        expected = net(x, torch.tensor([7.0, 7.0]), labels.expand(2, -1))
        for sigma in (
            7,
            7.0,
            torch.tensor(7.0),
            torch.full((1, 1, 1, 1), 7.0),
            torch.tensor([7.0], dtype=torch.float64),
        ):
            torch.testing.assert_close(net(x, sigma, labels), expected)
        torch.testing.assert_close(net(x, 7.0), net(x, 7.0, torch.zeros(2, 10)))
        torch.testing.assert_close(net(x.double(), 7.0, labels.long()), expected)


@pytest.mark.parametrize(
    ("x", "sigma", "labels", "message"),
    [
        ((2, 3, 16), [1.0], (2, 10), r"images \(N, 3, 16, 16\), got \(2, 3, 16\)"),
        ((2, 1, 16, 16), [1.0], (2, 10), "images"),
        ((2, 3, 32, 32), [1.0], (2, 10), "images"),
        ((2, 3, 16, 16), [1.0, 1.0, 1.0], (2, 10), "sigma must hold 1 or 2"),
        ((2, 3, 16, 16), [1.0], (2,), r"one-hot, \(2, 10\), got \(2,\)"),
        ((2, 3, 16, 16), [1.0], (2, 9), "one-hot"),
        ((4, 3, 16, 16), [1.0], (2, 10), "one-hot"),
    ],
)
def test_shapes_that_do_not_fit(net: EDMPrecond, x: tuple, sigma: list, labels: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net(torch.zeros(x), torch.tensor(sigma), torch.zeros(labels))


def test_augment_labels_that_do_not_fit(net: EDMPrecond) -> None:
    x = inputs(COND)["x"]
    with pytest.raises(ConfigError, match="no augmentation layer"):
        net(x, 1.0, augment_labels=torch.zeros(2, 9))
    augmented = EDMPrecond(SIZE, 3, **SMALL["ncsnpp"])
    with pytest.raises(ConfigError, match=r"\(2, 9\), got \(2, 8\)"):
        augmented(x, 1.0, augment_labels=torch.zeros(2, 8))


def test_an_unconditional_network_takes_no_labels() -> None:
    net = EDMPrecond(SIZE, 3, **SMALL["adm"])
    with pytest.raises(ConfigError, match="no classes"):
        net(torch.zeros(2, 3, SIZE, SIZE), 1.0, torch.eye(10)[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "UNet"}, "model_type must be one of SongUNet, DhariwalUNet, got 'UNet'"),
        ({"model_type": ["SongUNet"]}, "model_type"),
        ({"blocks": 3}, "SongUNet has no argument blocks"),
        ({"in_channels": 3}, "no argument in_channels"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"label_dim": -1}, "label_dim"),
        ({"sigma_min": "low"}, "sigma_min"),
        ({"sigma_data": math.nan}, "sigma_data"),
        ({"channel_mult": {"1": 2}}, "channel_mult"),
        ({"img_resolution": "32"}, "img_resolution"),
        ({"dropout": 2.0}, "dropout"),
    ],
)
def test_arguments_that_make_no_network(change: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        EDMPrecond(**{"img_resolution": SIZE, "img_channels": 3, **COND, **change})


@pytest.mark.parametrize("cls", [EDMPrecond, GDDPrecond])
def test_init_config_rebuilds_the_network(cls: type[EDMPrecond]) -> None:
    config = COND | {"channel_mult": (1, 2), "sigma_min": 0.002, "dtype": torch.bfloat16, "use_fp16": True}
    with torch.device("meta"):
        net = cls(SIZE, 3, **config)
        twin = cls(**json.loads(json.dumps(net.init_config(), allow_nan=False)))
    assert twin.init_config() == net.init_config()
    assert (twin.dtype, twin.sigma_eps) == (torch.bfloat16, net.sigma_eps)
    assert (twin.img_resolution, twin.img_channels, twin.label_dim) == (SIZE, 3, 10)
    assert (twin.sigma_min, twin.sigma_max) == (0.002, math.inf)
    assert [(n, p.shape) for n, p in twin.named_parameters()] == [(n, p.shape) for n, p in net.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_half_precision_gives_float32_images(net: EDMPrecond, dtype: torch.dtype | str) -> None:
    half = EDMPrecond(SIZE, 3, **COND, dtype=dtype).eval()
    half.load_state_dict(net.state_dict())
    seen = []
    half.model.enc["16x16_conv"].register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    with torch.no_grad():
        expected, y = net(**inputs(COND)), half(**inputs(COND))
    assert seen == [half.dtype] and half.dtype in (torch.bfloat16, torch.float16)
    assert y.dtype == torch.float32
    assert ((y - expected).abs().max() / expected.abs().max()).item() < 0.05


def test_round_sigma_changes_nothing(net: EDMPrecond) -> None:
    sigma = torch.tensor([0.002, 80.0], dtype=torch.float64)
    assert torch.equal(net.round_sigma(sigma), sigma)
    assert net.round_sigma(80.0).item() == 80.0
