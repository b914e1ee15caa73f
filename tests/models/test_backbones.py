"""Backbones compute what timm's and torchvision's networks compute, stay frozen, and refuse what does not fit."""

import pytest
import torch
from torch import nn
from vision_libraries import timm, torchvision

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.backbone_weights import load_backbone_weights
from gdd_fast.models.backbones import BACKBONES, build_backbone, fold_batch_norm
from gdd_fast.models.backbones.deit import attention, attention_ref

LITE0, DEIT = "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"
VGG_CUTS = {
    "vgg16_bn": (13, 23, 33, 43),
    "vgg16": (9, 16, 23, 30),
}  # Projected GAN's, and the same places without norms


def assert_close(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        assert (g - w).norm() <= tolerance * w.norm(), f"map {i}: {(g - w).norm() / w.norm():.2e}"


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Values that make every parameter and statistic matter (initial ones are mostly 0 and 1)."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.8, 1.2),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    for name, parameter in network.named_parameters():
        if "token" in name or "pos_embed" in name or (".bias" in name and "blocks" in name):
            parameter.data.normal_(0, 0.1, generator=generator)
    return network.eval()


def images(resolution: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def timm_lite0():
    torch.manual_seed(0)
    return randomize(timm.create_model(LITE0))


@torch.no_grad()
@pytest.mark.parametrize("name", VGG_CUTS)
def test_vgg_maps_equal_torchvision(name):
    torch.manual_seed(0)
    layout = torchvision.models.vgg.cfgs["D"]  # 16 layers; the whole network has a classifier of 124 M parameters
    reference = randomize(torchvision.models.vgg.make_layers(layout, batch_norm=name.endswith("_bn")))
    ours = build_backbone(name, {f"features.{k}": v for k, v in reference.state_dict().items()}, resolution=64)
    x = images(64)
    want = [reference[:cut](x) for cut in VGG_CUTS[name]]
    assert_close(ours(x), want)
    assert [tuple(t.shape[1:]) for t in want] == [
        (channels, 64 // stride, 64 // stride)
        for channels, stride in zip(ours.tap_channels, ours.tap_strides, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("resolution", [64, 96, 224])
def test_lite0_maps_equal_timm(timm_lite0, resolution):
    ours = build_backbone(LITE0, timm_lite0.state_dict(), resolution)
    x = images(resolution)
    h, want = timm_lite0.bn1(timm_lite0.conv_stem(x)), []
    for i, stage in enumerate(timm_lite0.blocks):
        h = stage(h)
        if i in (1, 2, 4, 6):
            want.append(h)
    assert_close(ours(x), want)
    assert_close([ours.logits(x)], [timm_lite0(x)])


@torch.no_grad()
def test_lite0_same_padding_at_odd_sizes(timm_lite0):
    """57 is odd at the stem and even at the next level: both kinds of padding, and neither a multiple of 32."""
    x = images(57)
    ours = build_backbone(LITE0, timm_lite0.state_dict())
    assert_close([ours(x)[-1]], [timm_lite0.blocks(timm_lite0.bn1(timm_lite0.conv_stem(x)))])


@torch.no_grad()
def test_lite0_unequal_padding_on_gpus_equals_the_cpu_way(timm_lite0, monkeypatch):
    """Elsewhere than on the CPU the image is padded instead of the kernel; the meta device takes that branch."""
    from gdd_fast.layers import frozen_conv
    from gdd_fast.models.backbones.lite0 import SameConv2d

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    for kernel, size in ((3, 8), (5, 8), (3, 7), (5, 7)):
        conv = SameConv2d(4, 4, kernel, stride=2, groups=4, bias=False)
        x = torch.randn(2, 4, size, size)
        want = conv(x)
        with monkeypatch.context() as patch:
            patch.setattr(frozen_conv, "converted", lambda weight, *_: weight.detach().as_subclass(Elsewhere))
            found = conv(x.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
        assert_close([found], [want])


@torch.no_grad()
def test_lite0_with_its_real_weights_equals_timm(timm_lite0):
    """The bundled package's tensors, renamed: pooled features and classes as timm computes them."""
    weights = load_backbone_weights(LITE0)
    reference = timm.create_model(LITE0)
    reference.load_state_dict(weights)
    reference.eval()
    ours = build_backbone(LITE0, weights, 64)
    x = images(64, batch=2).clamp(-1, 1)
    assert_close([ours.pooled(x)], [reference.forward_head(reference.forward_features(x), pre_logits=True)])
    assert_close([ours.logits(x)], [reference(x)])


def test_attention_is_differentiable_twice_and_keeps_what_it_was_given():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), attention_ref(q, k, v))
    assert torch.autograd.gradcheck(attention, (q, k, v)) and torch.autograd.gradgradcheck(attention, (q, k, v))
    assert torch.autograd.gradgradcheck(lambda q: attention(q, k.detach(), v.detach()), (q,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        attention(q, k, v)
    assert sorted(kept) == sorted(t.data_ptr() for t in (q, k, v))


def test_deit_maps_equal_timm():
    torch.manual_seed(0)
    ours = randomize(build_backbone(DEIT, None))
    with torch.device("meta"):
        reference = timm.create_model(DEIT).eval()
    absent = reference.load_state_dict(ours.state_dict(), strict=False, assign=True)
    assert {key.split(".")[0] for key in absent.missing_keys} == {"norm", "head", "head_dist"}
    assert not absent.unexpected_keys
    x = images(224)
    with torch.no_grad():
        want = reference.forward_intermediates(x, indices=[2, 5, 8, 11], intermediates_only=True)
        assert_close(ours(x), want)
    # R1 differentiates twice
    got = ours(x.requires_grad_())
    assert_close([t.detach() for t in got], want)
    (gradient,) = torch.autograd.grad(got[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()
    assert second.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg16_bn", LITE0])
def test_folding_batch_norm_changes_nothing_but_rounding(name):
    torch.manual_seed(0)
    network = randomize(build_backbone(name, None, 64))
    x = images(64)
    want = network(x)
    folded = fold_batch_norm(network)
    assert folded is network
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert_close(folded(x), want)
    once = {k: v.clone() for k, v in folded.state_dict().items()}
    again = fold_batch_norm(folded).state_dict()
    assert once.keys() == again.keys()
    assert all(torch.equal(v, again[k]) for k, v in once.items())


def test_frozen_and_in_eval_mode_whatever_is_asked():
    network = nn.Sequential(build_backbone(LITE0, None, 64)).train()
    assert not any(module.training for module in network[0].modules())
    assert not any(p.requires_grad for p in network.parameters())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(images(64, batch=2))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_input_gradients_in_channels_last():
    network = fold_batch_norm(build_backbone(LITE0, None, 64))
    x = images(64, batch=2)

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(sum(t.square().mean() for t in network(leaf)), leaf)[0]

    want = gradient()
    network.to(memory_format=torch.channels_last)
    assert_close([gradient()], [want], 1e-4)


@pytest.mark.parametrize(
    ("name", "resolution", "words"),
    [
        ("resnet50", 224, "tf_efficientnet_lite0"),
        (DEIT, 64, "224x224 images only"),
        (LITE0, 50, "multiple of 32"),
        (LITE0, 0, "multiple of 32"),
    ],
)
def test_what_cannot_be_built(name, resolution, words):
    with torch.device("meta"), pytest.raises(ConfigError, match=words):
        build_backbone(name, None, resolution)


def test_weights_that_do_not_fit_are_named():
    with torch.device("meta"):
        state = BACKBONES["vgg16"]().state_dict()
    del state["features.0.weight"]
    state["features.2.bias"] = torch.zeros(7)
    state["surprise"] = torch.zeros(1)
    with pytest.raises(WeightsError) as error:
        build_backbone("vgg16", state)
    message = str(error.value)
    assert "features.0.weight is missing" in message
    assert "surprise is not part of the network" in message
    assert "features.2.bias is (7,), not (64,)" in message
