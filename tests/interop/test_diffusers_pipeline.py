"""The one-step generator as a diffusers pipeline."""

import json

import numpy as np
import pytest
import torch
from edm_reference import SIZE, SMALL, fill

from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import ConfigError, InputError, WeightsError
from gdd_fast.interop import hub
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import GDDPrecond

pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
pytest.importorskip("diffusers")

from diffusers.training_utils import EMAModel

from gdd_fast.interop.diffusers import OneStepPipeline


def network(name: str = "ncsnpp_cond") -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **SMALL[name])).requires_grad_(False)


@pytest.fixture
def pipe() -> OneStepPipeline:
    return OneStepPipeline.from_generator(network())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_the_network(pipe):
    got = pipe(batch_size=4, class_labels=3, generator=generator(), output_type="pt").images
    latents = torch.randn(4, 3, SIZE, SIZE, generator=generator())
    want = network()(latents * 80, 80.0, torch.eye(10)[[3] * 4])
    torch.testing.assert_close(got, (want / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_output_types(pipe):
    draw = lambda **options: pipe(batch_size=2, class_labels=[1, 2], generator=generator(), **options)
    images = draw().images
    assert [image.size for image in images] == [(SIZE, SIZE)] * 2 and images[0].mode == "RGB"
    (array,) = draw(output_type="np", return_dict=False)
    assert array.shape == (2, SIZE, SIZE, 3) and array.dtype == np.float32
    assert np.array_equal(np.asarray(images[1]), (array[1] * 255).round().astype(np.uint8))


def test_a_generator_an_image_gives_it_whatever_the_batch(pipe):
    draw = lambda *seeds: pipe(len(seeds), None, [generator(seed) for seed in seeds], output_type="pt").images
    together = draw(0, 1, 2)
    torch.testing.assert_close(draw(2, 1), together[[2, 1]], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(pipe, tmp_path):
    draw = lambda pipe: pipe(2, generator=generator(), output_type="np").images
    want = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    assert not list((tmp_path / "pipe").rglob("*.bin"))
    np.testing.assert_allclose(draw(OneStepPipeline.from_pretrained(tmp_path / "pipe")), want, atol=1e-6)
    save_network(network(), tmp_path / "net")
    np.testing.assert_allclose(draw(OneStepPipeline.from_generator(tmp_path / "net")), want, atol=1e-6)
    np.testing.assert_allclose(draw(OneStepPipeline.from_generator(OneStepGenerator(network()))), want, atol=1e-6)


def test_a_pipeline_of_a_run_is_uploaded_with_the_runs_card(tmp_path, monkeypatch):
    save_network(network(), tmp_path / "run" / "generator_ema")
    settings = {"generator": {"teacher": "user/teacher"}, "data": {"data": "images.zip"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    seen = {}

    def upload(folder, repo_id, **options):
        seen.update(files={p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}, options=options)
        seen["card"] = (folder / "README.md").read_text()
        seen["pipe"] = OneStepPipeline.from_pretrained(folder)
        return "commit"

    monkeypatch.setattr(hub, "upload", upload)
    pipe = OneStepPipeline.from_pretrained(tmp_path / "run")
    assert pipe.push_to_hub("user/name", teacher_license="apache-2.0", private=True) == "commit"
    weights = "model/diffusion_pytorch_model.safetensors"
    assert seen["files"] == {"README.md", "model_index.json", "model/config.json", weights}
    assert "| teacher | user/teacher | apache-2.0 |" in seen["card"] and "| data | images.zip |" in seen["card"]
    assert seen["options"]["private"] is True and seen["options"]["allow_patterns"] is None
    draw = lambda pipe: pipe(2, [1, 2], generator(), output_type="np").images
    np.testing.assert_allclose(draw(seen["pipe"]), draw(pipe), atol=1e-6)


def test_weights_that_change_are_seen(pipe):
    draw = lambda: pipe(1, 0, generator(), output_type="pt").images
    before = draw()
    with torch.no_grad():
        for parameter in pipe.model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(draw(), before, atol=1e-3)


def ema_copy_to(model):
    average = EMAModel(model.parameters(), decay=0.9)
    for p in average.shadow_params:
        p.mul_(0.5)
    average.store(model.parameters())
    average.copy_to(model.parameters())


def ema_restore(model):
    average = EMAModel(model.parameters(), decay=0.9)
    for p in average.shadow_params:
        p.mul_(0.5)
    average.store(model.parameters())
    for p in model.parameters():
        p.data.mul_(1.5)
    average.restore(model.parameters())
    ema_copy_to(model)


def fused_adam(model):
    torch.manual_seed(0)
    for p in model.requires_grad_(True).parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    model.requires_grad_(False)


def assigned(model):
    model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()}, assign=True)


def a_buffer(model):
    model.network.model.map_noise.freqs.data.mul_(0.5)


@pytest.mark.parametrize("change", [ema_copy_to, ema_restore, fused_adam, assigned, a_buffer])
def test_images_are_of_the_weights_there_are(pipe, change):
    draw = lambda pipe: pipe(2, [1, 2], generator(), output_type="pt").images
    before, first = draw(pipe), pipe.engine()
    assert pipe.engine() is first, "what has not changed is not folded again"
    change(pipe.model)
    after = draw(pipe)
    want = draw(OneStepPipeline.from_generator(pipe.model.network))
    assert torch.equal(after, want) and not torch.allclose(after, before, atol=1e-3)


def triple(layer):
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 3 * forward(*args, **kwargs)


def hooked(layer):
    layer.register_forward_hook(lambda _, inputs, y: 3 * y)


@pytest.mark.parametrize("change", [triple, hooked])
@pytest.mark.parametrize("layer", ["network.model.out_conv", "network.model.dec.8x8_block0.conv1", ""])
def test_layers_that_compute_otherwise_are_called(change, layer):
    net = network("adm_cond") if layer else network()
    pipe = OneStepPipeline.from_generator(net)
    draw = lambda: pipe(2, [1, 2], generator(), output_type="pt").images
    before = draw()
    change(pipe.model.get_submodule(layer))
    latents = torch.randn(2, 3, SIZE, SIZE, generator=generator())
    want = (pipe.model(latents * 80, 80.0, torch.eye(10)[[1, 2]]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(), before, atol=1e-3)


@pytest.mark.parametrize("how", ["sequential", "model"])
def test_offloading(pipe, how):
    """Weights that lie elsewhere until a layer is called."""
    hf = pytest.importorskip("accelerate")
    draw = lambda: pipe(2, [1, 2], generator(), output_type="pt").images
    want = draw()
    if how == "sequential":
        hf.cpu_offload(pipe.model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert next(pipe.model.parameters()).is_meta
    else:
        hf.cpu_offload_with_hook(pipe.model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(draw(), want, rtol=1e-4, atol=1e-4)


def test_mistakes_are_one_error(pipe):
    with pytest.raises(InputError, match="output_type"):
        pipe(output_type="jpeg")
    with pytest.raises(InputError, match="classes are 0 to 9"):
        pipe(class_labels=10)
    with pytest.raises(InputError, match="3 images need 3 generators"):
        pipe(3, generator=[generator()])
    with pytest.raises(ConfigError, match="a network of gdd_fast"):
        OneStepPipeline.from_generator(torch.nn.Linear(1, 1))


def test_it_computes_in_the_dtype_that_is_asked_for(pipe, tmp_path):
    draw = lambda pipe: pipe(2, [1, 2], generator(), output_type="pt").images
    want = draw(pipe)
    pipe.save_pretrained(tmp_path)
    for half in (OneStepPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), pipe.to(torch.bfloat16)):
        assert half.engine().dtype == torch.bfloat16
        assert 0 < (draw(half) - want).abs().max() < 0.1
    assert OneStepPipeline.from_pretrained(tmp_path).engine().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_leaves_the_frequencies_alone(pipe, tmp_path, dtype):
    """In half precision the phases of the embedding would be wrong by half a turn, and the images by much."""
    draw = lambda pipe: pipe(2, [1, 2], generator(), output_type="pt").images
    rounded = network()
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(dtype))
    rounded.dtype = dtype
    want = draw(OneStepPipeline.from_generator(rounded))
    pipe.save_pretrained(tmp_path / "float32")
    pipe.to(dtype).save_pretrained(tmp_path / "half")
    load = OneStepPipeline.from_pretrained
    for half in (pipe, load(tmp_path / "float32", torch_dtype=dtype), load(tmp_path / "half", dtype=dtype)):
        assert half.model.dtype == dtype
        assert torch.equal(half.model.network.model.map_noise.freqs, network().model.map_noise.freqs)
        torch.testing.assert_close(draw(half), want, rtol=1e-4, atol=1e-4)
    full = load(tmp_path / "half", dtype=torch.float32)
    assert full.engine().dtype == torch.float32
    torch.testing.assert_close(draw(full), want, rtol=0.1, atol=0.1)


def test_a_broken_network_is_an_error(pipe):
    with torch.no_grad():
        next(pipe.model.parameters()).fill_(torch.nan)
    with pytest.raises(WeightsError, match="NaN"):
        pipe(1)
