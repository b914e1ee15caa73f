"""accelerate on U-Nets: EDM's as their own code builds them, and diffusers' UNet2DModel and pipelines."""

import copy
import pickle

import pytest
import torch
from diffusers_unets import CONFIGS, DDPM_CIFAR10, unet
from torch import nn

import edm_style
from gdd_fast import accelerate, restore
from gdd_fast.acceleration import replacements
from gdd_fast.backend import obstacle
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.ops import group_norm_silu
from whole_networks import assert_accelerates, assert_restores

BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch"])
needs_triton = pytest.mark.skipif(
    obstacle(group_norm_silu.OPERATOR, "triton", "cpu") is not None, reason="needs Triton's interpreter"
)


def normal(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


# --- EDM


def edm_net(adaptive: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return edm_style.UNet(adaptive_scale=adaptive, taps=(1, 1) if adaptive else (1, 3, 3, 1)).eval()


CALL = lambda net, x, sigma: net(x, sigma)
EDM_INPUTS = (normal(2, 3, 16, 16, grad=True), torch.tensor([0.5, 80.0]))


@pytest.mark.parametrize("adaptive", [False, True], ids=["ncsnpp", "adm"])
@BACKENDS
def test_edm_outputs_and_gradients(adaptive, backend):
    net = edm_net(adaptive)
    blocks = [module for module in net.modules() if type(module).__name__ == "UNetBlock"]
    report = assert_accelerates(net, CALL, EDM_INPUTS, backend=backend)
    replaced = report.counts["replaced"]
    assert replaced["Linear"] == 6 and replaced["Conv2d"] >= 17
    # without a fused norm, "auto" leaves the blocks that have no attention
    fused = backend != "auto" or obstacle(group_norm_silu.OPERATOR, "cpp", "cpu") is None
    assert len(blocks) == 5
    assert replaced["UNetBlock"] == sum(bool(block.num_heads) or fused for block in blocks) >= 1
    assert_restores(net, CALL, EDM_INPUTS)


@needs_triton
def test_edm_block_in_triton():
    torch.manual_seed(0)
    block = edm_style.UNetBlock(16, 16, 24, heads=1).eval()
    inputs = (normal(1, 16, 4, 4, grad=True), normal(1, 24, grad=True))
    report = assert_accelerates(block, lambda block, x, emb: block(x, emb), inputs, backend="triton")
    assert report.counts["replaced"]["UNetBlock"] == 1


def test_edm_frozen_as_in_gdd_i_and_in_channels_last():
    net = edm_net().to(memory_format=torch.channels_last)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("conv" not in name)
    x = EDM_INPUTS[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    report = assert_accelerates(net, CALL, (x, EDM_INPUTS[1]))
    assert sum("frozen" in entry.note for entry in report.replaced) == 12, str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_edm_in_another_dtype(dtype):
    """EDM's parameters stay float32; the dtype is that of the images."""
    net, sigma = edm_net(), EDM_INPUTS[1]
    call = lambda net: net(normal(2, 3, 16, 16).to(dtype), sigma)
    want, eager = copy.deepcopy(net).double()(normal(2, 3, 16, 16).double(), sigma.double()), call(net)
    accelerate(net, backend="torch")
    got = call(net)
    assert got.dtype == dtype
    assert (got - want).norm() <= 2 * (eager - want).norm()


def test_edm_dropout_draws_the_same_numbers():
    net = edm_net().train()
    torch.manual_seed(1)
    want = net(*EDM_INPUTS)
    accelerate(net, backend="torch")
    torch.manual_seed(1)
    torch.testing.assert_close(net(*EDM_INPUTS), want, rtol=1e-4, atol=1e-4)


def test_edm_copies_pickles_and_hooks():
    net = accelerate(edm_net(), backend="torch")
    y = net(*EDM_INPUTS)
    assert torch.equal(copy.deepcopy(net)(*EDM_INPUTS), y)
    data = pickle.dumps(net)
    assert b"gdd_fast" not in data
    torch.testing.assert_close(pickle.loads(data)(*EDM_INPUTS), y, rtol=1e-4, atol=1e-4)
    seen = []
    net.enc["8x8_block0"].norm1.register_forward_hook(lambda _, inputs, y: seen.append(y))
    torch.testing.assert_close(net(*EDM_INPUTS), y, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1 and seen[0].min() < -0.5  # normalised, not activated


def test_edm_block_that_computes_something_else_is_left():
    class Other(edm_style.UNetBlock):
        def forward(self, x, emb):
            return super().forward(x, emb) + 0.01

    net = nn.ModuleList([Other(32, 32, 24, heads=1), edm_style.UNetBlock(32, 32, 24, heads=1)]).eval()
    calls = []
    net[0].conv0.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(net.state_dict())
    _, report = accelerate(net, backend="torch", report=True)
    assert [entry.path for entry in report.replaced if entry.kind in ("Other", "UNetBlock")] == ["1"]
    assert [entry.note for entry in report.left if entry.path == "0"] == ["in a trial it computed something else"]
    assert not calls and all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_edm_block_with_heads_that_the_kernels_do_not_take_is_left():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = nn.ModuleList([edm_style.UNetBlock(width, width, 24, heads=1) for width in (16, 24)]).eval().to(device)
    _, report = accelerate(net, backend="triton", report=True)
    assert [entry.path for entry in report.replaced if entry.kind == "UNetBlock"] == ["0"]
    assert "takes heads of 16, 32" in next(entry.note for entry in report.left if entry.path == "1")


def test_edm_block_compiles_to_one_graph():
    block = accelerate(edm_net().enc["8x8_block0"], backend="torch").requires_grad_(False)
    inputs = (normal(1, 32, 8, 8, grad=True), normal(1, 24))
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs))


def test_our_own_networks_are_told_apart():
    net = EDMPrecond(16, 3, **ncsnpp(model_channels=32, channel_mult=[1], num_blocks=1)).eval().requires_grad_(False)
    x, sigma = normal(1, 3, 16, 16), torch.tensor([80.0])
    y = net(x, sigma)
    with pytest.warns(UserWarning, match="gdd_fast's own"):
        accelerate(net)
    assert torch.equal(net(x, sigma), y)


# --- diffusers


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    return pytest.importorskip("diffusers")


DENOISE = lambda net, x, t: net(x, t).sample
INPUTS = (normal(2, 3, 16, 16, grad=True), torch.tensor([3, 700]))


@BACKENDS
@pytest.mark.parametrize("name", CONFIGS)
def test_unet2d_outputs_and_gradients(diffusers, name, backend):
    net = unet(diffusers, CONFIGS[name])
    report = assert_accelerates(net, DENOISE, INPUTS, backend=backend)
    replaced, left = report.counts["replaced"], report.counts["left"]
    assert replaced["Attention"] >= 3
    if name == "filters":  # which have a fused implementation on a GPU alone
        assert (left if backend == "auto" else replaced)["FirUpsample2D"] == 2
    assert backend == "auto" or not left["ResnetBlock2D"]
    assert_restores(net, DENOISE, INPUTS)


@needs_triton
def test_resnet_block_in_triton(diffusers):
    torch.manual_seed(0)
    block = diffusers.models.resnet.ResnetBlock2D(in_channels=8, temb_channels=12, groups=2).eval()
    inputs = (normal(1, 8, 4, 4, grad=True), normal(1, 12, grad=True))
    report = assert_accelerates(block, lambda block, x, temb: block(x, temb), inputs, backend="triton")
    assert report.counts["replaced"] == {"ResnetBlock2D": 1}


def test_unet2d_of_ddpm_cifar10_is_recognised(diffusers):
    net = diffusers.UNet2DModel(**DDPM_CIFAR10).eval().requires_grad_(False)
    _, report = accelerate(net, backend="torch", report=True)
    assert report.counts["replaced"] == {"ResnetBlock2D": 22, "Attention": 6, "Conv2d": 65}


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
def test_blocks_without_a_time_embedding(diffusers, name):
    """Those of autoencoders, which are called with None in its place."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    net = getattr(diffusers, name)(block_out_channels=[8, 16], norm_num_groups=4, **blocks).eval()
    decode = lambda net, x: net.decoder(net.encoder(x)[:, : net.config.latent_channels])
    report = assert_accelerates(net, decode, (normal(1, 3, 16, 16, grad=True),), backend="torch")
    assert report.counts["replaced"] == {"ResnetBlock2D": 10, "Attention": 2}
    assert "ResnetBlock2D" not in report.counts["left"]
    assert_restores(net, decode, (normal(1, 3, 16, 16),))


def test_unet2d_frozen_in_channels_last_and_autocast(diffusers):
    net = unet(diffusers, CONFIGS["ddpm"]).requires_grad_(False).to(memory_format=torch.channels_last)
    report = assert_accelerates(net, DENOISE, INPUTS, backend="torch")
    assert report.counts["replaced"]["Conv2d"] == 65
    x = INPUTS[0].detach()
    want = DENOISE(copy.deepcopy(restore(net)).double(), x.double(), INPUTS[1])
    with torch.autocast("cpu", torch.bfloat16):
        eager = DENOISE(net, x, INPUTS[1])
        got = DENOISE(accelerate(net, backend="torch"), x, INPUTS[1])
    assert got.dtype == eager.dtype
    assert (got - want).norm() <= 2 * (eager - want).norm()


def test_unet2d_blocks_compile_to_one_graph(diffusers):
    block = accelerate(unet(diffusers, CONFIGS["ddpm"]).mid_block, backend="torch")
    inputs = (normal(1, 32, 4, 4), normal(1, 64))
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_unet2d_compiles_to_one_graph(diffusers):
    net = accelerate(unet(diffusers, CONFIGS["scale_shift"]), backend="torch")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(DENOISE(compiled, *INPUTS), DENOISE(net, *INPUTS), rtol=1e-4, atol=1e-4)


def test_another_attention_processor_is_obeyed(diffusers):
    net = accelerate(unet(diffusers, CONFIGS["ddpm"]))
    y = DENOISE(net, *INPUTS)
    calls = []

    class Processor(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *arguments, **options):
            calls.append(1)
            return super().__call__(*arguments, **options)

    for module in net.modules():
        if isinstance(module, diffusers.models.attention_processor.Attention):
            module.set_processor(Processor())
    torch.testing.assert_close(DENOISE(net, *INPUTS), y, rtol=1e-4, atol=1e-4)
    assert len(calls) == 6


def test_weights_that_change_are_seen_by_the_packed_ones(diffusers):
    net = accelerate(unet(diffusers, CONFIGS["ddpm"]))
    with torch.no_grad():
        before = DENOISE(net, *INPUTS)
        for parameter in net.parameters():
            parameter.mul_(1.1)
        after = DENOISE(net, *INPUTS)
        torch.testing.assert_close(after, DENOISE(restore(net), *INPUTS), rtol=1e-4, atol=1e-4)
    assert (after - before).norm() > 0.1 * before.norm()


def test_averages_copied_into_trained_weights_are_seen(diffusers):
    net = accelerate(unet(diffusers, CONFIGS["ddpm"]))
    kept = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
        before = DENOISE(net, *INPUTS)
        packed = [name for name in kept if any(layer in name for layer in ("to_q", "to_k", "to_v"))]
        average = diffusers.training_utils.EMAModel([kept[name] for name in packed])
        average.copy_to([net.get_parameter(name) for name in packed])  # through .data
        after = DENOISE(net, *INPUTS)
        torch.testing.assert_close(after, DENOISE(restore(net), *INPUTS), rtol=1e-4, atol=1e-4)
    assert (after - before).norm() > 1e-3 * before.norm()


@BACKENDS
def test_a_pipeline_draws_the_same_images(diffusers, backend, tmp_path):
    pipe = diffusers.DDPMPipeline(unet(diffusers, CONFIGS["ddpm"]), diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: (
        pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    )
    want = draw()
    pipe.unet = accelerate(pipe.unet, backend=backend)
    assert abs(draw() - want).max() < 1e-4
    pipe.save_pretrained(tmp_path)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert abs(draw() - want).max() < 1e-6


def test_auto_leaves_what_triton_itself_would_launch(monkeypatch):
    """On a GPU without the extension; a capture, or a backend asked for by name, has it all the same."""
    monkeypatch.setattr(replacements, "has_extension", lambda: False)
    monkeypatch.setattr(replacements, "resolve", lambda backend, operator, device: "triton")
    net, gpu, cpu = nn.Sequential(), torch.device("cuda"), torch.device("cpu")
    given = {
        (backend, device, captured): replacements.Decisions(net, backend, device, captured).backend_of(
            group_norm_silu.OPERATOR
        )
        for backend in ("auto", "triton")
        for device in (gpu, cpu)
        for captured in (False, True)
    }
    assert [which for which, found in given.items() if found is None] == [("auto", gpu, False)]
    left = replacements.Decisions(net, "auto", gpu).missing(group_norm_silu.OPERATOR)
    assert "extension is not built" in left and 'engine="graph"' in left
    monkeypatch.setattr(replacements, "has_extension", lambda: True)
    assert replacements.Decisions(net, "auto", gpu).backend_of(group_norm_silu.OPERATOR) == "auto"
