"""Networks of diffusers' as denoisers: what they compute at the times of training is what diffusers computes."""

import itertools
import json
import math
import pickle
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
pytest.importorskip("diffusers")

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers_teachers import CLASSES, SIZE, UNETS, random_unet, scheduler_of

from gdd_fast.acceleration import accelerate
from gdd_fast.engine.fold import fold, make_target
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.engine.portable import open_portable, write_portable
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.files.load import as_generator, load_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.models.teachers import make_parametrisation, parametrisation_of
from gdd_fast.sampling.sampler import heun, one_step


def teacher(tmp_path, unet: UNet2DModel, scheduler):
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")
    return load_generator(tmp_path / "pipeline")


def close(got: Tensor, want: Tensor) -> None:
    """To 1e-5 of the largest value: D is as large as sigma where noise is predicted."""
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained", "zero_snr"])
def test_denoises_as_diffusers_at_every_time_of_training(tmp_path, prediction, schedule):
    options = {"num_train_timesteps": 12, "prediction_type": prediction, "clip_sample": False}
    if schedule == "trained":
        options |= {"trained_betas": [0.01 * (k + 1) for k in range(12)]}
    elif schedule == "zero_snr":
        options |= {"rescale_betas_zero_snr": True, "beta_schedule": "linear"}
    else:
        options |= {"beta_schedule": schedule, "beta_end": 0.2}
    scheduler = DDPMScheduler(**options)
    unet = random_unet("plain")
    net = teacher(tmp_path, unet, scheduler)
    noisy = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    times = range(11) if schedule == "zero_snr" else range(12)  # of pure noise alone nothing is known but the noise
    for t in times:
        alpha = scheduler.alphas_cumprod[t].double()
        predicted = unet(noisy, t).sample
        want = scheduler.step(predicted, t, noisy).pred_original_sample
        close(net(noisy.double() / alpha.sqrt(), ((1 - alpha) / alpha).sqrt()), want)


def test_a_time_between_two_is_found_in_log_sigma():
    vp = make_parametrisation({"kind": "vp", "beta_schedule": "linear"})
    alphas = DDPMScheduler(beta_schedule="linear").alphas_cumprod.double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert vp.sigma_max == pytest.approx(157.4, abs=0.1)
    times = vp.time(sigmas.float().double())  # float32 rounds the noise levels, and the times are whole all the same
    assert torch.equal(times, torch.arange(1000.0, dtype=torch.float64))
    between = (sigmas[500] * sigmas[501]).sqrt()
    assert float(vp.time(between[None])) == pytest.approx(500.5, abs=1e-6)
    assert float(vp.time(sigmas[:1] / 10)) == 0 and float(vp.time(sigmas[-1:] * 10)) == 999


def test_score_networks_of_images_from_0_to_1(tmp_path):
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=10, sigma_min=0.01, sigma_max=50.0)
    unet = random_unet("score")
    net = teacher(tmp_path, unet, scheduler)
    noisy = torch.rand(2, 3, SIZE, SIZE)
    for sigma in scheduler.discrete_sigmas:
        score = unet(noisy, sigma[None]).sample  # d log p / dx = (D - x) / sigma^2
        want = noisy + sigma**2 * score
        got = (net(noisy * 2 - 1, sigma * 2) + 1) / 2
        close(got, want)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edms_own_parametrisation(tmp_path, prediction):
    scheduler = EDMEulerScheduler(prediction_type=prediction)
    unet = random_unet("plain")
    net = teacher(tmp_path, unet, scheduler)
    x = torch.randn(2, 3, SIZE, SIZE)
    for sigma in (0.002, 0.5, 80.0):
        predicted = unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        close(net(x, sigma), scheduler.precondition_outputs(x, predicted, sigma))


def test_consistency_models(tmp_path):
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    unet = random_unet("adm")
    net = teacher(tmp_path, unet, scheduler)
    x, classes = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1, 2])
    for sigma in (0.002, 0.5, 80.0):
        time = torch.from_numpy(scheduler.sigma_to_t(torch.tensor([sigma], dtype=torch.float64))).float()
        predicted = unet(x / math.hypot(sigma, 0.5), time, classes).sample[:, :3]  # the rest is a learned variance
        skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
        close(net(x, sigma, torch.eye(CLASSES)[classes]), skip * x + out * predicted)


@pytest.mark.parametrize("name", UNETS)
def test_one_network_wrapped_saved_folded_and_accelerated(tmp_path, name):
    unet = random_unet(name)
    net = teacher(tmp_path, unet, scheduler_of(name))
    assert (net.img_resolution, net.img_channels) == (unet.config.sample_size, unet.config.in_channels)
    labels = torch.eye(net.label_dim)[[1, 2]] if net.label_dim else None
    z = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    want = one_step(net, z, labels)
    if labels is not None:
        assert not torch.allclose(want[:1], one_step(net, z[:1], labels[1:]), atol=1e-4)

    save_network(net, tmp_path / "folder")
    assert torch.equal(one_step(load_generator(tmp_path / "folder"), z, labels), want)
    close(one_step(as_generator(net).eval(), z, labels), want)
    for backend in ("auto", "torch"):
        engine = OneStepGenerator.from_network(net, backend=backend)
        close(engine.run(z, None if labels is None else [1, 2]), want)
        close(engine.run(z, labels), want)
    if name != "score":  # whose own network cannot be pickled: diffusers resamples in it by functions without names
        twin = pickle.loads(pickle.dumps(engine))
        assert torch.equal(twin.run(z, labels), engine.run(z, labels))
    for layout in (torch.channels_last, torch.contiguous_format):  # as on a GPU
        target = replace(make_target(torch.device("cpu"), torch.float32), convolve="plain", late_bias=True)
        unet, conditioning = fold(net, replace(target, layout=layout, winograd=False, small=False), net.sigma_init)
        with torch.no_grad():
            close(unet(z, None if conditioning is None else conditioning(labels)), want)
    close(one_step(accelerate(net, report=True)[0], z, labels), want)


@pytest.mark.parametrize(
    ("name", "suffix", "dtype"),
    [
        ("plain", ".pt2", "float32"),
        *[pytest.param(name, ".pt2", "float16", marks=pytest.mark.slow) for name in UNETS],
        *[pytest.param(name, ".onnx", "float32", marks=pytest.mark.slow) for name in UNETS],
        pytest.param("plain", ".onnx", "float16", marks=pytest.mark.slow),
    ],
)
def test_exported_for_any_number_of_images(tmp_path, name, suffix, dtype):
    """diffusers' own upsampling asks whether there are 64 or more."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    unet = random_unet(name)
    net = as_generator(teacher(tmp_path, unet, scheduler_of(name))).eval()
    path = tmp_path / f"generator{suffix}"
    difference = write_portable(net, path, dtype=dtype, images=17)
    assert difference.worst < (1e-4 if dtype == "float32" else 0.1)
    z = torch.randn(65, net.img_channels, net.img_resolution, net.img_resolution)
    classes = [torch.arange(65) % net.label_dim] if net.label_dim else []
    with torch.no_grad():
        images = open_portable(path)(z, *classes)
    labels = torch.eye(net.label_dim)[classes[0]] if classes else None
    torch.testing.assert_close(images, one_step(net, z, labels), rtol=0, atol=1e-4 if dtype == "float32" else 0.1)


def test_half_precision_bears_the_noise_level(tmp_path):
    """In a network that predicts noise an error of the prediction is sigma times larger in the image."""
    net = as_generator(teacher(tmp_path, random_unet("plain"), DDPMScheduler())).eval()
    z = torch.randn(4, 3, SIZE, SIZE)
    want = one_step(net, z)
    net.dtype = torch.bfloat16
    relative = lambda sigma: float((one_step(net, z, sigma=sigma) - _float32(net, z, sigma)).square().mean().sqrt())
    assert relative(net.sigma_init) < 0.25 * relative(80.0)
    assert float((one_step(net, z) - want).abs().max()) > 0  # it does compute in bfloat16


def _float32(net, z, sigma):
    net.dtype = torch.float32
    images = one_step(net, z, sigma=sigma)
    net.dtype = torch.bfloat16
    return images


class MixtureOfGaussians(torch.nn.Module):
    """In place of a U-Net's middle block: the best prediction there is for noisy images of a known distribution.

    Images are one of three, plus noise of deviation 0.2. With that, what remains of an image in x_t is known in closed
    form, and so are the noise and the velocity.
    """

    def __init__(self, scheduler):
        super().__init__()
        self.prediction = scheduler.config.prediction_type
        self.register_buffer("alphas", scheduler.alphas_cumprod.double().clamp(min=2.0**-24))
        self.register_buffer(
            "means", torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)).double()
        )

    def forward(self, x, time):
        below = time.long().clamp(max=len(self.alphas) - 2)
        odds = torch.lerp(
            *((self.alphas / (1 - self.alphas)).log()[k] for k in (below, below + 1)), time.double() - below
        )
        signal, noise = (k.sigmoid().sqrt()[:, None, None, None] for k in (odds, -odds))
        noisy, sigma2, own2 = x.double() / signal, (noise / signal).square(), 0.2**2
        away = noisy[:, None] - self.means
        weights = (-away.square().sum((2, 3, 4)) / (2 * (own2 + sigma2.flatten(1)))).softmax(1)
        mean = (weights[:, :, None, None, None] * self.means).sum(1)
        image = mean + own2 / (own2 + sigma2) * (noisy - mean)
        epsilon = (x - signal * image) / noise
        match self.prediction:
            case "epsilon":
                return epsilon.float()
            case "v_prediction":
                return (signal * epsilon - noise * image).float()
            case _:
                return image.float()


class Untouched(torch.nn.Module):
    """Hands on what it gets; with the parameter by which a time embedding's dtype is known."""

    def __init__(self):
        super().__init__()
        self.linear_1 = torch.nn.Linear(1, 1)

    def forward(self, x):
        return x


def known_answer(unet: UNet2DModel, scheduler) -> UNet2DModel:
    """`unet`, called by diffusers or by our wrapper, with nothing left in it but a MixtureOfGaussians."""
    for name in ("time_proj", "time_embedding", "conv_in", "conv_norm_out", "conv_act", "conv_out"):
        setattr(unet, name, Untouched())
    unet.down_blocks, unet.up_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
    unet.mid_block = MixtureOfGaussians(scheduler)
    return unet


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        *itertools.product(["linear", "squaredcos_cap_v2"], ["epsilon", "v_prediction", "sample"]),
        *itertools.product(["zero_snr"], ["v_prediction", "sample"]),  # pure noise alone tells epsilon nothing
    ],
)
@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_heun_and_diffusers_samplers_reach_the_same_image(tmp_path, schedule, prediction, cls):
    """From the same starting noise; DDIM is of first order, and so further from Heun at 100 steps."""
    options = {"prediction_type": prediction, "beta_schedule": schedule}
    if schedule == "zero_snr":
        options |= {"beta_schedule": "linear", "rescale_betas_zero_snr": True}
    scheduler = cls(**options, **({"clip_sample": False} if cls is DDIMScheduler else {}), timestep_spacing="trailing")
    net = teacher(tmp_path, random_unet("plain"), DDPMScheduler(**options))
    unet = net.model = known_answer(net.model, scheduler)
    scheduler.set_timesteps(100)
    z = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = z.clone()
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        # that x = a_T x0 + s_T n, so as a point of the process of sigma it is z / a_T, not sigma_T z
        start = math.hypot(1, net.sigma_max) / net.sigma_max
        images = heun(net, z * start, steps=100, sigma_max=net.sigma_max)
    nearest = torch.cdist(images.flatten(1).double(), unet.mid_block.means.flatten(1)).argmin(1)
    assert len(set(nearest.tolist())) == 3, "the noise decides which image it becomes"
    difference = float((images - x).square().mean().sqrt())
    assert difference <= (0.03 if cls is DDIMScheduler else 0.01)


def test_a_generators_noise_level_is_its_own(tmp_path):
    net = teacher(tmp_path, random_unet("plain"), DDPMScheduler())
    assert as_generator(net).sigma_init == net.sigma_init < 80
    save_network(as_generator(net, sigma_init=2.5), tmp_path / "generator")
    loaded = load_generator(tmp_path / "generator")
    z = torch.randn(2, 3, SIZE, SIZE)
    close(one_step(loaded, z), net(z * 2.5, 2.5))
    close(OneStepGenerator.from_network(loaded).run(z), net(z * 2.5, 2.5))
    with pytest.raises(ConfigError, match="sigma_init"):
        as_generator(net, sigma_init=1000.0)
    edm = EDMPrecond(8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    assert "sigma_init" not in as_generator(edm).init_config()  # nor in files that older programs read
    assert as_generator(edm, sigma_init=10).init_config()["sigma_init"] == 10


@pytest.mark.parametrize(
    ("unet", "scheduler", "words"),
    [
        ({"out_channels": 4}, {}, "out_channels 4"),
        ({"sample_size": 10, "block_out_channels": (8, 8, 8)}, {}, "sample_size 10"),
        ({"class_embed_type": "identity"}, {}, "class_embed_type"),
        ({"class_embed_type": "timestep"}, {}, "num_class_embeds"),
        ({"class_embed_type": "timestep", "num_class_embeds": "x"}, {}, "num_class_embeds must be a whole number"),
        ({"num_class_embeds": 10**12}, {}, "num_class_embeds must be a whole number of at most 1000000"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1e3}, {}, "num_train_timesteps must be a whole"),
        ({"sample_size": None}, {}, "sample_size must be the side"),
        ({"sample_size": [8, 16]}, {}, "sample_size must be the side"),
        ({"norm_num_groups": 7}, {}, "num_groups"),
        ({"_class_name": "UNet2DConditionModel"}, {}, "only a UNet2DModel"),
        ({"block_out_channels": None}, {}, "block_out_channels must be a list"),
        ({}, {"trained_betas": [0.1, 1.0, 2.0]}, "betas do not give noise levels"),
        ({}, {"beta_start": "low"}, "the parametrisation vp cannot be made"),
        ({}, {"prediction_type": "flow_prediction"}, "prediction_type"),
        ({}, {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({}, {"beta_schedule": "laplace"}, "beta_schedule"),
    ],
)
def test_what_cannot_be_served_is_refused_by_the_name_of_its_setting(tmp_path, unet, scheduler, words):
    DDPMPipeline(random_unet("plain"), DDPMScheduler()).save_pretrained(tmp_path)
    for path, changes in (("unet/config.json", unet), ("scheduler/scheduler_config.json", scheduler)):
        config = json.loads((tmp_path / path).read_text())
        if changes.get("block_out_channels"):
            changes = changes | {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
        (tmp_path / path).write_text(json.dumps(config | changes))
    with pytest.raises(WeightsError, match=words) as refusal:
        load_generator(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("unet", "scheduler", "time", "words"),
    [
        ("score", DDPMScheduler(), 0, "times of its scheduler, 0 to 999: it goes with ScoreSdeVe"),
        ("score", EDMEulerScheduler(), -1.55, "logarithm.*, -1.554 to 1.09"),
        ("learned-times", DDPMScheduler(num_train_timesteps=1001), 1000, "1000 has no row.* 0 to 1000"),
        ("learned-times", EDMEulerScheduler(), -1.55, "num_train_timesteps 1000 has no row"),
    ],
)
def test_times_that_an_embedding_has_no_value_at_are_refused(tmp_path, unet, scheduler, time, words):
    """diffusers' own network is NaN there, or raises."""
    network = random_unet(unet)
    x, time = torch.zeros(1, 3, network.config.sample_size, network.config.sample_size), torch.tensor(time)
    if unet == "score":
        assert network(x, time).sample.isnan().all()
    else:
        with pytest.raises((IndexError, RuntimeError)):
            network(x, time, torch.tensor([0]))
    with pytest.raises(WeightsError, match=words) as refusal:
        teacher(tmp_path, network, scheduler)
    assert "\n" not in str(refusal.value)


def test_classes_that_are_embedded_as_times_have_none_before_the_first(tmp_path):
    DDPMPipeline(random_unet("score"), ScoreSdeVeScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_embed_type": "timestep", "num_class_embeds": 4}))
    with pytest.raises(WeightsError, match="and of its 4 classes"):
        load_generator(tmp_path)


def test_folders_that_are_none(tmp_path):
    unet = random_unet("plain")
    with pytest.raises(ConfigError, match="FlowMatch"):
        parametrisation_of(dict(FlowMatchEulerDiscreteScheduler().config) | {"_class_name": "FlowMatchEuler"})
    unet.save_pretrained(tmp_path / "alone")
    with pytest.raises(WeightsError, match="scheduler_config"):
        load_generator(tmp_path / "alone")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_generator(tmp_path / "broken")


def test_diffusers_that_does_not_import_is_one_line(tmp_path, monkeypatch):
    """As beside a torchvision that was built for another torch."""
    DDPMPipeline(random_unet("plain"), DDPMScheduler()).save_pretrained(tmp_path)
    broken = types.ModuleType("diffusers")
    said = "Failed to import diffusers.models.unets.unet_2d:\noperator torchvision::nms does not exist"
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(RuntimeError(said))
    monkeypatch.setitem(sys.modules, "diffusers", broken)
    with pytest.raises(WeightsError, match=r"cannot be imported: operator torchvision::nms.*reinstall") as refusal:
        load_generator(tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_older_layout_with_everything_in_one_folder(tmp_path):
    unet = random_unet("plain")
    unet.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    x = torch.randn(1, 3, SIZE, SIZE)
    net = load_generator(tmp_path)
    close(net(x * 10, 10.0), teacher(tmp_path, unet, DDPMScheduler())(x * 10, 10.0))
