"""Outputs written in several runs: the same as in one, whatever interrupted them."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gdd_fast.errors import ConfigError
from gdd_fast.inference import writers
from gdd_fast.inference.resume import part_folder, resume_writer

SEEDS = [*range(997, 1007), 5]
RUN = {"network": "abc", "dtype": "torch.float32"}
OUTPUTS = pytest.mark.parametrize("name", ["out.zip", "out.npz", "out"])


def images(seeds) -> torch.Tensor:
    return torch.stack([torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(s)) for s in seeds]).to(
        torch.uint8
    )


def classes(seeds) -> torch.Tensor:
    return torch.tensor(seeds) % 7


def write(
    path: Path, *, stop: int | None = None, error: BaseException | None = None, part_seconds: float = 60.0
) -> int:
    """Put images two by two until `stop` of all are there, then raise `error` or leave. Returns how many there were."""
    with resume_writer(path, SEEDS, RUN, subdirs=True, workers=2, part_seconds=part_seconds) as writer:
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
def test_a_part_is_closed_in_time_and_a_killed_one_is_not_counted(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=4, error=KeyboardInterrupt(), part_seconds=0.0)
    folder = part_folder(path)
    assert len(list(folder.glob("*.count"))) == 2
    # what a kill leaves: an open part, and one that was renamed but not counted
    for leftover in ("open", "000002"):
        target = folder / f"{leftover}{path.suffix}"
        if path.suffix:
            target.write_bytes(b"half")
        else:
            target.mkdir()
            (target / "000001.png").write_bytes(b"half")
    assert write(path) == 4
    write(tmp_path / "whole" / name)
    assert content(path) == content(tmp_path / "whole" / name)


def test_a_folder_whose_joining_was_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "out"
    moved = []

    def replace(self, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(target)
        return original(self, target)

    original = Path.replace
    with monkeypatch.context() as patch:
        write(path, stop=len(SEEDS) - 1)
        patch.setattr(
            Path, "replace", lambda self, to: replace(self, to) if self.parent.name == "000000" else original(self, to)
        )
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert write(path) == len(SEEDS)
    write(tmp_path / "whole" / "out")
    assert content(path) == content(tmp_path / "whole" / "out")


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
    with pytest.raises(ConfigError, match=r"exists|not empty"), resume_writer(path, SEEDS, RUN) as writer:
        writer.put(SEEDS[4:], images(SEEDS[4:]), classes(SEEDS[4:]))
        fill()
    assert content(path) == {"mine.png": b"mine"} if not path.suffix else path.read_bytes() == b"mine"
    mine.unlink()
    assert write(path) == len(SEEDS), "nothing is lost"
    assert not part_folder(path).exists()


def test_images_half_put_are_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.zip"
    write(path, stop=4)

    def fail(image):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("gdd_fast.inference.writers.encode_png", fail)
        write(path)
    assert write(path) == 4
    write(tmp_path / "whole.zip")
    assert content(path) == content(tmp_path / "whole.zip")


def test_a_part_that_cannot_be_closed_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.zip"
    write(path, stop=4)
    original = writers._ZipSink.write

    def fail(self, name, data):
        if name == "dataset.json":  # the last thing that is written
            raise OSError("disk full")
        original(self, name, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(writers._ZipSink, "write", fail)
        write(path, stop=6)
    assert write(path) == 4


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
