"""Outputs written in several runs: the same as in one, whatever interrupted them."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gdd_fast import signals
from gdd_fast.errors import ConfigError
from gdd_fast.sampling.resume import ResumableWriter, part_folder, reserve
from gdd_fast.sampling.writers import PngFolder, is_whole_png

SEEDS = [*range(997, 1007), 5]
RUN = {"network": "abc", "dtype": "torch.float32"}
OUTPUTS = pytest.mark.parametrize("name", ["out.zip", "out.npz", "out"])


@contextlib.contextmanager
def resume_writer(path: Path, seeds, run, **options) -> Iterator[ResumableWriter]:
    with reserve(path) as output, output.writer(seeds, run, **options) as writer:
        yield writer


def images(seeds) -> torch.Tensor:
    return torch.stack([torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(s)) for s in seeds]).to(
        torch.uint8
    )


def classes(seeds) -> torch.Tensor:
    return torch.tensor(seeds) % 7


def write(path: Path, *, stop: int | None = None, error: BaseException | None = None) -> int:
    """Put images two by two until `stop` of all are there, then raise `error` or leave. Returns how many there were."""
    with resume_writer(path, SEEDS, RUN, subdirs=True, workers=2) as writer:
        done = writer.done
        for start in range(done, len(SEEDS) if stop is None else stop, 2):
            seeds = SEEDS[start : start + 2]
            writer.put(seeds, images(seeds), classes(seeds))
        if error is not None:
            raise error
    return done


def content(path: Path) -> dict[str, bytes]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: file[name].tobytes() for name in file.files}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@OUTPUTS
def test_interrupted_runs_make_what_one_makes(tmp_path, name):
    assert write(tmp_path / "whole" / name) == 0
    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=4, error=KeyboardInterrupt())
    assert not path.exists()
    with pytest.raises(RuntimeError):
        write(path, stop=6, error=RuntimeError("the network failed"))
    assert write(path, stop=6) == 6, "nothing new, and nothing lost"
    assert not path.exists()
    assert write(path) == 6
    assert content(path) == content(tmp_path / "whole" / name)
    assert list(content(path)) == list(content(tmp_path / "whole" / name)) or name == "out"
    assert not part_folder(path).exists()


@OUTPUTS
@pytest.mark.parametrize("damage", ["gone", "cut off", "empty"])
def test_an_image_that_is_not_whole_is_made_anew(tmp_path, name, damage):
    """As a machine that went down leaves them, and a process that was killed."""
    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=6, error=KeyboardInterrupt())
    folder = part_folder(path)
    image = sorted((folder / "images").rglob("*.png"))[1]
    if damage == "gone":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[: 20 if damage == "cut off" else 0])
    image.with_name(f".{image.name}.part").write_bytes(b"half")
    with (folder / "labels.jsonl").open("a") as file:
        file.write('["0012')
    assert write(path) == 1
    write(tmp_path / "whole" / name)
    assert content(path) == content(tmp_path / "whole" / name)


@OUTPUTS
def test_what_was_put_at_the_output_meanwhile_is_kept(tmp_path, name):
    path = tmp_path / name
    mine = path if path.suffix else path / "mine.png"

    def fill():
        mine.parent.mkdir(exist_ok=True)
        mine.write_bytes(b"mine")

    write(path, stop=4)
    fill()
    with pytest.raises(ConfigError, match=r"exists|not empty"):
        write(path)  # before anything is computed
    mine.unlink()
    refused = pytest.raises(ConfigError, match=r"exists|not empty")
    with refused, resume_writer(path, SEEDS, RUN, subdirs=True) as writer:
        writer.put(SEEDS[4:], images(SEEDS[4:]), classes(SEEDS[4:]))
        fill()
    assert content(path) == {"mine.png": b"mine"} if not path.suffix else path.read_bytes() == b"mine"
    mine.unlink()
    assert write(path) == len(SEEDS), "nothing is lost"
    assert not part_folder(path).exists()


def test_a_second_process_is_refused_and_takes_nothing_away(tmp_path):
    path = tmp_path / "out.zip"
    with resume_writer(path, SEEDS, RUN, subdirs=True) as writer:
        for start in range(0, len(SEEDS), 2):
            seeds = SEEDS[start : start + 2]
            writer.put(seeds, images(seeds), classes(seeds))
            with pytest.raises(ConfigError, match=r"another process is writing .*out\.zip"):
                write(path)
    assert not part_folder(path).exists()
    write(tmp_path / "whole.zip")
    assert content(path) == content(tmp_path / "whole.zip")


def test_an_output_is_taken_before_anything_is_written(tmp_path):
    path = tmp_path / "folder" / "below" / "out.zip"
    with reserve(path):
        with pytest.raises(ConfigError, match="another process is writing"), reserve(path):
            pytest.fail("is not to be entered")
        assert [file.name for file in part_folder(path).iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir()), "and nothing is left of it"
    assert write(path) == 0 and [file.name for file in path.parent.iterdir()] == ["out.zip"]


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    flock = fcntl.flock

    def others_end(file, operation):
        Path(file.name).unlink()
        flock(file, operation)

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="another process"):
        patch.setattr(fcntl, "flock", others_end)
        write(tmp_path / "out.zip")
    assert write(tmp_path / "out.zip") == 0


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="cannot be locked: No locks"):
        write(tmp_path / "new" / "out.zip")
    assert not (tmp_path / "new").exists()


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@OUTPUTS
@SIGNALS
def test_a_signal_costs_no_image(tmp_path, monkeypatch, name, number):
    """Neither while images are put nor while the last ones are written."""
    path = tmp_path / name
    for stop, method in ((2, "_write"), (4, "close")):
        plain = getattr(PngFolder, method)

        def interrupted(*arguments, plain=plain, **options):
            signal.raise_signal(number)
            return plain(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(ENDS[number]):
            patch.setattr(PngFolder, method, interrupted)
            write(path, stop=stop)
    assert write(path) == 4
    write(tmp_path / "whole" / name)
    assert content(path) == content(tmp_path / "whole" / name)


@SIGNALS
def test_a_second_signal_does_not_wait(tmp_path, monkeypatch, number):
    path, close = tmp_path / "out.zip", PngFolder.close
    write(path, stop=2)
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)

    def while_closed(self):
        signal.raise_signal(number)
        close(self)
        raise AssertionError("waited")

    with monkeypatch.context() as patch, pytest.raises(ENDS[number]), reserve(path) as output:
        patch.setattr(PngFolder, "close", while_closed)
        with output.writer(SEEDS, RUN, subdirs=True) as writer:
            writer.put(SEEDS[2:4], images(SEEDS[2:4]), classes(SEEDS[2:4]))
            signal.raise_signal(number)
    assert write(path) >= 2
    write(tmp_path / "whole.zip")
    assert content(path) == content(tmp_path / "whole.zip")


@SIGNALS
@pytest.mark.parametrize("method", ["mkdir", "open", "unlink", "rmdir"])
def test_a_signal_while_the_output_is_taken_or_given_back_leaves_nothing(tmp_path, monkeypatch, number, method):
    path, plain = tmp_path / "new" / "out.zip", getattr(Path, method)
    handlers = [signal.getsignal(each) for each in ENDS]

    def interrupted(*arguments, **options):
        result = plain(*arguments, **options)
        signal.raise_signal(number)
        return result

    with monkeypatch.context() as patch, pytest.raises(ENDS[number]):
        patch.setattr(Path, method, interrupted)
        with reserve(path):
            pass
    assert not path.parent.exists() and [signal.getsignal(each) for each in ENDS] == handlers
    assert write(path) == 0


def mutations(process: Callable[[], None], fatal: int | None, at: Path) -> int:
    """Run `process` in a child that is killed before its `fatal`-th change under `at`; returns how many it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        changes = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal changes
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            changed = opened or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if changed and str(at) in os.path.abspath(os.fsdecode(arguments[0])):
                changes += 1
                if changes == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        process()
        os.write(writer, str(changes).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    expected = (0, True) if fatal is None else (-signal.SIGKILL, False)
    assert (os.waitstatus_to_exitcode(status), bool(answer)) == expected
    return int(answer or 0)


@OUTPUTS
def test_killed_anywhere_it_goes_on(tmp_path, name):
    """A process is killed before each change that it makes to the disk, in turn. The next one has the same result, and
    makes no image anew that was there."""
    seeds = [997, 1001, 5]
    put = {seed: (images([seed]), classes([seed])) for seed in seeds}

    def run(path: Path) -> int:
        with resume_writer(path, seeds, RUN, subdirs=True, workers=1) as writer:
            done = writer.done
            for seed in seeds[done:]:
                writer.put([seed], *put[seed])
        return done

    run(tmp_path / "whole" / name)
    want = content(tmp_path / "whole" / name)
    steps = mutations(lambda: run(tmp_path / "count" / name), None, tmp_path)
    assert steps > 10
    for step in range(1, steps + 1):
        path = tmp_path / f"{step}" / name
        mutations(lambda path=path: run(path), step, tmp_path)
        folder = part_folder(path)
        if path.exists():
            with pytest.raises(ConfigError, match=r"exists|not empty"):
                run(path)  # it was finished
        else:
            there = sum(map(is_whole_png, (folder / "images").rglob("0*.png"))) if folder.exists() else 0
            assert run(path) == there
            assert not folder.exists()
        assert content(path) == want
        assert set(path.parent.iterdir()) <= {path, folder}
        if path.is_dir():
            assert not [file for file in path.rglob(".*")]


def test_images_half_put_are_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.zip"
    write(path, stop=4)

    def fail(image):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("gdd_fast.sampling.writers.encode_png", fail)
        write(path)
    assert write(path) == 4
    write(tmp_path / "whole.zip")
    assert content(path) == content(tmp_path / "whole.zip")


def test_another_run_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "out.zip"
    write(path, stop=4)
    with pytest.raises(ConfigError, match="another dtype"), resume_writer(path, SEEDS, {**RUN, "dtype": "bfloat16"}):
        pass
    assert write(path) == 4


def test_what_is_in_the_way(tmp_path):
    part_folder(tmp_path / "out.zip").mkdir()
    (part_folder(tmp_path / "out.zip") / "mine").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").touch()
    for name in ("out.zip", "full", "images.tar"):
        with pytest.raises(ConfigError), resume_writer(tmp_path / name, SEEDS, RUN):
            pass
    part_folder(tmp_path / "bad.npz").mkdir()
    (part_folder(tmp_path / "bad.npz") / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"), resume_writer(tmp_path / "bad.npz", SEEDS, RUN):
        pass


def test_images_that_are_not_the_next(tmp_path):
    with pytest.raises(ValueError, match="next"), resume_writer(tmp_path / "out.zip", SEEDS, RUN) as writer:
        writer.put(SEEDS[1:3], images(SEEDS[1:3]))


def test_labels_of_all_parts_are_joined(tmp_path):
    write(tmp_path / "out.zip", stop=4)
    write(tmp_path / "out.zip")
    labels = json.loads(content(tmp_path / "out.zip")["dataset.json"])["labels"]
    assert [label for _, label in labels] == classes(SEEDS).tolist()
