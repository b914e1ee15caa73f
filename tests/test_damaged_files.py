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
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import edm_files
import numpy as np
import pytest
import torch
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
from gdd_fast.training import checkpoint

CPU_SECONDS = 5
MEMORY = 512 << 20  # more than the process has had, at any moment
ADDRESSES = 8 << 30  # so that a file cannot take the machine with it

# Mutations of bytes


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to four small changes, most of them of a few bytes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + length] = draw.randbytes(length)
            case 2:
                data[at:at] = draw.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                del data[at:]
            case 5:
                other = draw.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case _:
                width = draw.choice((1, 2, 4, 8))
                number = draw.choice((0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), 1 << (8 * width - 2)))
                data[at : at + width] = number.to_bytes(width, draw.choice(("little", "big")))
    return bytes(data)


# Mutations of JSON

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    1e308,
    10**9,
    10**18,
    -(10**30),
    "",
    "x" * 1000,
    "../../etc/passwd",
    "\ud800",
    [],
)
VALUES += ({}, [[]], {"a": 1}, [1, 2], "nan", "float32", "os.system", "<script>", float("nan"), float("inf"))


def change_json(value, draw: random.Random):
    """One value somewhere is another, is gone, or comes twice."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        copy = value.copy()
        match draw.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, list):
                copy.insert(key, copy[key])
            case 1:
                copy[f"{key}x"] = copy[key]
            case _:
                copy[key] = change_json(value[key], draw)
        return copy
    return draw.choice(VALUES)


def damage_json(text: bytes, draw: random.Random) -> bytes:
    match draw.randrange(12):
        case 0:
            return damage(text, draw)
        case 1:
            return b"[" * 100_000 + text
        case _:
            return json.dumps(change_json(json.loads(text), draw)).encode(errors="replace")


def damage_json_file(path: Path, draw: random.Random) -> None:
    path.write_bytes(damage_json(path.read_bytes(), draw))


def damage_file(path: Path, draw: random.Random) -> None:
    path.write_bytes(damage(path.read_bytes(), draw))


# Mutations of archives


def png_of(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes = b"\0" * 100) -> bytes:
    """A PNG that says to be so large, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def zeros_deflated(mebibytes: int) -> bytes:
    """A deflate stream of so many MiB of zeros, made at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + packer.flush()


def with_bomb(path: Path, name: str, mebibytes: int) -> None:
    """Add a member that unpacks to so many MiB, as it says."""
    content, size = zeros_deflated(mebibytes), mebibytes << 20
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(name, content)
        info = archive.getinfo(name)
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, size
        archive.fp.seek(info.header_offset)
        archive.fp.write(info.FileHeader(zip64=False))
        archive.fp.seek(archive.start_dir)


def repack(path: Path, members: list[tuple[str, bytes]], attributes: int = 0) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes
            archive.writestr(info, content)


def damage_zip(path: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = draw.randrange(len(members))
    name, content = members[at]
    sizes = ((31_623, 31_623), (10**9, 1), (1, 10**9), (2**31 - 1, 2**31 - 1), (0, 0), (9_000, 9_000), (16, 17))
    bad_names = ("../../evil.png", "/etc/evil.png", "a\\..\\b.png", "x" * 5000 + ".png", "\n.png", "", ".hidden.png")
    match draw.randrange(10):
        case 0:
            members[at] = (draw.choice(bad_names), content)
        case 1:
            members.append((name, content))
        case 2:
            png = png_of(*draw.choice(sizes), draw.choice((1, 8, 16)), draw.choice((0, 2, 3, 4, 6)))
            members[at] = (name if name.endswith("png") else "a.png", png)
        case 3:
            members[at] = (name, damage(content, draw))
        case 4:
            labels = next(i for i, member in enumerate(members) if member[0] == "dataset.json")
            members[labels] = ("dataset.json", damage_json(members[labels][1], draw))
        case 5:
            return with_bomb(path, draw.choice(("bomb.png", "00000/bomb.jpg")), draw.choice((1, 64, 3000)))
        case 6:
            del members[at]
        case 7:
            return repack(path, members, draw.choice((0o120777 << 16, 0o040755 << 16, 0xFFFFFFFF)))
        case _:
            return damage_file(path, draw)
    with pytest.warns(UserWarning) if len({n for n, _ in members}) < len(members) else _nothing():
        repack(path, members)
    return None


def damage_npz(path: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(members))
    match draw.randrange(7):
        case 0:
            shape = draw.choice(((10**9,), (10**6, 10**6), (-1, 4), (2**62, 4), (0, 16, 16), (6, 0, 0), ()))
            members[name] = _npy(draw.choice(("|u1", "<f8", "<i8")), shape, b"\0" * 64)
        case 1:
            members[name] = _npy("|O", (1,), edm_files.dumps(edm_files.Reduced(os.system, "true")))
        case 2:
            members[name] = _npy(draw.choice(("<f4", "<c16", "|S8", "<U9", "<M8[s]", "|b1")), (4, 4), bytes(4096))
        case 3:
            members[name] = damage(members[name][:128], draw) + members[name][128:]
        case 4:
            members[draw.choice(("../x.npy", "images.npy.npy", "labels", "sigma.npy"))] = members[name]
        case 5:
            del members[name]
        case _:
            return damage_file(path, draw)
    repack(path, list(members.items()))
    if draw.random() < 0.1:
        with_bomb(path, "more.npy", 3000)
    return None


def _npy(kind: str, shape: tuple[int, ...], content: bytes) -> bytes:
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def damage_safetensors(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.4:
        return damage_file(path, draw)
    header = damage_json(content[8 : 8 + length], draw)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return None


def damage_floats(path: Path, draw: random.Random) -> None:
    """Numbers that are none, in their place."""
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    at = draw.randrange(length, len(content) - 4)
    content[at : at + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), 1e38)))
    path.write_bytes(content)


# Kinds of files: what a whole one is, how it is damaged, and how it is read


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


_nothing = _Nothing


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
        (folder / "tuned.json").write_text(json.dumps(table))
        return folder / "tuned.json"

    @staticmethod
    def harm(path: Path, draw: random.Random) -> None:
        damage_json_file(path, draw)

    @staticmethod
    def read(path: Path) -> None:
        from gdd_fast.kernels import _launch, attention, group_norm_silu, max_pool2x2, relu_bits, residual, to_uint8

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
            to_uint8.to_uint8(x)
            relu_bits.mask_bits(x, relu_bits.relu_bits_(x, 6.0))
            max_pool2x2.max_pool2x2(x)
            residual.residual(x, x, channel, 1.0, torch.empty_like(x), None)
            group_norm_silu.statistics(x, 1)
            y, lse = attention.attention(x, 1, False)
            attention.attention_backward(y, x, y, lse, 1, False)
            assert all(len(shape) == 3 for shape in _launch.faster_than_sdpa(x.device))
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
