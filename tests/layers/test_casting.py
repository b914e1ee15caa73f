"""Networks that are cast to half precision as PyTorch's modules are: only weights lose bits, not the embedding."""

import copy

import pytest
import torch
from diffusers_unets import CONFIGS, unet
from edm_reference import SIZE, SMALL, fill, inputs
from torch import nn

import edm_style
from gdd_fast import accelerate, restore
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import WeightsError
from gdd_fast.interop import hub
from gdd_fast.layers.convolution import hold_frozen_weights
from gdd_fast.layers.embedding import FourierEmbedding
from gdd_fast.models.files.load import load_network
from gdd_fast.models.precond import GDDPrecond

NCSNPP = SMALL["ncsnpp_cond"]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def network() -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **NCSNPP)).requires_grad_(False)


def with_rounded_parameters(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What a network cast to `dtype` is to compute: float32 arithmetic on weights that were rounded, and on nothing
    else that was."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.to(dtype))
    return net


@HALVES
@torch.no_grad()
def test_a_plain_network(dtype) -> None:
    want = with_rounded_parameters(network(), dtype)(**inputs(NCSNPP))
    net = network().to(dtype) if dtype == torch.bfloat16 else network().half()
    assert net.model.map_layer0.weight.dtype == dtype
    torch.testing.assert_close(net(**inputs(NCSNPP)), want, rtol=1e-4, atol=1e-4)
    coarse = with_rounded_parameters(network(), dtype)
    coarse.model.map_noise.freqs.copy_(coarse.model.map_noise.freqs.to(dtype))
    assert (coarse(**inputs(NCSNPP)) - want).abs().max() > 1e-3, "rounding the frequencies would have shown"


@HALVES
@torch.no_grad()
def test_frozen_weights_held_in_the_compute_type(dtype) -> None:
    net = network()
    net.dtype = dtype
    want = net(**inputs(NCSNPP))
    trained = net.model.dec["8x8_block0"].conv1.weight.requires_grad_()
    hold_frozen_weights(net, dtype)
    assert net.model.dec["8x8_block0"].conv0.weight.dtype == dtype and trained.dtype == torch.float32
    assert torch.equal(net(**inputs(NCSNPP)), want)


@HALVES
def test_a_generator_of_a_network_that_was_cast(dtype) -> None:
    want = OneStepGenerator(with_rounded_parameters(network(), dtype), dtype=dtype)(2, 3, seeds=[0, 1], output="float")
    got = OneStepGenerator(network().to(dtype), dtype=dtype)(2, 3, seeds=[0, 1], output="float")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@HALVES
def test_frequencies_survive_storing_and_casting_back(dtype, tmp_path) -> None:
    net = network()
    freqs = net.model.map_noise.freqs.clone()
    hub.save_pretrained(net, tmp_path, dtype=dtype)
    assert torch.equal(load_network(tmp_path).model.map_noise.freqs, freqs)
    assert torch.equal(net.to(dtype).float().model.map_noise.freqs, freqs)
    assert net.double().model.map_noise.freqs.dtype == torch.float64


def test_coarse_frequencies_are_refused() -> None:
    embedding = FourierEmbedding(8)
    embedding.freqs = embedding.freqs.bfloat16()
    with pytest.raises(WeightsError, match="too coarse"):
        embedding(torch.ones(1))


@HALVES
@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch.no_grad()
def test_an_accelerated_network_of_edms_code(dtype, backend) -> None:
    torch.manual_seed(0)
    net = edm_style.UNet().eval()
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 80.0])
    want = with_rounded_parameters(copy.deepcopy(net), dtype)(x, sigma)
    accelerate(net, backend=backend).to(dtype)
    torch.testing.assert_close(net(x, sigma), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(net)(x, sigma), want, rtol=1e-4, atol=1e-4)
    assert type(restore(net).map_noise) is edm_style.FourierEmbedding


def test_other_modules_with_frequencies_are_left() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("freqs", torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, None] * self.freqs

    net = nn.Sequential(Rotary(), nn.Linear(4, 4))
    _, report = accelerate(net, report=True)
    assert not report.replaced
    assert net.half()[0].freqs.dtype == torch.float16


@HALVES
@pytest.mark.parametrize("name", ["ddpm", "filters"])
@torch.no_grad()
def test_an_accelerated_network_of_diffusers(dtype, name) -> None:
    """Its own code casts the embedding with the rest; accelerated, it is as near to float64 as that."""
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    diffusers = pytest.importorskip("diffusers")
    net = unet(diffusers, CONFIGS[name]).requires_grad_(False)
    x, t = torch.randn(2, 3, 16, 16, dtype=dtype), torch.tensor([3, 700])
    plain = copy.deepcopy(net).to(dtype)
    want, eager = copy.deepcopy(plain).double()(x.double(), t).sample, plain(x, t).sample
    got = accelerate(net, backend="torch").to(dtype)(x, t).sample
    assert got.dtype == dtype
    assert (got - want).norm() <= 2 * (eager - want).norm()
