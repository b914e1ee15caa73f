"""`--precision`: what the two recipes set, and what each of the public code's ways does."""

import copy
import json
import platform
import re
from pathlib import Path

import pytest
import torch
from tiny_run import BATCH, tiny_config, tiny_task
from torch import nn

from gdd_fast.config import RECIPES, differences, preset, to_dict
from gdd_fast.device import fast_layout
from gdd_fast.engine.fold import make_target
from gdd_fast.errors import ConfigError
from gdd_fast.models.backbones import build_backbone, fold_batch_norm, probe_batch_norm
from gdd_fast.models.discriminator_heads import DiscriminatorHeads
from gdd_fast.train import read
from gdd_fast.training import checkpoint
from gdd_fast.training.optimizer import StepGuard, make_adam

pytestmark = pytest.mark.usefixtures("plain")

GPU, CPU = torch.device("cuda"), torch.device("cpu")
PUBLIC = {name: value for name, value in RECIPES["public"].items() if name != "logit_reduction"}


def test_flags_stand_above_the_recipe_and_that_above_the_preset():
    flags = ["--preset", "imagenet-64-gdd-i", "--data", "d", "--teacher", "t"]
    chosen = read([*flags, "--precision=public", "--class-embedding", "learned"]).config
    assert (chosen.discriminator.d_precision, chosen.loss.r1_precision, chosen.run.nonfinite) == ("fp32",) * 2 + (
        "replace",
    )
    assert chosen.discriminator.class_embedding == "learned" and chosen.generator.g_lr == 8e-6
    assert read([*flags, "--precision", "fast"]).config == read(flags).config
    assert preset("demo", "fast").discriminator.d_precision == "bf16"
    with pytest.raises(ConfigError, match="--precision must be one of fast, public, not 'quick'"):
        preset("demo", "quick")


def test_the_page_names_all_that_the_recipes_differ_in():
    page = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    name = "cifar10-cond-gdd-i"
    fast, public = (to_dict(preset(name, precision)) for precision in RECIPES)
    for flag in RECIPES["public"]:
        (row,) = [row for row in rows if f"(`--{flag.replace('_', '-')}`)" in row[0]]
        for recipe, cell in zip((fast, public), row[1:], strict=True):
            value = next(section[flag] for section in recipe.values() if flag in section)
            said = "off" if value is False else value
            assert said == re.findall(r"[\w-]+", cell.lower())[0], (flag, cell)
    assert {d.partition(":")[0].partition(".")[2] for d in differences(fast, public)} <= RECIPES["public"].keys()


def test_layouts():
    assert fast_layout(GPU, "bf16") is fast_layout(GPU, "tf32") is torch.channels_last
    assert fast_layout(GPU, "fp32") is torch.contiguous_format


def test_layouts_of_an_engine_on_a_gpu():
    kinds = (torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, True)
    layouts = [make_target(GPU, dtype, "torch", tf32=tf32).layout for dtype, tf32 in kinds]
    assert layouts == [torch.contiguous_format, *[torch.channels_last] * 3]


@pytest.mark.parametrize(
    ("machine", "capability", "channels_last"),
    [
        ("x86_64", "AVX2", {"fp32", "bf16"}),
        ("x86_64", "DEFAULT", {"bf16"}),
        ("aarch64", "DEFAULT", set()),
    ],
)
def test_layouts_of_a_cpu(monkeypatch, machine, capability, channels_last):
    """Of an engine too, which has no settings of a run."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        expected = torch.channels_last if precision in channels_last else torch.contiguous_format
        assert fast_layout(CPU, precision) is make_target(CPU, dtype, "torch").layout is expected


def test_probed_backbones_are_those_that_saw_zeros_in_training():
    torch.manual_seed(0)
    backbone = build_backbone("tf_efficientnet_lite0", None, 32)
    whole = copy.deepcopy(backbone)
    nn.Module.train(whole, True)  # all of it, where the probe has only the norms in training mode
    with torch.no_grad():
        whole(torch.zeros(1, 3, 256, 256))
    probe_batch_norm(backbone)
    assert not any(module.training for module in backbone.modules())
    for key, value in whole.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(backbone.state_dict()[key], value)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(fold_batch_norm(copy.deepcopy(backbone))(x)[3], backbone(x)[3], rtol=1e-3, atol=1e-4)


def test_heads_with_tables_and_vectors_of_their_own():
    torch.manual_seed(0)
    heads = DiscriminatorHeads([(8, 8)], [(16, 8)], label_dim=3, width=0.1, tables_per_head=True, spectral_random=True)
    tables = [head.embedding.weight for head in heads.heads[0]]
    assert heads.embedding is None and all(t.shape == (3, 320) and t.requires_grad for t in tables)
    logits = heads([[torch.randn(2, 8, 16, 16), torch.randn(2, 8, 8, 8)]], torch.eye(3)[:2])
    sum(x.sum() for x in logits[0]).backward()
    assert all(t.grad[:2].any() and not t.grad[2].any() for t in tables)
    found = []
    for random in (False, True):
        made = DiscriminatorHeads([(8, 8)], [(16, 8)], width=0.1, spectral_random=random)
        norm = made.heads[0][0].main[0].parametrizations.weight
        matrix = norm.original.detach().flatten(1)
        found.append(float(norm[0]._u @ matrix @ norm[0]._v / torch.linalg.svdvals(matrix)[0]))
    assert found[0] > 0.9 and abs(found[1]) < 0.7


def test_gradients_that_are_not_finite_can_be_replaced():
    from tiny_run import ALONE

    weight = nn.Parameter(torch.zeros(4))
    guard = StepGuard("generator", make_adam([weight], 0.1), ALONE, 3, "replace")
    weight.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    guard.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.0, -0.1, 0.1, -0.1]))
    assert guard.skipped == 0


def test_the_r1_step_has_its_own_precision_and_exports_are_float32(inputs, tmp_path):
    settings = {"g_precision": "bf16", "d_precision": "bf16", "r1_precision": "tf32", "r1_interval": 1}
    task = tiny_task(tiny_config(inputs, **settings))
    assert (task.features.dtype, task.r1_features.dtype) == (torch.bfloat16, torch.float32)
    seen = []
    task.heads.heads[0][0].main[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    for number in range(2):
        task.iteration(number * BATCH)
    assert seen == [torch.bfloat16] * 6 + [torch.float32] and task.heads.dtype == torch.bfloat16
    sections, values = task.state()
    checkpoint.save(tmp_path / "state", sections, {**values, "images": 2 * BATCH})
    other = tiny_task(tiny_config(inputs, **settings))
    with torch.no_grad():
        for features in (other.features, other.r1_features):
            for tensor in features.projection_state().values():
                tensor.zero_()
    other.restore(checkpoint.load(tmp_path / "state"))
    for ours, theirs in zip((task.features, task.r1_features), (other.features, other.r1_features), strict=True):
        assert all(torch.equal(a, theirs.projection_state()[k]) for k, a in ours.projection_state().items())
    task.export(tmp_path, sections)
    exported = json.loads(next(tmp_path.glob("*/config.json")).read_text())
    assert exported["init"]["dtype"] == "float32" and task.generator.dtype == torch.bfloat16


def test_an_iteration_as_the_public_code_has_it(inputs):
    task = tiny_task(tiny_config(inputs, **PUBLIC, r1_interval=1))
    assert task.r1_features is task.features and task.features.dtype == torch.float32
    for number in range(2):
        task.iteration(number * BATCH)
    assert all(value == value for value in task.averages.take().values())
