"""The projected discriminator: the published shapes, size and cost; frozen and trained halves; R1 through both."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gdd_fast.errors import CheckpointError, ConfigError
from gdd_fast.models.backbones import Backbone, build_backbone
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures
from gdd_fast.models.random_projection import RandomProjection

VGG, LITE0, DEIT = "vgg16_bn", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"


class TinyBackbone(Backbone):
    """Four strided, smooth convolutions, so that second derivatives are worth checking."""

    name = "tiny"
    tap_channels = (4, 6, 8, 8)
    tap_strides = (4, 8, 16, 32)

    def __init__(self):
        super().__init__()
        widths = (3, *self.tap_channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, stride, stride) for i, o, stride in zip(widths, widths[1:], (4, 2, 2, 2), strict=False)
        )

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = torch.tanh(conv(x))
            maps.append(x)
        return tuple(maps)


def tiny_features(resolution=64, seed=0, dtype=torch.float32) -> ProjectedFeatures:
    torch.manual_seed(7)
    return ProjectedFeatures([TinyBackbone()], resolution, seed=seed, dtype=dtype)


def one_hot(*classes: int, label_dim: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(classes), label_dim).float()


def images(batch=2, channels=3, resolution=16, seed=0) -> torch.Tensor:
    return torch.rand(batch, channels, resolution, resolution, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the published sizes (METHOD: 20.7 M parameters, GFLOP an image), on the meta device ---


@pytest.mark.parametrize(("pair", "published"), [((VGG, LITE0), (33.5, 11.3)), ((DEIT, LITE0), (36.4, 4.5))])
def test_parameters_and_cost_at_224(pair, published):
    with torch.device("meta"):
        features = ProjectedFeatures([build_backbone(name, None) for name in pair])
        heads = DiscriminatorHeads(features.channels, features.resolutions)
        x = torch.zeros(1, 3, 32, 32)
        with FlopCounterMode(display=False) as feature_flops:
            maps = features(x)
        with FlopCounterMode(display=False) as head_flops:
            heads(maps)
    assert round(sum(p.numel() for p in heads.parameters() if p.requires_grad) / 1e6, 1) == 20.7
    gflop = feature_flops.get_total_flops() / 1e9
    # The published order runs each cross-scale 1x1 convolution after the enlargement, at four times the pixels.
    for projection, levels in zip(features.projections.values(), maps, strict=True):
        for conv, y in zip(projection.csm, levels, strict=True):
            gflop += 0.75 * 2 * conv.weight.numel() * y.shape[-1] * y.shape[-2] / 1e9
    if DEIT in pair:  # and its count leaves out the two products of attention
        gflop -= 12 * 4 * 198**2 * 768 / 1e9
    assert gflop == pytest.approx(published[0], rel=0.02)
    assert head_flops.get_total_flops() / 1e9 == pytest.approx(published[1], rel=0.02)


@pytest.mark.parametrize(
    ("name", "resolution", "nominal", "sizes", "logits"),
    [
        (LITE0, 224, (128, 64, 32, 16), (112, 56, 28, 14), 4 * 4),
        (DEIT, 224, (128, 64, 32, 16), (112, 56, 28, 14), 4 * 4),
        (VGG, 224, (128, 64, 32, 16), (224, 112, 56, 28), 11 * 11),
        (LITE0, 256, (128, 64, 32, 16), (128, 64, 32, 16), 5 * 5),
        (LITE0, 128, (64, 32, 16, 8), (64, 32, 16, 8), 5 * 5),
        (LITE0, 96, (64, 32, 16, 8), (48, 24, 12, 6), 3 * 3),
        (LITE0, 64, (32, 16, 8, 4), (32, 16, 8, 4), 3 * 3),
        (LITE0, 32, (16, 8, 4, 2), (16, 8, 4, 2), 2 * 2),
        (VGG, 64, (32, 16, 8, 4), (64, 32, 16, 8), 7 * 7),
    ],
)
def test_shapes(name, resolution, nominal, sizes, logits):
    with torch.device("meta"):
        features = ProjectedFeatures([build_backbone(name, None, resolution)], resolution)
        heads = DiscriminatorHeads(features.channels, features.resolutions)
        maps = features(torch.zeros(2, 3, 32, 32))
        out = heads(maps)
    assert features.resolutions == (nominal,)
    assert [tuple(y.shape) for y in maps[0]] == [(2, c, s, s) for c, s in zip(features.channels[0], sizes, strict=True)]
    assert features.channels == ((64, 64, 128, 256),)
    assert [tuple(y.shape) for y in out[0]] == [(2, logits)] * 4


# --- the frozen half ---


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)],
    ids=["imagenet", "half"],
)
def test_normalisation_is_the_backbones_own(mean, std):
    backbone, x, seen = TinyBackbone(), images(resolution=64), []
    backbone.mean, backbone.std = mean, std
    features = ProjectedFeatures([backbone], 64)
    backbone.register_forward_pre_hook(lambda _, args: seen.extend(args))
    features(x)
    want = torch.stack([(x[:, i] / 2 + 0.5 - mean[i]) / std[i] for i in range(3)], dim=1)
    torch.testing.assert_close(seen[0], want)


def test_a_grey_image_is_three_equal_channels():
    features = tiny_features()
    grey = images(channels=1)
    for got, want in zip(features(grey)[0], features(grey.expand(-1, 3, -1, -1))[0], strict=True):
        torch.testing.assert_close(got, want)


def test_images_are_resized_bilinearly():
    features = tiny_features()
    small = images(resolution=16)
    large = F.interpolate(small, (64, 64), mode="bilinear", align_corners=False)
    for got, want in zip(features(small)[0], features(large)[0], strict=True):
        torch.testing.assert_close(got, want)


def test_mixing_equals_its_definition():
    """Add, enlarge by two with aligned corners, then the 1x1 convolution: Projected GAN's order."""
    torch.manual_seed(0)
    projection = RandomProjection((4, 6, 8, 8))
    maps = [torch.randn(2, c, s, s) for c, s in zip((4, 6, 8, 8), (16, 8, 4, 2), strict=True)]
    want, carried = [], None
    for x, ccm, csm in reversed(list(zip(maps, projection.ccm, projection.csm, strict=True))):
        mixed = ccm(x) if carried is None else carried + ccm(x)
        carried = csm(F.interpolate(mixed, scale_factor=2, mode="bilinear", align_corners=True))
        want.insert(0, carried)
    for got, expected in zip(projection(maps), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_projection_follows_its_seed_alone_and_travels():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ProjectedFeatures([TinyBackbone()], 64, seed=3).projection_state()
    torch.set_rng_state(state)
    TinyBackbone()
    after_backbone = torch.get_rng_state()
    torch.set_rng_state(state)
    ProjectedFeatures([TinyBackbone()], 64, seed=3)
    assert torch.equal(torch.get_rng_state(), after_backbone), "the global generator was touched"

    same, other = tiny_features(seed=3), tiny_features(seed=4)
    assert all(torch.equal(v, first[k]) for k, v in same.projection_state().items())
    x = images()
    want = same(x)[0][0]
    assert not torch.equal(other(x)[0][0], want)
    other.load_projection_state(same.projection_state())
    assert torch.equal(other(x)[0][0], want)
    with pytest.raises(CheckpointError, match="do not fit the backbones tiny"):
        other.load_projection_state({"vgg16.ccm.0.weight": torch.zeros(1)})


def test_features_are_frozen_and_stay_in_eval_mode():
    features = tiny_features().train()
    assert not features.training
    assert not any(p.requires_grad for p in features.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compute_type(dtype):
    x = images()
    want, got = tiny_features()(x)[0], tiny_features(dtype=dtype)(x)[0]
    for w, g in zip(want, got, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.float(), w, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ProjectedFeatures([]), "one or more different"),
        (lambda: ProjectedFeatures([TinyBackbone(), TinyBackbone()]), "one or more different"),
        (lambda: ProjectedFeatures([TinyBackbone()], 100), "multiple of 32"),
        (lambda: tiny_features()(torch.zeros(1, 4, 16, 16)), r"\(1, 4, 16, 16\)"),
        (lambda: DiscriminatorHeads([(64,)], [(48,)]), "powers of two"),
        (lambda: DiscriminatorHeads([(64,)], [(16,)], embedding=torch.zeros(10, 3)), "label_dim"),
        (lambda: DiscriminatorHeads([(64,)], [(16,)], 10, embedding=torch.zeros(9, 3)), r"10 classes.*\(9, 3\)"),
    ],
)
def test_what_cannot_be_built_or_taken(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# --- the trainable half ---


def small_heads(**options) -> DiscriminatorHeads:
    torch.manual_seed(0)
    return DiscriminatorHeads([(8, 8)], [(8, 4)], **options)


def small_maps(batch=3) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(batch, 8, size, size, generator=generator) for size in (8, 4)]]


def test_every_convolution_has_spectral_norm_one():
    heads = small_heads(label_dim=2).train()
    labels = one_hot(0, 1, 1, label_dim=2)
    for _ in range(30):  # one power iteration a forward
        heads(small_maps(), labels)
    heads.eval()
    convolutions = [m for m in heads.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3
    for conv in convolutions:
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2).item()
        assert largest == pytest.approx(1, rel=0.05)


def test_conditional_logits_are_inner_products_with_the_class_map():
    table = torch.randn(12, 5) * 3 + 1
    heads = small_heads(label_dim=10, embedding=table).eval()
    assert not heads.embedding.weight.requires_grad
    torch.testing.assert_close(heads.embedding.weight, ((table - table.mean()) / table.std())[:10])
    maps = small_maps()
    classes = (7, 0, 7)
    got = heads(maps, one_hot(*classes, label_dim=10))
    for head, x, logits in zip(heads.heads[0], maps[0], got[0], strict=True):
        hidden = head.out(head.main(x))
        assert hidden.shape[1] == 64
        linear = heads.embedding.weight[list(classes)] @ head.class_map.weight.T / math.sqrt(5) + head.class_map.bias
        class_map = torch.where(linear > 0, linear, 0.2 * linear) * math.sqrt(2)
        torch.testing.assert_close(logits, torch.einsum("nchw,nc->nhw", hidden, class_map).flatten(1) / 8)


def test_learned_class_table_trains():
    heads = small_heads(label_dim=10)
    out = heads(small_maps(), one_hot(1, 2, 3, label_dim=10))
    sum(logits.sum() for logits in out[0]).backward()
    rows = heads.embedding.weight.grad.abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("labels", [None, torch.zeros(3, 9), torch.zeros(3)])
def test_conditional_heads_want_one_hot_labels(labels):
    with pytest.raises(ConfigError, match=r"one-hot labels \(N, 10\)"):
        small_heads(label_dim=10)(small_maps(), labels)


def test_heads_copy_save_and_repeat():
    """A deep copy and a restored state dict continue exactly alike, spectral-norm vectors and batch norm included."""
    import copy

    heads = small_heads()
    heads(small_maps())
    copied, restored = copy.deepcopy(heads), small_heads()
    restored.load_state_dict(heads.state_dict())
    want = heads(small_maps())
    for twin in (copied, restored):
        got = twin(small_maps())
        assert all(torch.equal(g, w) for g, w in zip(got[0], want[0], strict=True))


def test_bf16_heads_keep_float32_parameters_and_logits():
    want = small_heads()(small_maps())[0]
    heads = small_heads(dtype=torch.bfloat16)
    got = heads(small_maps())[0]
    assert all(p.dtype == torch.float32 for p in heads.state_dict().values() if p.is_floating_point())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=0.05, atol=0.05)
        assert not torch.equal(g, w)


# --- R1: the gradient of a gradient, through both halves ---


def last_levels(features: ProjectedFeatures):
    """The two coarsest levels of the only backbone, and what heads for them are built from: enough, and cheap."""
    channels, resolutions = features.channels[0][2:], features.resolutions[0][2:]
    return (lambda x: [features(x)[0][2:]]), [channels], [resolutions]


def penalty(features, heads, x, labels=None):
    out = heads(features(x), labels)
    score = sum(logits.mean(1).sum() for maps in out for logits in maps)
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize("label_dim", [0, 3])
def test_r1_gradients_are_correct(label_dim):
    """The R1 penalty's slope along its gradient, in all trainable parameters at once, against finite differences."""
    features, channels, resolutions = last_levels(tiny_features(64, dtype=torch.float64))
    torch.manual_seed(0)
    heads = DiscriminatorHeads(channels, resolutions, label_dim=label_dim, dtype=torch.float64).double()
    for module in heads.modules():
        if type(module).__name__ == "_SpectralNorm":
            module.eval()  # no power iteration between the evaluations that are compared
    labels = one_hot(0, 2, 1, label_dim=3).double() if label_dim else None
    x = images(3, resolution=64).double().requires_grad_()

    parameters = [p for p in heads.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        penalty(features, heads, x, labels), parameters, allow_unused=True, materialize_grads=True
    )
    slope = math.sqrt(sum(g.square().sum().item() for g in gradients))

    def moved(step):
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p += step / slope * g
        return penalty(features, heads, x, labels).item()

    step = 1e-5
    ahead, behind = moved(step), moved(-2 * step)
    assert slope > 0
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r1_through_a_real_backbone(dtype):
    torch.manual_seed(0)
    frozen = ProjectedFeatures([build_backbone(LITE0, None, 64)], 64, dtype=dtype)
    features, channels, resolutions = last_levels(frozen)
    heads = DiscriminatorHeads(channels, resolutions, dtype=dtype)
    penalty(features, heads, images(2).requires_grad_()).backward()
    weights = [p for p in heads.parameters() if p.ndim == 4]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)
    assert all(p.grad is None for p in frozen.parameters())
