"""Files from elsewhere, damaged at random or built to do harm: whatever a user may hand in is read, or refused by name.

Every mutant of every kind is read in a process of its own kind, which is watched: nothing in a file runs or makes the
process write, run or connect to anything, no read takes 5 seconds of the processor or much memory, and all that comes
out is a `GddFastError`. Mutants are made from seeds; a failure names the one to repeat.
"""

import functools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import edm_files
import numpy as np
import pytest
import torch
from mutations import (
    damage_file,
    damage_floats,
    damage_json,
    damage_json_file,
    damage_npz,
    damage_safetensors,
    damage_zip,
)
from run_folder import write_run
from tiny_run import ALONE, write_inputs

from gdd_fast import backend
from gdd_fast.data import load_data, write_edm_zip
from gdd_fast.distill.pretraining import PretrainConfig, Pretraining
from gdd_fast.errors import GddFastError
from gdd_fast.metrics.reference import load_references
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.report import report_page
from gdd_fast.training import checkpoint, loop

CPU_SECONDS = 5
MEMORY = 512 << 20  # more than the process has had, at any moment
ADDRESSES = 8 << 30  # so that a file cannot take the machine with it

# Kinds of files: what a whole one is, how it is damaged, and how it is read


class Kind:
    def __init__(self, make: Callable[[Path], Path], harm: Callable[[Path, random.Random], None], read: Callable):
        self.make, self.harm, self.read = make, harm, read


def smallest() -> EDMPrecond:
    """Little to lay out, which takes longer than to read."""
    return EDMPrecond(
        8, 1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )


def _pickle(folder: Path) -> Path:
    net, source = smallest(), f"open({str(folder / 'ran')!r}, 'w').close()"
    arguments = {key: value for key, value in net.init_config().items() if key not in ("dtype", "sigma_init")}
    return edm_files.write(
        folder / "net.pkl", {"ema": edm_files.network(net, "EDMPrecond", arguments, module_src=source)}
    )


def _zip(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), np.uint8)
    write_edm_zip(folder / "data.zip", pixels, np.arange(6) % 3)
    return folder / "data.zip"


def _npz(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    np.savez(folder / "data.npz", images=pixels, labels=np.arange(6))
    return folder / "data.npz"


def _read_data(path: Path) -> None:
    load_data(str(path), use_labels=True).validate()


def _statistics(folder: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((32, 4))
    sigma = np.cov(rows, rowvar=False)
    np.savez(folder / "ref.npz", mu=rows.mean(0), sigma=sigma, n=32, features="pixels", image_shape=(3, 4, 4))
    return folder / "ref.npz"


def _network(folder: Path) -> Path:
    save_network(smallest(), folder / "net")
    return folder / "net"


def _harm_weights(path: Path, draw: random.Random) -> None:
    damage_safetensors(path / "model.safetensors", draw)


def _harm_config(path: Path, draw: random.Random) -> None:
    damage_json_file(path / "config.json", draw)


class _RunFolder:
    """A pretraining run's checkpoint and teacher, with the records of a distillation beside them."""

    def __init__(self) -> None:
        self.task: Pretraining | None = None

    def make(self, folder: Path) -> Path:
        torch.set_num_threads(1)
        write_inputs(folder)
        config = PretrainConfig(
            data=str(folder / "data.zip"), run_dir=folder / "run", model_channels=4, num_blocks=1, batch=4, device="cpu"
        )
        self.task = Pretraining(config, ALONE)
        run = write_run(folder / "run", ticks=1)
        save_network(smallest(), run / "generator_ema")
        (run / "best").mkdir()
        (run / "best" / "best.json").write_text('{"fid": {"value": 2.0, "images": 2000, "metric": "FID"}}')
        (run / "report.json").write_text('{"distances": {"pixels": {"teacher": 1.0, "distilled": 2.0}}}')
        self.task.iteration(0)
        sections, values = self.task.state()
        checkpoint.save(run / "checkpoint.safetensors", sections, {**values, "images": 4, "config": {}, "contents": {}})
        return run

    @staticmethod
    def harm(run: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(path for path in run.rglob("*") if path.is_file()))
        match path.suffix:
            case ".json":
                damage_json_file(path, draw)
            case ".safetensors":
                (damage_safetensors if draw.random() < 0.7 else damage_floats)(path, draw)
            case ".jsonl":
                lines = path.read_bytes().splitlines()
                at = draw.randrange(len(lines))
                lines[at] = damage_json(lines[at], draw)
                path.write_bytes(b"\n".join(lines) + b"\n")
            case _:
                damage_file(path, draw)

    def read(self, run: Path) -> None:
        for attempt in (
            lambda: load_generator(run),
            lambda: report_page.page([report_page.read_run(run)]),
            lambda: loop.check_same_run(run, {}, {}, 100),
            lambda: self.task.restore(checkpoint.load(run / "checkpoint.safetensors")),
        ):
            try:
                attempt()
            except GddFastError:
                continue


class _LaunchTable:
    """Triton's launch options with a GPU's measurements; a table that is taken launches every kernel on that GPU."""

    @staticmethod
    def make(folder: Path) -> Path:
        from gdd_fast.kernels import _launch

        table = json.loads(_launch.TABLE.read_text())
        for name in ("group_norm_silu.forward", "group_norm_silu.backward", "residual"):
            measured = [{"shape": [n, 256, 1024], "options": {"elements": 64 * n, "num_warps": 2}} for n in (1, 64)]
            table[name]["sm_90"] = {"num_warps": 4, "measured": measured}
        table["max_pool2x2"]["sm_90"] = {"BLOCK": 512}
        table["attention"]["sm_90"] = {"forward-64-fp32": {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4}}
        table["attention"]["faster_than_sdpa"] = {"sm_90": [[64, 64, "float16"], [256, 64, "float32"]]}
        table["frozen_conv2d_relu"]["faster_by_cudnn"] = {"sm_90": [[64, 128, 3, 1, 112, "bfloat16"]]}
        (folder / "tuned.json").write_text(json.dumps(table))
        return folder / "tuned.json"

    @staticmethod
    def harm(path: Path, draw: random.Random) -> None:
        damage_json_file(path, draw)

    @staticmethod
    def read(path: Path) -> None:
        from gdd_fast.kernels import _launch, attention, group_norm_silu, max_pool2x2, relu_bits, residual

        x, channel = torch.zeros(2, 12, 4, 4), torch.ones(12)
        for cached in (_launch.table, _launch.configuration, backend._check_launch_table):
            cached.cache_clear()
        on_sm_90 = functools.partial(_launch.options_on, "sm_90")
        with (
            mock.patch.object(_launch, "TABLE", path),
            mock.patch.object(_launch, "options_on", lambda _, operator, shape: on_sm_90(operator, shape)),
            mock.patch.object(_launch, "_architecture", lambda _: "sm_90"),
            _launch.noting() as noted,
        ):
            assert backend.obstacle(backend.Operator("any", frozenset({"triton"})), "triton", "cuda") is None
            relu_bits.mask_bits(x, relu_bits.relu_bits_(x, 6.0))
            max_pool2x2.max_pool2x2(x)
            residual.residual(x, x, channel, 1.0, torch.empty_like(x), None)
            group_norm_silu.statistics(x, 1)
            y, lse = attention.attention(x, 1, False)
            attention.attention_backward(y, x, y, lse, 1, False)
            assert all(len(shape) == 3 for shape in _launch.faster_than_sdpa(x.device))
            assert all(len(shape) == 6 for shape in _launch.faster_by_cudnn(x.device))
        for launch in noted.launches:
            assert all(launch.grid) and launch.options["num_warps"] in (1, 2, 4, 8, 16, 32)


_run_folder = _RunFolder()

KINDS = {
    "edm-pickle": Kind(_pickle, damage_file, load_generator),
    "zip": Kind(_zip, damage_zip, _read_data),
    "npz": Kind(_npz, damage_npz, _read_data),
    "statistics": Kind(_statistics, damage_npz, load_references),
    "safetensors": Kind(_network, _harm_weights, load_generator),
    "config": Kind(_network, _harm_config, load_generator),
    "run": Kind(_run_folder.make, _run_folder.harm, _run_folder.read),
    "tuned": Kind(_LaunchTable.make, _LaunchTable.harm, _LaunchTable.read),
}

# The process that reads

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.rmdir", "os.mkdir")
FORBIDDEN += ("subprocess.Popen", "pickle.find_class", "socket.connect", "ctypes.dlopen", "shutil.rmtree", "os.link")


class Forbidden(BaseException):
    """What no file may bring about; not an Exception, so that nothing takes it for damage."""


def _watch() -> Callable[[bool], None]:
    on = False

    def hook(event: str, arguments: tuple) -> None:
        if not on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or writes:
            raise Forbidden(f"{event} {arguments}")

    def turn(now: bool) -> None:
        nonlocal on
        on = now

    sys.addaudithook(hook)
    return turn


def _read_all(kind: Kind, folder: Path, numbers: range, name: str, at: mmap.mmap) -> list[str]:
    whole = kind.make(folder)
    kind.read(whole)  # and whatever is imported late is imported
    watch = _watch()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ADDRESSES,) * 2)
    failures: list[str] = []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for number in numbers:
        at[:8] = number.to_bytes(8, "little")
        mutant = folder / "mutants" / whole.name
        shutil.rmtree(mutant.parent, ignore_errors=True)
        mutant.parent.mkdir()
        if whole.is_dir():
            shutil.copytree(whole, mutant)
        else:
            shutil.copy(whole, mutant)
        kind.harm(mutant, random.Random(f"{name} {number}"))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            watch(True)
            kind.read(mutant)
        except GddFastError:
            pass
        except BaseException as error:
            failures.append(f"mutant {number}: {type(error).__name__}: {error}\n{traceback.format_exc(-6)}")
        finally:
            watch(False)
            signal.setitimer(signal.ITIMER_PROF, 0)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if now > peak + MEMORY:
            failures.append(f"mutant {number}: took {(now - peak) >> 20} MiB")
        peak = max(peak, now)
        if len(failures) > 20:
            break
    return failures


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "mutants", [range(200), pytest.param(range(200, 2200), marks=pytest.mark.slow)], ids=["short", "long"]
)
@pytest.mark.parametrize("name", KINDS)
def test_mutants_are_read_or_refused(tmp_path, name, mutants):
    if name == "tuned":
        pytest.importorskip("triton")
    at = mmap.mmap(-1, 8)
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            failures = _read_all(KINDS[name], tmp_path, mutants, name, at)
            (tmp_path / "failures").write_text("\n".join(failures))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    number = int.from_bytes(at[:8], "little")
    assert status != -signal.SIGPROF, f"mutant {number}: more than {CPU_SECONDS} seconds"
    assert status == 0, f"mutant {number}: the process ended with {status}"
    failures = (tmp_path / "failures").read_text()
    assert not failures, failures
    assert not (tmp_path / "ran").exists()
