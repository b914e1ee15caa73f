"""Checkpoints: everything comes back to the bit, nothing half-written is ever read, nothing else is taken for one."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from gdd_fast.errors import CheckpointError
from gdd_fast.training import checkpoint
from gdd_fast.training.checkpoint import Checkpoint, load, load_values, optimizer_tensors, optimizer_values, save
from gdd_fast.training.optimizer import make_adam


def trained(seed=0, steps=3):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = make_adam(net.parameters(), 1e-2, lazy_interval=16)
    train(net, optimizer, steps)
    return net, optimizer


def train(net, optimizer, steps):
    random = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        net(torch.randn(4, 2, 5, 5, generator=random)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def write(path, net, optimizer, values=None):
    sections = {"net": net.state_dict(), "adam": optimizer_tensors(optimizer)}
    save(path, sections, {"adam": optimizer_values(optimizer), **(values or {})})


def test_everything_comes_back(tmp_path):
    net, optimizer = trained()
    write(tmp_path / "c.safetensors", net, optimizer, {"images": 12, "nested": {"a": [1, None, "x"]}})
    saved = load(tmp_path / "c.safetensors")
    assert saved.values["images"] == 12 and saved.values["nested"] == {"a": [1, None, "x"]}
    other, other_optimizer = trained(seed=1, steps=0)
    saved.load_module("net", other)
    saved.load_optimizer("adam", other_optimizer)
    for ours, theirs in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for parameter, state in other_optimizer.state.items():
        assert state["exp_avg_sq"].stride() == parameter.stride()
    train(net, optimizer, 2)
    train(other, other_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_an_optimizer_goes_on_with_its_own_learning_rate(tmp_path):
    """A run that diverged goes on with a lower one: the checkpoint's moments, the command's rate."""
    net, optimizer = trained()
    write(tmp_path / "c.safetensors", net, optimizer)
    other = make_adam(net.parameters(), 1e-3)
    load(tmp_path / "c.safetensors").load_optimizer("adam", other)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, other, 1)
    assert other.param_groups[0]["lr"] == 1e-3
    largest = max((p - b).abs().max().item() for p, b in zip(net.parameters(), before, strict=True))
    assert 1e-5 < largest < 5e-3  # one step of Adam is about the rate: 1e-2 without


def test_the_values_can_be_read_alone(tmp_path):
    write(tmp_path / "c", *trained(), {"images": 12})
    assert load_values(tmp_path / "c") == load(tmp_path / "c").values
    (tmp_path / "c").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_values(tmp_path / "c")


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    one = torch.arange(6.0)
    save(tmp_path / "c", {"a": {"x": one, "y": one[2:]}, "b": {"x": one}}, {})
    saved = load(tmp_path / "c")
    assert torch.equal(saved.section("a")["y"], one[2:]) and torch.equal(saved.section("b")["x"], one)
    assert saved.section("a").keys() == {"x", "y"}


def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save(path, {"a": {"x": torch.zeros(3)}}, {"images": 1})

    def crash(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(CheckpointError, match="No space left"):
        save(path, {"a": {"x": torch.ones(3)}}, {"images": 2})
    assert load(path).values == {"images": 1} and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = tmp_path / "c.safetensors"
    write(path, *trained(steps=1))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(path)
    header = {"format": checkpoint.FORMAT, "version": "2", "values": "{}"}
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="version 2"):
        load(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata={**header, "version": "1", "values": "{"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)


def test_what_does_not_fit_is_refused(tmp_path):
    net, optimizer = trained()
    write(tmp_path / "c", net, optimizer)
    saved = load(tmp_path / "c")
    wider = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(CheckpointError, match="net does not fit"):
        saved.load_module("net", wider)
    with pytest.raises(CheckpointError, match="adam does not fit"):
        saved.load_optimizer("adam", make_adam(wider.parameters(), 1e-2))
    with pytest.raises(CheckpointError, match="adam does not fit"):
        saved.load_optimizer("adam", make_adam(net[0].parameters(), 1e-2))
    with pytest.raises(CheckpointError, match="adam does not fit"):
        Checkpoint(saved.tensors, {}).load_optimizer("adam", make_adam(net.parameters(), 1e-2))


def test_the_file_is_plain_tensors_and_json(tmp_path):
    net, optimizer = trained()
    write(tmp_path / "c.safetensors", net, optimizer)
    with safetensors.safe_open(tmp_path / "c.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["values"])["adam"][0]["params"] == [0, 1, 2, 3]
        assert "net/0.weight" in file.keys() and "adam/0/exp_avg_sq" in file.keys()  # noqa: SIM118


_WRITES_BEHIND = """
import os, sys
from functools import partial
import torch
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.training.behind import Behind
from gdd_fast.training.checkpoint import copied, save

net = EDMPrecond(8, 3, 0, **ncsnpp(model_channels=64, channel_mult=[2], num_blocks=1))
net.to(memory_format=torch.channels_last)
assert max(p.numel() for p in net.parameters()) > 2**15  # PyTorch copies those in parallel

def write(sections):
    save(sys.argv[1] + "/c.safetensors", sections, {})
    save_network(net, sys.argv[1] + "/net", weights=sections["ema"])

torch.ones(2**20) + 1
behind = Behind()
behind.start(lambda: None)
behind.wait()
before = len(os.listdir("/proc/self/task"))
behind.start(partial(write, copied({"ema": net.state_dict()})))
behind.wait()
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""


def test_writing_behind_training_computes_nothing_in_parallel(tmp_path):
    """A second pool of threads in a process makes OpenMP let both sleep: training took 1.6 times as long."""
    command = [sys.executable, "-c", _WRITES_BEHIND, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["2", "0"], done.stdout
