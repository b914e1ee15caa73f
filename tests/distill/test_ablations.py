"""Options of docs/ablations.md in the loop: what trains, what resumes to the bit, what is refused."""

import pytest
import torch
from tiny_run import BATCH, schedule_of, tiny_config, tiny_flags, tiny_network, tiny_task

from gdd_fast.config import AblationConfig, default_settings, differences, to_dict
from gdd_fast.distill import components
from gdd_fast.distill.freeze import freeze
from gdd_fast.distill.run import preflight
from gdd_fast.errors import CheckpointError, ConfigError
from gdd_fast.models.files.load import load_generator
from gdd_fast.train import read
from gdd_fast.training import checkpoint, loop

pytestmark = pytest.mark.usefixtures("plain")

FRECHET = {"frechet_loss": ("pixels",), "frechet_population": 300}
RUNS = {
    "cd alone": {"teacher_loss": "cd", "gan": "off", "target_ema": 0.9},
    "pd": {"teacher_loss": "pd", "pd_steps": 4, "pd_stage_kimg": 0.004},
    "ctm, pseudo-huber": {"teacher_loss": "ctm", "teacher_loss_distance": "pseudo-huber"},
    "frechet alone": {**FRECHET, "gan": "off"},
    "frechet and cd": {**FRECHET, "teacher_loss": "cd", "frechet_refresh": 2},
}


def tensors(task):
    sections, _ = task.state()
    return {f"{name}/{key}": t.clone() for name, part in sections.items() for key, t in part.items()}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(inputs, tmp_path, settings):
    config = tiny_config(inputs, run_dir=tmp_path, **settings)
    config.validate()
    whole = tiny_task(config)
    for number in range(4):
        whole.iteration(number * BATCH)
    expected = tensors(whole)
    logged = whole.averages.take()
    first = tiny_task(config)
    for number in range(2):
        first.iteration(number * BATCH)
    sections, values = first.state()
    checkpoint.save(tmp_path / "c.safetensors", sections, {**values, "images": 2 * BATCH})
    second = tiny_task(config)
    second.restore(checkpoint.load(tmp_path / "c.safetensors"))
    for number in range(2, 4):
        second.iteration(number * BATCH)
    found = tensors(second)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    assert ("loss_teacher" in logged) is ("teacher_loss" in settings)
    assert ("frechet_pixels" in logged) is ("frechet_loss" in settings)
    assert ("loss_d" in logged) is (settings.get("gan") != "off")


def test_without_the_gan_the_generator_trains_and_the_heads_do_not(inputs, tmp_path):
    task = tiny_task(tiny_config(inputs, run_dir=tmp_path, teacher_loss="cd", gan="off"))
    before = tensors(task)
    for number in range(4):
        task.iteration(number * BATCH)
    now = tensors(task)
    moved = {key for key, value in before.items() if not torch.equal(value, now[key])}
    assert not any(key.startswith("heads/") for key in moved)
    trained = {f"generator/{name}" for name, p in task.generator.named_parameters() if p.requires_grad}
    assert trained and trained <= moved
    assert not any(f"generator/{name}" in moved for name, p in task.generator.named_parameters() if not p.requires_grad)


def test_a_whole_run_by_the_loop(inputs, tmp_path):
    config = tiny_config(inputs, run_dir=tmp_path, **RUNS["frechet and cd"])
    task = tiny_task(config)
    outcome = loop.run(task, tmp_path, to_dict(config), schedule_of(config), task.world)
    assert outcome.images >= 20 and load_generator(tmp_path).img_resolution == 16
    other = tiny_config(inputs, run_dir=tmp_path, duration_mimg=1e-4)
    with pytest.raises(CheckpointError, match=r"ablation\.frechet_loss.*ablation\.teacher_loss"):
        loop.check_same_run(tmp_path, to_dict(other), task.contents, other.total_images, default_settings(other))


@pytest.mark.parametrize("reduction", ["rows", "heads"])
def test_a_weight_is_beside_a_mean_of_the_gans(inputs, tmp_path, monkeypatch, reduction):
    """The loss of the step is the GAN's and the teacher's, each summed over images or a mean of them."""
    found = {}
    for weight in (0.0, 2.0):
        settings = {"teacher_loss": "cd", "teacher_loss_weight": weight, "logit_reduction": reduction}
        task = tiny_task(tiny_config(inputs, run_dir=tmp_path, **settings))
        task.iteration(0)
        found[weight] = task.averages.take()
    added = found[2.0]["loss_g"] - found[0.0]["loss_g"]
    images = BATCH if reduction == "rows" else 1
    assert added == pytest.approx(2 * images * found[2.0]["loss_teacher"], rel=1e-3)


def test_accumulated_gradients_of_the_frechet_loss_are_those_of_the_batch(inputs, tmp_path, monkeypatch):
    gradients = []
    for batch_gpu in (4, 2):
        task = tiny_task(tiny_config(inputs, run_dir=tmp_path, **RUNS["frechet alone"], batch_gpu=batch_gpu))
        kept = []

        def apply(task=task, kept=kept):
            kept += [p.grad.clone() for p in task.generator.parameters() if p.grad is not None]
            return torch.zeros(())

        monkeypatch.setattr(task.g_guard, "apply", apply)
        task.iteration(0)
        gradients.append(torch.cat([g.flatten() for g in kept]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


def test_starts(inputs, tmp_path):
    teacher = load_generator(inputs / "teacher")
    built = {
        init: components.build(tiny_config(inputs, run_dir=tmp_path, init=init)).generator
        for init in ("teacher", "random", "shuffled")
    }
    weights = {init: dict(net.named_parameters()) for init, net in built.items()}
    freeze(teacher, 1)
    moved = 0
    for name, weight in teacher.named_parameters():
        assert torch.equal(weights["teacher"][name], weight)
        shuffled = weights["shuffled"][name]
        if weight.requires_grad:
            assert torch.equal(shuffled, weight), name
        else:
            assert torch.equal(shuffled.flatten().sort()[0], weight.flatten().sort()[0]), name
            moved += not torch.equal(shuffled, weight)
    assert moved > 5
    name = "model.enc.16x16_conv.weight"
    assert not torch.equal(weights["random"][name], weights["teacher"][name])
    other = components.build(tiny_config(inputs, run_dir=tmp_path, init="random", seed=1)).generator
    assert not torch.equal(weights["random"][name], dict(other.named_parameters())[name])


def test_the_teacher_of_a_loss_is_the_teacher_whatever_the_generator_starts_from(inputs, tmp_path):
    config = tiny_config(inputs, run_dir=tmp_path, init="random", teacher_loss="cd", gan="off")
    teacher = tiny_task(config).additional.teacher_loss.teachers[0]
    assert torch.equal(teacher.model.map_layer0.weight, tiny_network().model.map_layer0.weight)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_flags_and_checkpoints_of_before(inputs, tmp_path):
    flags = {"teacher_loss": "ctm", "gan": "off", "frechet_loss": ("lite0", "inception"), "init": "shuffled"}
    found = read(tiny_flags(inputs, run_dir=tmp_path, **flags)).config.ablation
    assert found == AblationConfig(**flags)
    config = tiny_config(inputs)
    before = to_dict(config)
    del before["ablation"]
    assert differences(before, to_dict(config), defaults=default_settings(config)) == []
    changed = to_dict(tiny_config(inputs, gan="off", teacher_loss="cd"))
    assert differences(before, changed, defaults=default_settings(config)) == [
        "ablation.gan: on -> off",
        "ablation.teacher_loss: none -> cd",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan": "off"}, "--gan off leaves no loss"),
        ({"teacher_loss": "dmd"}, "--teacher-loss must be one of none, pd, cd, ctm"),
        ({"teacher_loss": "pd", "pd_steps": 6}, "power of two, not 6"),
        ({"teacher_loss": "pd", "pd_steps": 8}, "ends before the student has one step"),
        ({"teacher_loss": "cd", "engine": "graph"}, "--engine graph does not support the losses of ablations"),
        ({"frechet_loss": ("lite0",), "engine": "compile"}, "--engine compile does not support the losses of"),
        ({"teacher_loss": "cd", "target_ema": 1.0}, "--target-ema must be at least 0 and below 1"),
        ({"teacher_loss": "cd", "teacher_loss_levels": 1}, "--teacher-loss-levels must be at least 2"),
        ({"feature_weights": ("lpips=a.pth",)}, "no loss looks through a feature network"),
        ({**FRECHET, "frechet_population": 200}, "has 256 features, and their covariance"),
        ({"frechet_loss": ("lite0",), "frechet_population": 1280}, "has 1280 features, and their covariance"),
        ({"frechet_loss": ("lpips",)}, "LPIPS has too many features"),
        ({"frechet_loss": ("pixel",)}, "unknown features 'pixel'"),
    ],
)
def test_what_cannot_work_is_refused(inputs, tmp_path, settings, message):
    config = tiny_config(inputs, run_dir=tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=message):
        preflight(config)
        tiny_task(config)
    assert not (tmp_path / "run").exists()
