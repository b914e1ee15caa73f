"""The networks: EDM's own outputs, names and sizes; half precision; gradients; compilation; initialisation."""

import json
import math
from pathlib import Path

import pytest
import torch
from edm_reference import FULL, SIZE, SMALL, digest, fill, inputs
from safetensors.torch import load_file
from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.layers.convolution import Conv2d, resample_kernel
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.models.edm import DhariwalUNet, SongUNet, adm, ddpmpp, ncsnpp
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.ops.attention import attention
from gdd_fast.ops.resample2d import resample2d

DATA = Path(__file__).parents[1] / "fixtures"
OUTPUTS = load_file(DATA / "edm_outputs.safetensors")
DIGESTS = json.loads((DATA / "edm_state_dicts.json").read_text())
MEMORY_FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def unet_inputs(config: dict) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the preconditioning hands to the U-Net: normalised images, c_noise, labels."""
    call = inputs(config)
    x = call["x"] / (call["sigma"].square() + 0.25).sqrt()[:, None, None, None]
    return x, call["sigma"].log() / 4, call["class_labels"], call["augment_labels"]


def meta_network(name: str) -> EDMPrecond:
    resolution, config = FULL[name]
    with torch.device("meta"):
        return EDMPrecond(resolution, 3, **config)


@MEMORY_FORMATS
@pytest.mark.parametrize("name", SMALL)
def test_output_equals_edm(name: str, memory_format: torch.memory_format) -> None:
    net = fill(EDMPrecond(SIZE, 3, **SMALL[name])).model.to(memory_format=memory_format)
    x, *conditions = unet_inputs(SMALL[name])
    with torch.no_grad():
        y = net(x.to(memory_format=memory_format), *conditions)
    assert relative_error(y, OUTPUTS[f"{name}.F"]) <= 1e-5
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", SMALL)
def test_small_names_and_shapes_equal_edm(name: str) -> None:
    with torch.device("meta"):
        assert digest(EDMPrecond(SIZE, 3, **SMALL[name])) == DIGESTS[name]


@pytest.mark.parametrize("name", FULL)
def test_full_names_and_shapes_equal_edm(name: str) -> None:
    assert digest(meta_network(name)) == DIGESTS[name]


@pytest.mark.parametrize(
    ("name", "millions"), [("cifar10-uncond", 56.40), ("ffhq-afhqv2", 62.76), ("imagenet", 295.90)]
)
def test_parameter_counts_of_the_paper(name: str, millions: float) -> None:
    assert round(sum(p.numel() for p in meta_network(name).parameters()) / 1e6, 2) == millions


@MEMORY_FORMATS
@pytest.mark.parametrize("name", ["ncsnpp", "ddpmpp_cond", "adm_cond"])
def test_bfloat16_is_close_to_float32(name: str, memory_format: torch.memory_format) -> None:
    net = fill(EDMPrecond(SIZE, 3, **SMALL[name])).model.to(memory_format=memory_format)
    x, *conditions = unet_inputs(SMALL[name])
    with torch.no_grad():
        expected = net(x, *conditions)
        y = net(x.to(torch.bfloat16, memory_format=memory_format), *conditions)
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in net.parameters())
    # bfloat16 carries 8 bits; a few dozen layers lose two or three of them.
    assert relative_error(y.float(), expected) < 0.05


def test_normalisation_in_bfloat16_keeps_float32_statistics() -> None:
    """A mean far above the spread: statistics in bfloat16 would lose it entirely."""
    norm = GroupNorm(8)
    x = (torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + 50).bfloat16()
    expected = torch.nn.functional.group_norm(x.double(), 2, eps=1e-5)
    assert relative_error(norm(x, activation=None).double(), expected) < 2**-8


def test_normalisation_with_offset_scale_and_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    x, add, scale, shift = (torch.randn(2, 16, *s, generator=generator) for s in [(4, 4), (), (), ()])
    norm = fill(GroupNorm(16, eps=1e-6))

    def broadcast(v: Tensor) -> Tensor:
        return v[:, :, None, None]

    normed = torch.nn.functional.group_norm(x + broadcast(add), 4, norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm(x, add=add), torch.nn.functional.silu(normed))
    normed = torch.nn.functional.group_norm(x, 4, norm.weight, norm.bias, 1e-6)
    expected = normed * (1 + broadcast(scale)) + broadcast(shift)
    torch.testing.assert_close(norm(x, scale=scale, shift=shift, activation=None), expected)


@pytest.mark.parametrize("heads", [1, 3])
@MEMORY_FORMATS
def test_attention_reads_edms_packing(heads: int, memory_format: torch.memory_format) -> None:
    qkv = torch.randn(2, 3 * 12, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    expected = torch.empty(2, 12, 20)
    size = 12 // heads
    for head in range(heads):
        part = qkv.flatten(2)[:, 3 * size * head : 3 * size * (head + 1)]
        q, k, v = part[:, 0::3], part[:, 1::3], part[:, 2::3]
        weights = (q.transpose(1, 2) @ k / math.sqrt(size)).softmax(dim=2)
        expected[:, size * head : size * (head + 1)] = v @ weights.transpose(1, 2)
    y = attention(qkv, heads)
    torch.testing.assert_close(y.flatten(2), expected)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("up", [True, False])
def test_box_resampling_is_the_filter_it_stands_for(up: bool) -> None:
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    kernel = resample_kernel([1, 1])
    expected = resample2d(x, kernel, up=up, padding=0)
    torch.testing.assert_close(resample2d(x, kernel, up=up, padding=0, box=True), expected)


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 3, 3, 2, 1]])
def test_resampling_keeps_a_constant_image_away_from_the_border(taps: list[float]) -> None:
    x = torch.full((1, 2, 12, 12), 3.0)
    for direction, size in (("up", 24), ("down", 6)):
        y = Conv2d(2, 2, 0, resample_filter=taps, **{direction: True})(x)
        assert y.shape[2:] == (size, size)
        torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.full_like(y[..., 2:-2, 2:-2], 3.0))


@pytest.mark.parametrize("name", ["ncsnpp", "skip", "adm_cond"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    net = fill(EDMPrecond(SIZE, 3, **SMALL[name])).model
    net(*unet_inputs(SMALL[name])).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_dropout_and_label_dropout_act_in_training_only() -> None:
    config = {**SMALL["adm_cond"], "label_dropout": 1.0}
    net = fill(EDMPrecond(SIZE, 3, **config)).model
    x, noise, labels, augment = unet_inputs(config)
    with torch.no_grad():
        kept = net(x, noise, labels, augment)
        dropped = net.train()(x, noise, labels, augment)
        torch.testing.assert_close(dropped, net.eval()(x, noise, torch.zeros_like(labels), augment))
        assert not torch.allclose(dropped, kept)
        for block in net.modules():
            if hasattr(block, "dropout"):
                block.dropout = 0.5
        assert torch.equal(net(x, noise, labels, augment), kept)
        assert not torch.allclose(net.train()(x, noise, labels, augment), dropped)


@pytest.mark.parametrize("name", ["ncsnpp", "adm_cond"])
def test_traces_as_one_graph(name: str) -> None:
    """Without a compiler's time: the graph is captured whole and run as captured."""
    net = fill(EDMPrecond(SIZE, 3, **SMALL[name]))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    call = inputs(SMALL[name])
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call), net(**call))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsnpp", "adm_cond"])
def test_compiles(name: str) -> None:
    net = fill(EDMPrecond(SIZE, 3, **SMALL[name]))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True)
    call = inputs(SMALL[name])
    with torch.inference_mode():
        assert relative_error(compiled(**call), net(**call)) < 1e-5


def test_initialisation_has_edms_spread() -> None:
    torch.manual_seed(0)
    song = SongUNet(16, 3, 3, label_dim=10, model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
    block = song.dec["8x8_in0"]
    xavier = math.sqrt(2 / (128 * 9 + 128 * 9))
    assert block.conv0.weight.std().item() == pytest.approx(xavier, rel=0.02)
    assert block.conv1.weight.std().item() == pytest.approx(xavier * 1e-5, rel=0.02)
    assert block.qkv.weight.std().item() == pytest.approx(math.sqrt(0.2 * 2 / (128 + 384)), rel=0.02)
    assert block.conv0.bias.abs().max() == 0 and song.map_layer0.bias.abs().max() == 0

    dhariwal = DhariwalUNet(16, 3, 3, label_dim=50, model_channels=64, channel_mult=[1, 2], num_blocks=1)
    block = dhariwal.dec["8x8_in0"]
    bound = 1 / math.sqrt(128 * 9)
    assert block.conv0.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert block.conv0.bias.abs().max().item() == pytest.approx(bound, rel=0.1)
    assert block.conv1.weight.abs().max() == 0 and block.proj.bias.abs().max() == 0
    assert dhariwal.map_label.weight.std().item() == pytest.approx(1, rel=0.05)

    fourier = SongUNet(16, 3, 3, model_channels=512, channel_mult=[1], num_blocks=1, embedding_type="fourier")
    assert fourier.map_noise.freqs.std().item() == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_mult": []}, "channel_mult"),
        ({"channel_mult": [1, 2.5]}, r"channel_mult\[1\]"),
        ({"channel_mult": [1] * 6}, "cannot be halved"),
        ({"model_channels": 0}, "model_channels"),
        ({"model_channels": 130}, "groups"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"encoder_type": "residuals"}, "encoder_type"),
        ({"decoder_type": "residual"}, "decoder_type"),
        ({"embedding_type": "sine"}, "embedding_type"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter"),
        ({"resample_filter": [1.0] * 34}, "resample_filter"),
        ({"resample_filter": [1, math.nan]}, "resample_filter"),
        ({"resample_filter": ["a", "b"]}, "resample_filter"),
        ({"attn_resolutions": [16] * 17}, "attn_resolutions"),
        ({"channel_mult": [1] * 17}, "channel_mult"),
        ({"num_blocks": 3000}, "num_blocks 3000 at 4 resolutions makes more than 512 blocks"),
        ({"num_blocks": 2**40}, "num_blocks"),
        ({"model_channels": 2**40}, "model_channels"),
        ({"channel_mult": [2**30]}, r"channel_mult\[0\]"),
        ({"channel_mult": [2**11]}, r"model_channels \* channel_mult\[0\]"),
        ({"channel_mult_emb": 2**40}, "channel_mult_emb"),
        ({"channel_mult_noise": 2**11}, r"model_channels \* channel_mult_noise"),
        ({"in_channels": 2**62}, "in_channels"),
        ({"img_resolution": 2**14}, "an image of"),
        ({"label_dim": 10**30}, "label_dim"),
        ({"augment_dim": 2**40}, "augment_dim"),
        ({"augment_dim": "9"}, "augment_dim"),
    ],
)
def test_arguments_that_make_no_network(change: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        SongUNet(**{"img_resolution": SIZE, "in_channels": 3, "out_channels": 3, **change})


@pytest.mark.parametrize("arguments", [ncsnpp, ddpmpp, adm])
def test_bounds_leave_room_for_networks_four_times_edms(arguments) -> None:
    kwargs = arguments(model_channels=768, channel_mult=[1, 2, 3, 4], num_blocks=16, channel_mult_emb=8)
    with torch.device("meta"):
        EDMPrecond(1024, 16, label_dim=22_000, **kwargs)


def test_presets_take_overrides() -> None:
    for preset in (ncsnpp, ddpmpp, adm):
        assert preset(dropout=0.2, channel_mult=[1, 2]).items() >= {"dropout": 0.2, "channel_mult": [1, 2]}.items()
