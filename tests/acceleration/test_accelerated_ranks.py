"""Accelerated networks in DistributedDataParallel and FSDP2: weights that ranks exchange are the ones computed with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import copy
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from test_stale_weights import fresh, outcome
from gdd_fast import accelerate, restore
from gdd_fast.errors import InputError

dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(rank))


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm(), ((a - b).norm() / b.norm()).item()


# rank 1 computes with its own weights, then has rank 0's broadcast into them
net = accelerate(fresh("EDM").requires_grad_(False), backend="torch")
if rank:
    for p in net.parameters():
        p.data.mul_(0.5)
before = outcome(net)
DistributedDataParallel(net.requires_grad_(True))
after = outcome(net.requires_grad_(False))
close(after, outcome(fresh("EDM")))
assert not rank or (after[0] - before[0]).norm() > 0.1 * before[0].norm()

# sharded and trained, whole and in every block, beside the original in one piece
for name in ("EDM", "diffusers"):
    plain = fresh(name)
    for kind in (accelerate, lambda net, backend: net):
        net = kind(fresh(name), backend="torch")
        for block in [m for m in net.modules() if type(m).__name__ in ("UNetBlock", "ResnetBlock2D", "Attention")]:
            fully_shard(block)
        fully_shard(net)
        other = copy.deepcopy(plain)
        steps = [torch.optim.AdamW(n.parameters(), lr=0.01, fused=n is net) for n in (net, other)]
        for _ in range(3):
            for n, step in zip((net, other), steps, strict=True):
                n(x).square().mean().backward()
                if n is other:
                    for p in n.parameters():
                        if p.grad is not None:
                            dist.all_reduce(p.grad)
                            p.grad /= 2
                step.step()
                step.zero_grad()
            with torch.no_grad():
                got, want = net(x), other(x)
            assert (got - want).norm() <= 0.01 * want.norm(), (name, ((got - want).norm() / want.norm()).item())
        assert (want - plain(x)).norm() > 0.05 * want.norm()
        if kind is accelerate:
            try:
                restore(net)
            except InputError as error:
                assert "accelerate before fully_shard" in str(error)
            else:
                raise AssertionError("restore has taken FSDP2's class away")
dist.destroy_process_group()
print("fine", flush=True)
"""


@pytest.mark.slow
def test_weights_that_ranks_exchange(tmp_path: Path) -> None:
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    pytest.importorskip("diffusers")
    script = tmp_path / "worker.py"
    script.write_text("import vision_libraries\n" + WORKER)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/acceleration")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("fine") == 2, done.stderr[-3000:]
