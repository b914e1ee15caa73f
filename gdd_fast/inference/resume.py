"""Writing images so that an interrupted run goes on where it stopped.

Until a run is whole, its images lie in parts beside the output, in a folder `.<name>.part`: each part is a small output
of the same kind (a zip, an npz, a folder), and `run.json` says what run they are of. A part is closed every minute, and
when the run is interrupted; a part that was not closed is not counted. Parts hold a beginning of the seeds, in order,
so where to go on is their number. At the end they become one, under the output's name, and the folder goes. A folder
cannot appear at once: `run.json` then says that the joining has begun, and only so may the output hold images already.
"""

import contextlib
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write
from gdd_fast.inference.writers import ImageWriter, check_new_output, open_writer

PART_SECONDS = 60.0
_RUN, _LABELS = "run.json", "dataset.json"
_JOINING = "joining"


class ResumableWriter:
    """An `ImageWriter` for the seeds after the first `done`, which an earlier run has written."""

    def __init__(
        self, path: Path, folder: Path, seeds: Sequence[int], *, subdirs: bool, workers: int | None, seconds: float
    ) -> None:
        self.folder = folder
        self.seeds = list(seeds)
        self.suffix = path.suffix.lower() if path.suffix.lower() in (".zip", ".npz") else ""
        self.options = {"subdirs": subdirs, "workers": workers}
        self.seconds = seconds
        self.parts = _closed_parts(folder)
        self.done = sum(json.loads(part.with_suffix(".count").read_text()) for part in self.parts)
        self._stack = contextlib.ExitStack()
        self._writer: ImageWriter | None = None
        self._count = 0
        self._opened = 0.0
        self._broken = False  # putting or closing did not return: the open part may hold anything

    def put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        """As `ImageWriter.put`; the seeds have to be the next ones."""
        start = self.done + self._count
        if list(seeds) != self.seeds[start : start + len(seeds)]:
            raise ValueError(
                f"images of seeds {list(seeds)[:3]}... where those of {self.seeds[start:][:3]}... are next"
            )
        if self._writer is None:
            self._writer = self._stack.enter_context(open_writer(self._open_part, **self.options))
            self._opened = time.monotonic()
        self._broken = True
        self._writer.put(seeds, images, classes)
        self._broken = False
        self._count += len(seeds)
        if time.monotonic() - self._opened >= self.seconds:
            self.close_part()

    @property
    def _open_part(self) -> Path:
        return self.folder / f"open{self.suffix}"

    def close_part(self) -> None:
        """Make what has been put since the last part one of its own."""
        if self._writer is None:
            return
        self._broken = True
        self._stack.close()
        self._broken = False
        part = self.folder / f"{len(self.parts):06d}{self.suffix}"
        self._open_part.rename(part)
        with atomic_write(part.with_suffix(".count")) as temporary:  # what has one is closed
            temporary.write_text(str(self._count))
        self.parts.append(part)
        self.done += self._count
        self._writer, self._count = None, 0

    def give_up(self) -> None:
        """After an exception, the one being handled: keep the part if the images in it are whole, else drop it."""
        if not self._broken:
            self.close_part()
        elif self._writer is not None:
            self._stack.__exit__(*sys.exc_info())
            self._writer, self._count = None, 0


@contextlib.contextmanager
def resume_writer(
    path: str | Path,
    seeds: Sequence[int],
    run: Mapping[str, Any],
    *,
    subdirs: bool = False,
    workers: int | None = None,
    part_seconds: float = PART_SECONDS,
) -> Iterator[ResumableWriter]:
    """A writer for the images of `seeds` at `path`, as `open_writer`, that goes on from an interrupted run.

    Args:
        run: what the images depend on, in JSON's types. Parts of another run are not taken up.
        part_seconds: how often a part is closed, which is what a crash can cost.

    The block puts the images of `seeds[writer.done:]`. If it raises or ends without all of them, nothing appears at
    `path`, and what was put is kept for the next call with the same arguments.
    Raises `ConfigError`, before anything is created, for a path that cannot be written, and for parts of another run;
    and at the end, with the parts kept, for a path that has been filled meanwhile.
    """
    path = Path(path)
    folder = check_resumable(path, run)
    folder.mkdir(parents=True, exist_ok=True)
    joining = _is_joining(folder)
    _write_run(folder, run, joining)
    for leftover in folder.iterdir():
        if leftover.name != _RUN and leftover.stem not in {part.stem for part in _closed_parts(folder)}:
            _remove(leftover)
    writer = ResumableWriter(path, folder, seeds, subdirs=subdirs, workers=workers, seconds=part_seconds)
    try:
        yield writer
    except BaseException:
        writer.give_up()
        raise
    writer.close_part()
    if writer.done == len(writer.seeds):
        if not joining:
            check_new_output(path)  # whoever has filled it meanwhile keeps it
            _write_run(folder, run, joining=True)
        _join(writer.parts, path)
        shutil.rmtree(folder)


def part_folder(path: Path) -> Path:
    """Where the parts of an unfinished output lie."""
    return path.with_name(f".{path.name}.part")


def check_resumable(path: str | Path, run: Mapping[str, Any]) -> Path:
    """The folder of parts of `path`. Raises `ConfigError` if `resume_writer` would; touches nothing."""
    path = Path(path)
    folder = part_folder(path)
    if not (folder / _RUN).is_file():
        check_new_output(path)
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is in the way and not of an interrupted run; move it, or name another --out")
    else:
        try:
            before = json.loads((folder / _RUN).read_text())
        except ValueError as error:
            raise ConfigError(f"{folder / _RUN} is damaged ({error}); delete the folder to start again") from error
        now = json.loads(_text(run))
        if not before.pop(_JOINING, False):
            check_new_output(path)
        if before != now:
            changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            raise ConfigError(
                f"{folder} holds the beginning of a run with another {', '.join(changed)}; delete it to start again, "
                "or name another --out"
            )
    return folder


def _is_joining(folder: Path) -> bool:
    path = folder / _RUN
    return path.is_file() and bool(json.loads(path.read_text()).get(_JOINING, False))


def _write_run(folder: Path, run: Mapping[str, Any], joining: bool) -> None:
    with atomic_write(folder / _RUN) as temporary:
        temporary.write_text(_text({**run, _JOINING: True} if joining else run))


def _text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=2, sort_keys=True)


def _closed_parts(folder: Path) -> list[Path]:
    """In order."""
    counted = sorted(folder.glob("*.count"))
    return [next(path for path in folder.glob(f"{count.stem}*") if path != count) for count in counted]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _join(parts: Sequence[Path], path: Path) -> None:
    match path.suffix.lower():
        case ".zip" | ".npz" if len(parts) == 1:
            parts[0].replace(path)
        case ".zip":
            _join_zips(parts, path)
        case ".npz":
            _join_arrays(parts, path)
        case _:
            _join_folders(parts, path)


def _join_zips(parts: Sequence[Path], path: Path) -> None:
    labels: list[Any] = []
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for part in parts:
            with zipfile.ZipFile(part) as source:
                for entry in source.infolist():
                    if entry.filename == _LABELS:
                        labels += json.loads(source.read(entry))["labels"]
                    else:
                        archive.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))
        if labels:
            archive.writestr(zipfile.ZipInfo(_LABELS), json.dumps({"labels": labels}))


def _join_arrays(parts: Sequence[Path], path: Path) -> None:
    files = [np.load(part) for part in parts]
    arrays = [np.concatenate([file[name] for file in files]) for name in files[0].files]
    for file in files:
        file.close()
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, *arrays)


def _join_folders(parts: Sequence[Path], path: Path) -> None:
    labels: list[Any] = []
    path.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for source in sorted(part.rglob("*")):
            if source.name == _LABELS:
                labels += json.loads(source.read_text())["labels"]
            elif source.is_file():
                target = path / source.relative_to(part)
                target.parent.mkdir(exist_ok=True)
                source.replace(target)
    if labels:
        with atomic_write(path / _LABELS) as temporary:
            temporary.write_text(json.dumps({"labels": labels}))
