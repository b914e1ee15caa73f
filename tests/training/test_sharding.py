"""`--fsdp`: generator, average and moments in parts over two processes (gloo). Parity: test_rank_parity.py."""

import json

import pytest
import torch
from test_ranks import finished, torchrun
from tiny_run import tiny_config, tiny_flags, tiny_task, write_inputs

from gdd_fast.config import override
from gdd_fast.distill.run import preflight
from gdd_fast.errors import ConfigError
from gdd_fast.models.files.load import RUN_GENERATOR, load_generator
from gdd_fast.training import checkpoint, loop

WORKER = """
import json, pathlib, sys
import torch
from tiny_run import schedule_of, tiny_config, tiny_task
from gdd_fast.config import to_dict
from gdd_fast.distill import comparison
from gdd_fast.models.files.load import RUN_GENERATOR
from gdd_fast.ranks import join
from gdd_fast.training import checkpoint, loop
from gdd_fast.training.sharding import assembled, form_of, own_part

folder = pathlib.Path(sys.argv[1])
found = {}


def held(tensors):
    return sum(own_part(t).numel() for t in tensors), sum(t.numel() for t in tensors)


with join("cpu") as world:
    config = tiny_config(folder, batch=4, fsdp=True, duration_mimg=8e-6)
    form = form_of(tiny_task(tiny_config(folder, batch=4), world).generator)
    task = tiny_task(config, world)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def outputs():
        with torch.no_grad():
            return task.generator(80 * x, 80.0), assembled(form, task.generator)(80 * x, 80.0)

    for number in range(3):
        task.iteration(number * 4)
    moments = [m for s in task.g_guard.optimizer.state.values() for m in (s["exp_avg"], s["exp_avg_sq"])]
    found["held"] = [held(list(tensors)) for tensors in
                     (task.generator.parameters(), task.ema.net.parameters(), moments)]

    sections, values = task.state()
    if world.is_main:
        checkpoint.save(folder / "sharded.safetensors", sections, {**values, "images": 12})
    world.barrier()
    fresh = tiny_task(config, world)
    fresh.restore(checkpoint.load(folder / "sharded.safetensors"))
    again, _ = fresh.state()
    found["lost"] = [name for name, part in sections.items() if world.is_main  # other ranks' heads have own buffers
                     for key, t in part.items() if not torch.equal(t, again[name][key])]

    # one number of one process's part is not finite
    with torch.no_grad():
        for p in task.generator.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
    trained = [p for p in task.generator.parameters() if p.requires_grad]
    if world.rank:
        own_part(trained[-3].grad).view(-1)[-1] = float("nan")
    weights = [own_part(p).clone() for p in trained]
    task.g_guard.step()
    found["skipped"] = [task.g_guard.skipped, task.g_guard.skipped_in_row]
    found["untouched"] = all(torch.equal(a, own_part(p)) for a, p in zip(weights, trained))
    for p in trained:
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        before = task.generator(80 * x, 80.0)  # which gathers weights
    norm = task.g_guard.step()
    after, now = outputs()
    found["stale"] = (after - now).norm().item() / (after - before).norm().item()
    found["norm"] = [norm.item(), sum(p.numel() for p in trained) ** 0.5]
    found["moved"] = not any(torch.equal(a, own_part(p)) for a, p in zip(weights, trained) if a.numel())

    # a whole run, and what it has exported made again
    for images in (8, 0):
        task = tiny_task(config, world)
        if images:
            comparison.begin(config, task)
        outcome = loop.run(task, config.run_dir, to_dict(config), schedule_of(config), world, log=())
        assert outcome.new_images == images
        if images and world.is_main:
            (config.run_dir / RUN_GENERATOR / "model.safetensors").write_bytes(b"")
        world.barrier()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
"""


def test_two_processes_hold_parts(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    code, _, err = finished(torchrun(tmp_path / "worker.py", tmp_path), timeout=600)
    assert code == 0, err
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["stale"] < 1e-2  # what it computes with after a step, beside a whole copy
        assert all(own <= 0.55 * whole for own, whole in found["held"]), found["held"]
        assert not found["lost"]
        assert found["skipped"] == [1, 1] and found["untouched"]  # on both, whichever found it
        assert found["norm"][0] == pytest.approx(found["norm"][1]) and found["moved"]

    # one process without --fsdp has every tensor of it, to the bit
    saved = checkpoint.load(tmp_path / "sharded.safetensors")
    alone = tiny_task(tiny_config(tmp_path, batch=4))
    start = checkpoint.copied(alone.state()[0])["generator"]
    alone.restore(saved)
    sections, _ = alone.state()
    for name in ("generator", "ema", "heads", "g_optimizer", "d_optimizer"):
        assert sections[name].keys() == saved.section(name).keys() and len(sections[name]) > 0
        assert all(torch.equal(t, saved.section(name)[key]) for key, t in sections[name].items()), name
    assert any(not torch.equal(t, start[key]) for key, t in sections["generator"].items())

    run = tmp_path / "run"
    exported = load_generator(run).state_dict()
    saved = checkpoint.load(run / loop.CHECKPOINT)
    assert all(torch.equal(t, exported[key]) for key, t in saved.section("ema").items())
    assert {path.name for path in (run / "samples").glob("*.png")} == {"teacher.png", "000000000.png", "000000008.png"}


@pytest.mark.slow
def test_one_process_goes_on_and_two_again(tmp_path):
    write_inputs(tmp_path)
    flags = tiny_flags(tmp_path, duration_mimg=8e-6)
    code, out, err = finished(torchrun("-m", "gdd_fast.train", *flags, "--fsdp", "--batch-gpu", "2"))
    assert code == 0, err
    assert out.count("One-step generator in") == 1

    from gdd_fast.train import main

    main([*flags, "--duration-mimg", "12e-6"])
    assert checkpoint.load(tmp_path / "run" / loop.CHECKPOINT).values["images"] == 12
    (tmp_path / "run" / RUN_GENERATOR / "config.json").unlink()  # and what is missing is made again
    code, _, err = finished(torchrun("-m", "gdd_fast.train", *flags, "--fsdp", "--duration-mimg", "16e-6"))
    assert code == 0, err
    assert checkpoint.load(tmp_path / "run" / loop.CHECKPOINT).values["images"] == 16
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "processes: 2 -> 1" in lines and "processes: 1 -> 2" in lines


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "--fsdp .* there is only one: start it with torchrun"),
        ({"engine": "graph"}, "--engine graph cannot"),
        ({"engine": "compile"}, "--engine compile cannot"),
        ({"debug_finite": True}, "--debug-finite cannot"),
        ({"teacher_loss": "cd"}, "without those of ablations"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path, settings, said):
    write_inputs(tmp_path)
    with pytest.raises(ConfigError, match=said):
        preflight(override(tiny_config(tmp_path, fsdp=True), **settings))
    assert not (tmp_path / "run").exists()
