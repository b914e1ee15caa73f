"""What a run goes on from: other data or another teacher, a run that diverged; and a dry run that says the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_run import SIZE, tiny_flags, tiny_network, write_inputs

from gdd_fast import pretrain
from gdd_fast.data import ImageDataset, open_dataset, write_edm_zip
from gdd_fast.data.fingerprint import dataset_digest
from gdd_fast.distill import comparison
from gdd_fast.models.files.load import RUN_GENERATOR, load_generator, network_digest
from gdd_fast.models.files.save import save_network
from gdd_fast.train import main
from gdd_fast.training import checkpoint, loggers, loop


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """No TensorBoard, whose import takes seconds, and no distance between 1,280 features."""
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    monkeypatch.setattr(comparison, "FEATURES", ("pixels",))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What `write_inputs` makes, and a finished run of 8 images with its report."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "find_spec", lambda name: None)
        patch.setattr(comparison, "PANEL_IMAGES", 4)
        patch.setattr(comparison, "FEATURES", ("pixels",))
        main(tiny_flags(folder, duration_mimg=8e-6, evaluate_images=4))
    return folder


@pytest.fixture
def run(inputs, tmp_path):
    """A copy of that run's folder."""
    return shutil.copytree(inputs / "run", tmp_path / "run")


def refused(capsys, flags, main=main):
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ")
    return text


def pixels(seed=0, images=24):
    return np.random.default_rng(seed).integers(0, 256, (images, 1, SIZE, SIZE), np.uint8)


def other_teacher(folder):
    net = tiny_network()
    with torch.no_grad():
        next(net.parameters()).add_(1e-3)
    save_network(net, folder)
    return folder


def other_data(path):
    write_edm_zip(path, pixels(seed=1))
    return path


@pytest.mark.parametrize("more", [{}, {"dry_run": True}, {"duration_mimg": 12e-6}], ids=["finished", "dry", "longer"])
@pytest.mark.parametrize(("name", "make"), [("teacher", other_teacher), ("data", other_data)])
def test_other_contents_of_the_same_form(inputs, run, tmp_path, capsys, name, make, more):
    settings = {"run_dir": run, "duration_mimg": 8e-6, "evaluate_images": 4, **more}
    dry = ["--dry-run"] if settings.pop("dry_run", False) else []
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = tiny_flags(inputs, **{**settings, name: make(tmp_path / "other.zip")})
    assert f"another --{name}" in refused(capsys, [*flags, *dry])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_same_contents_elsewhere(inputs, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "write", lambda *_: pytest.fail("measured again"))
    shutil.copytree(inputs / "teacher", tmp_path / "moved")
    shutil.copy(inputs / "data.zip", tmp_path / "moved.zip")
    inputs_now = {"teacher": tmp_path / "moved", "data": tmp_path / "moved.zip"}
    main(tiny_flags(inputs, run_dir=run, duration_mimg=8e-6, evaluate_images=4, **inputs_now))
    assert "distilled, 1 step" in capsys.readouterr().out


def test_a_report_is_of_one_teacher_and_one_set_of_images(inputs, run, tmp_path, capsys, monkeypatch):
    measured = []
    monkeypatch.setattr(comparison, "write", lambda *_: measured.append(1))
    evaluate_data = tmp_path / "reference.zip"
    write_edm_zip(evaluate_data, pixels())
    flags = tiny_flags(inputs, run_dir=run, duration_mimg=8e-6, evaluate_images=4, evaluate_data=evaluate_data)
    main(flags)
    assert not measured  # the training images under another name
    other_data(evaluate_data)
    main(flags)
    assert measured
    report_file = run / comparison.REPORT
    told = json.loads(report_file.read_text())
    told["measured"]["teacher"] = "another"
    report_file.write_text(json.dumps(told))
    main(tiny_flags(inputs, run_dir=run, duration_mimg=8e-6, evaluate_images=4))
    assert len(measured) == 2


def delete(generator):
    shutil.rmtree(generator)


def replace_by_another(generator):
    net = load_generator(generator)
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-6
    save_network(net, generator)


def cut_short(generator):
    file = generator / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [delete, replace_by_another, cut_short], ids=lambda f: f.__name__)
def test_the_generator_of_a_finished_run_is_that_of_its_checkpoint(inputs, run, capsys, damage):
    """Whatever happened to it: killed between checkpoint and export, half copied, deleted."""
    generator = run / RUN_GENERATOR
    before = (generator / "model.safetensors").read_bytes()
    damage(generator)
    main(tiny_flags(inputs, run_dir=run, duration_mimg=8e-6, evaluate_images=4))
    assert f"One-step generator in {generator}" in capsys.readouterr().out
    assert (generator / "model.safetensors").read_bytes() == before
    load_generator(run)


@pytest.mark.parametrize("lost", ["comparison.png", "report.json", "report.html"])
def test_what_a_finished_run_lacks_is_made_again(inputs, run, capsys, monkeypatch, lost):
    """It was killed behind its export, or somebody has removed it."""
    monkeypatch.setattr(comparison, "PANEL_IMAGES", 4)
    before = (run / lost).read_bytes()
    (run / lost).unlink()
    main(tiny_flags(inputs, run_dir=run, duration_mimg=8e-6, evaluate_images=4))
    assert "distilled, 1 step" in capsys.readouterr().out
    again = (run / lost).read_bytes()
    assert again == before or (lost == "report.html" and len(again) == len(before))  # it shows times


def test_a_panel_of_fewer_images_does_not_stay(inputs, run, monkeypatch):
    """Killed while it writes what a longer run ends with: the next call does not take the old panel for the new."""
    monkeypatch.setattr(comparison, "PANEL_IMAGES", 4)
    before = (run / "comparison.png").read_bytes()
    flags = tiny_flags(inputs, run_dir=run, duration_mimg=12e-6, evaluate_images=4)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(comparison, "save_panel", lambda *_, **__: (_ for _ in ()).throw(KeyError("killed")))
        main(flags)
    main(flags)
    assert (run / "comparison.png").read_bytes() != before


def test_a_finished_run_says_so_before_it_reads_all_images_again(inputs, run, tmp_path, monkeypatch, capsys):
    shutil.copy(inputs / "data.zip", tmp_path / "held.zip")
    flags = {"run_dir": run, "evaluate_images": 4, "evaluate_data": tmp_path / "held.zip"}
    monkeypatch.setattr(ImageDataset, "validate", lambda *_: pytest.fail("read"))
    main(tiny_flags(inputs, duration_mimg=8e-6, **flags))
    assert f"{run} is finished: 8 images." in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception, match="read"):  # one that goes on finds a damaged one first
        main(tiny_flags(inputs, duration_mimg=12e-6, **flags))


def test_a_page_that_was_deleted_is_made_again(inputs, run, tmp_path, capsys):
    """Of a finished run that measures nothing, and of a teacher's, too."""
    (run / "report.html").unlink()
    main(tiny_flags(inputs, run_dir=run, duration_mimg=8e-6))
    assert (run / "report.html").is_file()
    flags = ["--data", str(inputs / "data.zip"), "--model-channels", "8", "--num-blocks", "1", "--batch", "4"]
    flags += ["--device", "cpu", "--run-dir", str(tmp_path / "teacher"), "--duration-mimg", "4e-6"]
    pretrain.main(flags)
    (tmp_path / "teacher" / "report.html").unlink()
    pretrain.main(flags)
    assert (tmp_path / "teacher" / "report.html").is_file()


@pytest.mark.parametrize("damaged", [b"\xff{", b"[]"])
def test_a_report_that_is_none_is_measured_again(inputs, run, damaged):
    (run / comparison.REPORT).write_bytes(damaged)
    main(tiny_flags(inputs, run_dir=run, duration_mimg=8e-6, evaluate_images=4))
    assert json.loads((run / comparison.REPORT).read_text())["images"] == 4


def test_digests_are_of_contents(tmp_path):
    net = tiny_network()
    same = network_digest(net)
    net.dtype = torch.bfloat16
    assert network_digest(net) == same
    assert network_digest(tiny_network(label_dim=3)) != same
    assert network_digest(load_generator(other_teacher(tmp_path / "net"))) != same

    labels = np.arange(24) % 3
    write_edm_zip(tmp_path / "a.zip", pixels(), labels)
    np.savez(tmp_path / "b.npz", images=pixels()[:, 0], labels=labels)
    np.savez(tmp_path / "c.npz", images=pixels()[:, 0], labels=labels[::-1].copy())
    digests = [
        dataset_digest(open_dataset(tmp_path / name, use_labels=use_labels))
        for use_labels in (False, True)
        for name in ("a.zip", "b.npz", "c.npz")
    ]
    assert digests[0] == digests[1] == digests[2] and digests[3] == digests[4]
    assert len({digests[0], digests[3], digests[5]}) == 3


def test_pretraining_on_other_images(inputs, tmp_path, capsys):
    flags = ["--model-channels", "8", "--num-blocks", "1", "--batch", "4", "--device", "cpu", "--tick-kimg", "0.004"]
    flags += ["--run-dir", str(tmp_path / "run"), "--duration-mimg", "4e-6"]
    pretrain.main([*flags, "--data", str(inputs / "data.zip")])
    other = ["--data", str(other_data(tmp_path / "other.zip")), "--duration-mimg", "8e-6"]
    assert "another --data" in refused(capsys, [*flags, *other], pretrain.main)


def test_a_run_that_diverges_and_goes_on_as_its_error_says(inputs, run, capsys):
    """From 8 good images on with a learning rate at which gradients stop being finite, and then with a lower one."""

    def flags(**settings):
        return tiny_flags(inputs, run_dir=run, **{"duration_mimg": 80e-6, "max_skipped_steps": 2, **settings})

    kept = {path: path.read_bytes() for path in (run / loop.CHECKPOINT, *(run / RUN_GENERATOR).iterdir())}
    told = refused(capsys, flags(g_lr=1e30))  # its images are not finite, and so the heads see it first
    assert "2 discriminator steps in a row had gradients that were not finite" in told
    assert "lower --g-lr" in told and "resumes from the checkpoint of 8 images" in told
    assert checkpoint.load_values(run / loop.DIVERGED)["images"] > 8
    assert {path: path.read_bytes() for path in kept} == kept

    main(flags(g_lr=1e-5, g_precision="bf16", duration_mimg=24e-6))
    shown = capsys.readouterr()
    changes = "generator.g_lr: 0.0001 -> 1e-05; generator.g_precision: fp32 -> bf16"
    assert f"Settings that have changed: {changes}." in shown.out + shown.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 8, 16, 24]
    assert lines[1]["changed"] == changes.split("; ")
    saved = checkpoint.load(run / loop.CHECKPOINT)
    assert saved.values["images"] == 24 and saved.values["g_optimizer"][0]["lr"] == 1e-5
    assert all(tensor.isfinite().all() for tensor in saved.section("generator").values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 33, "batch_gpu": 10}, "--batch-gpu 10 does not divide"),
        ({"evaluate_images": 8, "evaluate_data": "nope.zip"}, "nope.zip"),
        ({"r1_gamma": 0.5}, "other settings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_dry_run_refuses_what_the_run_does(inputs, run, capsys, settings, message):
    flags = tiny_flags(inputs, run_dir=run, **settings)
    told = refused(capsys, [*flags, "--dry-run"])
    assert message in told and told == refused(capsys, flags)


def test_a_dry_run_names_the_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--dry-run"])
    config, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert config["run"]["run_dir"] == "runs/demo"
    assert not list(tmp_path.iterdir())


def test_falling_rates_resume_to_the_bit(inputs, tmp_path):
    """A run made longer goes on at the rate that its images call for."""
    falling = {"lr_decay_kimg": 4e-3, "evaluate_images": 0}
    main(tiny_flags(inputs, run_dir=tmp_path / "whole", duration_mimg=16e-6, **falling))
    for length in (8e-6, 16e-6):
        main(tiny_flags(inputs, run_dir=tmp_path / "parts", duration_mimg=length, **falling))
    main(tiny_flags(inputs, run_dir=tmp_path / "constant", duration_mimg=16e-6, evaluate_images=0))
    runs = ("whole", "parts", "constant")
    digests = {name: network_digest(load_generator(tmp_path / name / RUN_GENERATOR)) for name in runs}
    assert digests["whole"] == digests["parts"] != digests["constant"]
