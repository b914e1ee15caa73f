"""What the analysis of layers measures, against the same thing done by hand; and its command."""

import copy
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from tiny_run import tiny_network
from torch.nn import functional as F

from gdd_fast.analyze import main
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.files.load import as_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.report.layer_analysis import MEASURES, analyze, branches, measure, sampler_states
from gdd_fast.sampling.sampler import heun

SMALL = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NETWORKS = {
    "ddpmpp": {"model_type": "SongUNet", "model_channels": 8, **SMALL},
    "ncsnpp": ncsnpp(model_channels=8, **SMALL),
    "adm": {"model_type": "DhariwalUNet", "model_channels": 64, **SMALL},
}


def network(name):
    torch.manual_seed(0)
    net = EDMPrecond(8, 3, **NETWORKS[name]).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dropped_branch_is_one_whose_last_weights_are_zero(name):
    net = network(name)
    x, sigma = 3 * torch.randn(2, 3, 8, 8), 2.0
    found = measure(net, {sigma: x}, None)
    whole = net(x, sigma)
    skip = 0.25 / (sigma**2 + 0.25)
    for row, branch in enumerate(branches(net)):
        other = copy.deepcopy(net)
        last = {"conv": ".conv1", "attention": ".proj", "input": ""}[branch.kind]
        layer = other.model.get_submodule(branch.name + last)
        layer.weight.zero_()
        layer.bias.zero_()
        change = whole - other(x, sigma)
        per_image = change.flatten(1).norm(dim=1) / (whole - skip * x).flatten(1).norm(dim=1)
        assert found["output_change"][row][0] == pytest.approx(per_image.mean().item(), rel=1e-4)
        assert found["image_change"][row][0] == pytest.approx(
            change.flatten(1).square().mean(1).sqrt().mean().item(), rel=1e-4
        )
        assert per_image.min() > 1e-4, "or this test would see nothing"


def test_every_branch_of_every_kind_is_found():
    kinds = [(b.name, b.kind) for b in branches(network("ncsnpp"))]
    assert ("enc.4x4_aux_residual", "input") in kinds
    assert kinds.index(("enc.4x4_block0", "conv")) + 1 == kinds.index(("enc.4x4_block0", "attention"))
    assert len(kinds) == 14
    with pytest.raises(WeightsError, match="EDM's"):
        plain = network("adm")
        plain.model = torch.nn.Conv2d(3, 3, 3)
        branches(plain)


def test_the_relative_norm_is_the_branch_against_the_sum():
    net = network("ddpmpp")
    block = net.model.dec["8x8_block0"]  # takes a skip connection, and has a skip convolution
    seen = {}
    block.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0], emb=inputs[1]))
    x = torch.randn(3, 3, 8, 8)
    row = [(b.name, b.kind) for b in branches(net)].index(("dec.8x8_block0", "conv"))
    found = measure(net, {0.5: x}, None)["relative_norm"][row][0]
    net(x, 0.5)
    maps = torch.cat(seen["x"], 1)

    def norm(layer, y):
        return F.group_norm(y, layer.num_groups, layer.weight, layer.bias, layer.eps)

    h = block.conv0(F.silu(norm(block.norm0, maps)))
    h = block.conv1(F.silu(norm(block.norm1, h + block.affine(seen["emb"])[:, :, None, None])))
    expected = h.flatten(1).norm(dim=1) / (h + block.skip(maps)).flatten(1).norm(dim=1)
    assert found == pytest.approx(expected.mean().item(), rel=1e-4)


def test_the_states_are_those_of_the_sampler():
    """The last of its steps returns the denoised image of its last state."""
    net, z = network("ncsnpp"), torch.randn(2, 3, 8, 8)
    states = sampler_states(net, z, None, steps=5)
    levels = list(states)
    assert levels == sorted(levels, reverse=True) and len(levels) == 5
    torch.testing.assert_close(states[80.0], 80 * z)
    torch.testing.assert_close(net(states[levels[-1]], levels[-1]), heun(net, z, steps=5), rtol=1e-4, atol=1e-5)


def test_a_student_stands_at_its_one_level():
    """Before training it is the teacher but for the preconditioning, and so is its column the teacher's first."""
    teacher = tiny_network(label_dim=3).eval()
    student = as_generator(teacher).eval()
    found = analyze(teacher, student, levels=3, seeds=range(2))
    assert found["student"]["sigmas"] == [80.0] and len(found["teacher"]["sigmas"]) == 3
    for name in MEASURES:
        first = [row[0] for row in found["teacher"][name]]
        assert [row[0] for row in found["student"][name]] == pytest.approx(first, rel=0.01)
    at_20 = analyze(teacher, as_generator(teacher, 20.0).eval(), levels=2, seeds=range(1))
    assert at_20["student"]["sigmas"] == [20.0]
    with pytest.raises(ConfigError, match="distilled from"):
        analyze(teacher, network("ncsnpp"), levels=3, seeds=range(2))


def test_a_broken_network_is_named():
    teacher = tiny_network().eval()
    teacher.model.map_layer0.weight.data.fill_(torch.nan)
    with pytest.raises(WeightsError, match="noise level 80 is not finite"):
        analyze(teacher, levels=2, seeds=range(1))


def test_a_run_without_a_generator_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"discriminator": {}}))
    with pytest.raises(SystemExit):
        main(["--teacher", "demo", "--student", str(tmp_path), "--device", "cpu"])
    assert "a training run without a generator yet" in capsys.readouterr().err


def test_the_command_writes_numbers_and_a_map(tmp_path, capsys):
    save_network(tiny_network(), tmp_path / "teacher")
    save_network(as_generator(tiny_network()), tmp_path / "run" / "generator_ema")
    options = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "run"), "--device", "cpu"]
    main([*options, "--levels", "3", "--images", "2"])
    found = json.loads((tmp_path / "run" / "layer_analysis.json").read_text())
    svg = ElementTree.parse(tmp_path / "run" / "layer_analysis.svg")
    cells = [e for e in svg.iter() if e.tag.endswith("rect") and len(e)]
    assert len(cells) == 3 * len(found["layers"]) * (3 + 1), "three maps of every layer, with a column for the student"
    assert str(tmp_path / "run" / "layer_analysis.svg") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher", "demo", "--levels", "1"], "--levels"),
        (["--teacher", "demo", "--images", "0"], "--images"),
        (["--teacher", "demo", "--out", "map.png"], "--out"),
        (["--teacher", "nowhere.pkl"], "nowhere.pkl"),
        (["--teacher", "demo", "--student", "nowhere.pkl"], "nowhere.pkl"),
    ],
)
def test_bad_options(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*options, *([] if "--out" in options else ["--out", "x.json"]), "--device", "cpu"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
