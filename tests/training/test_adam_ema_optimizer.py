"""AdamEma as an optimizer: its state, groups, schedulers and copies, and what it refuses."""

import copy
import pickle

import adam_steps as steps
import pytest
import torch
from torch import nn

from gdd_fast.errors import ConfigError, InputError
from gdd_fast.training.checkpoint import Checkpoint, optimizer_tensors, optimizer_values
from gdd_fast.training.checkpoint import load as load_checkpoint
from gdd_fast.training.checkpoint import save as save_checkpoint
from gdd_fast.training.optimizer import AdamEma


@steps.BACKENDS
def test_state_dict_is_adams_both_ways(backend):
    ours, theirs = steps.parameters(backend), steps.parameters(backend)
    fused, adam = AdamEma(ours, lr=1e-2, betas=(0.5, 0.9), backend=backend), torch.optim.Adam(theirs, lr=1e-2)
    steps.fused_steps(fused, ours, 3, 0)
    adam.load_state_dict(copy.deepcopy(fused.state_dict()))
    back = AdamEma(steps.parameters(backend), backend=backend)
    back.load_state_dict(copy.deepcopy(adam.state_dict()))
    with torch.no_grad():
        for p, q, r in zip(ours, theirs, back.param_groups[0]["params"], strict=True):
            q.copy_(p)
            r.copy_(p)
    for step in range(3, 6):
        for params, optimizer in ((ours, fused), (theirs, adam), (back.param_groups[0]["params"], back)):
            steps.set_gradients(params, step)
            optimizer.step()
    steps.assert_close(theirs, ours)
    steps.assert_close(back.param_groups[0]["params"], ours, rtol=0, atol=0)
    assert float(back.state[back.param_groups[0]["params"][0]]["step"]) == 6


@steps.BACKENDS
def test_survives_a_checkpoint_file(tmp_path, backend):
    """Saved tensors are contiguous, whatever the parameter's memory format, and every step count is on its own."""
    params, path = steps.parameters(backend), tmp_path / "c.safetensors"
    optimizer = AdamEma(params, lr=1e-2, backend=backend)
    steps.fused_steps(optimizer, params, 2, 0)
    save_checkpoint(path, {"o": optimizer_tensors(optimizer)}, {"o": optimizer_values(optimizer)})
    saved: Checkpoint = load_checkpoint(path)
    again = copy.deepcopy(params)
    restored = AdamEma(again, lr=1e-2, backend=backend)  # the rate is the run's to say
    saved.load_optimizer("o", restored)
    for p, o in ((params, optimizer), (again, restored)):
        steps.fused_steps(o, p, 2, 0, first=2)
    steps.assert_close(again, params, rtol=0, atol=0)


@steps.BACKENDS
def test_learning_rate_can_change_between_steps(backend):
    params, twin = steps.parameters(backend), steps.parameters(backend)
    ours, theirs = AdamEma(params, lr=0.0, backend=backend), torch.optim.Adam(twin, lr=0.0)
    for step, lr in enumerate((0.0, 1e-3, 1e-2)):
        for p, optimizer in ((params, ours), (twin, theirs)):
            optimizer.param_groups[0]["lr"] = lr
            steps.set_gradients(p, step)
            optimizer.step()
    steps.assert_close(params, twin)


@steps.BACKENDS
def test_learning_rate_may_be_a_tensor_changed_in_place(backend):
    params, twin = steps.parameters(backend), steps.parameters(backend)
    lr = torch.zeros((), device=params[0].device)
    ours, theirs = AdamEma(params, lr=lr, backend=backend), torch.optim.Adam(twin, lr=0.0)
    for step, rate in enumerate((0.0, 1e-3, 1e-2)):
        lr.fill_(rate)
        theirs.param_groups[0]["lr"] = float(lr)
        for p, optimizer in ((params, ours), (twin, theirs)):
            steps.set_gradients(p, step)
            optimizer.step()
    steps.assert_close(params, twin)


@steps.BACKENDS
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda t: 0.5**t, lambda t: 1.0, lambda t: 1 / (1 + t)]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [1e-2, 1.0, 1e-3], total_steps=6),  # changes the betas too
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    ],
    ids=["lambda", "one cycle", "cosine"],
)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_groups_and_schedulers(tensor, schedule, backend):
    optimizers, everything = [], []
    for make in (torch.optim.Adam, lambda groups, **options: AdamEma(groups, backend=backend, **options)):
        params = steps.parameters(backend)
        groups = steps.in_groups(params)
        if tensor and make is not torch.optim.Adam:
            groups = [{**g, "lr": torch.tensor(g.get("lr", 1e-3), dtype=torch.float64)} for g in groups]
        optimizer = make(groups, lr=1e-3)
        scheduler = schedule(optimizer)
        for step in range(5):
            steps.set_gradients(params, step)
            optimizer.step()
            scheduler.step()
        optimizers.append(optimizer), everything.append(params)
    steps.assert_close(everything[1], everything[0])
    ours, theirs = (o.state_dict() for o in reversed(optimizers))
    assert ours["state"].keys() == theirs["state"].keys()
    if not tensor:
        assert ours["param_groups"][2]["lr"] == theirs["param_groups"][2]["lr"]


@steps.BACKENDS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alike(duplicate, backend):
    params = steps.parameters(backend)
    averages = steps.averages_of(params)
    optimizer = AdamEma(steps.in_groups(params), lr=1e-3, averages=averages, backend=backend)
    steps.fused_steps(optimizer, params, 2, 0.5, bad_steps=(1,))
    # its parameters and averages travel with an optimizer; what else holds them has to be copied in the same breath
    other, again, means = duplicate((optimizer, params, averages))
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.1
    for o, p in ((optimizer, params), (other, again)):
        steps.fused_steps(o, p, 2, 0.5, first=2)
    steps.assert_close(again, params, rtol=0, atol=0)
    steps.assert_close(means.values(), averages.values(), rtol=0, atol=0)
    assert int(other.skipped) == int(optimizer.skipped) == 1
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(again, params, strict=True) if a.numel())


def test_optimizer_refuses_what_it_cannot_count():
    params = steps.parameters("torch")
    optimizer = AdamEma(params)
    steps.set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(ConfigError, match="before the first step"):
        optimizer.add_param_group({"params": steps.parameters("torch")})
    params[0].grad = None
    with pytest.raises(ConfigError, match="always have one"):
        optimizer.step()
    with pytest.raises(InputError, match="betas"):
        AdamEma(params, betas=(0.9, 1.0))


def test_a_group_that_is_refused_is_not_kept():
    optimizer = AdamEma(steps.parameters("torch"))
    with pytest.raises(InputError, match="betas"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "betas": (0.9, 1.0)})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_other_shapes_is_refused_and_changes_nothing():
    params = steps.parameters("torch")
    optimizer = AdamEma(params)
    steps.set_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][0]["exp_avg_sq"] = torch.zeros(1)  # broadcasts
    with pytest.raises(ConfigError, match="exp_avg_sq of parameter 0"):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][0][name], before["state"][0][name]) for name in before["state"][0])


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"decoupled_weight_decay": True}], ids=str)
def test_a_state_of_another_algorithm_is_refused_and_changes_nothing(options):
    params = steps.parameters("torch")
    optimizer, other = AdamEma(params, lr=0.5), torch.optim.Adam(steps.parameters("torch"), lr=1e-3, **options)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match=next(iter(options))):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before
