"""Writing images so that an interrupted run goes on where it stopped.

Until a run is whole, its images lie in parts beside the output, in a folder `.<name>.part`: each part is a small output
of the same kind (a zip, an npz, a folder), and `run.json` says what run they are of. A part is closed every minute, and
when the run is interrupted, by taking a name that says how many images it holds; one without such a name is not
counted. Parts hold a beginning of the seeds, in order, so where to go on is the sum of these numbers. One process at a
time: whoever is to write holds a lock on `lock`, which ends with the process.

A process may be killed between any two of its steps on files, and the next one goes on. At the end

    1. the parts of a zip or npz become one, `whole.*`, still in the folder; a single part is that already
    2. `run.json` says "joining", if the output is still free
    3. the output appears: a zip or npz by renaming the whole, so its absence tells that this has happened; a folder by
       moving images one by one
    4. `run.json` says "joined"
    5. the parts are removed, then `run.json`, and the folder with the lock
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write, leftovers, remove_leftovers, sync_folder
from gdd_fast.sampling.writers import ImageWriter, check_new_output, image_name, open_writer
from gdd_fast.signals import Interruptible

PART_SECONDS = 60.0
_RUN, _LOCK, _LABELS, _WHOLE, _OPEN = "run.json", "lock", "dataset.json", "whole", "open"
_PHASE = "phase"
_WRITING, _JOINING, _JOINED = "writing", "joining", "joined"
_PART = re.compile(r"(\d{6,})-(\d+)")


class ResumableWriter:
    """An `ImageWriter` for the seeds after the first `done`, which an earlier run has written."""

    def __init__(
        self, output: "Reserved", seeds: Sequence[int], *, subdirs: bool, workers: int | None, seconds: float
    ) -> None:
        self.folder = folder = output.folder
        self.held = output.interruptible.held
        self.seeds = list(seeds)
        self.suffix = _suffix(output.path)
        self.options = {"subdirs": subdirs, "workers": workers}
        self.seconds = seconds
        self.parts = _closed_parts(folder, self.suffix)
        self.done = sum(map(_count, self.parts))
        self._stack = contextlib.ExitStack()
        self._writer: ImageWriter | None = None
        self._count = 0
        self._opened = 0.0
        self._broken = False  # putting or closing did not return: the open part may hold anything

    def put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        """As `ImageWriter.put`; the seeds have to be the next ones. SIGINT and SIGTERM wait until it is done."""
        with self.held():
            self._put(seeds, images, classes)

    def _put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None) -> None:
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
        self._count += len(seeds)
        self._broken = False
        if time.monotonic() - self._opened >= self.seconds:
            self.close_part()

    @property
    def _open_part(self) -> Path:
        return self.folder / f"{_OPEN}{self.suffix}"

    def close_part(self) -> None:
        """Make what has been put since the last part one of its own. SIGINT and SIGTERM wait until it is done."""
        if self._writer is not None:
            with self.held():
                self._close_part()

    def _close_part(self) -> None:
        self._broken = True
        self._stack.close()
        part = self.folder / f"{len(self.parts):06d}-{self._count}{self.suffix}"
        self._open_part.rename(part)  # from here on it counts
        sync_folder(self.folder)
        self.parts.append(part)
        self.done += self._count
        self._writer, self._count = None, 0
        self._broken = False

    def give_up(self) -> None:
        """After an exception, the one being handled: keep the part if the images in it are whole, else drop it."""
        if not self._broken:
            self.close_part()
        elif self._writer is not None:
            self._stack.__exit__(*sys.exc_info())
            self._writer, self._count = None, 0


@dataclass(frozen=True)
class Reserved:
    """An output that this process alone may write, and the folder of its parts. See `reserve`."""

    path: Path
    folder: Path
    interruptible: Interruptible

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise `ConfigError` if `writer` would for such a run, before anything is made for it; touches nothing."""
        _check_free(self.path)
        if not (self.folder / _RUN).is_file():
            return
        before, now = _read_run(self.folder), json.loads(_text(run))
        del before[_PHASE]
        if _phase(self.path, self.folder) == _WRITING:
            check_new_output(self.path)
        if before != now:
            changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            raise ConfigError(
                f"{self.folder} holds the beginning of a run with another {', '.join(changed)}; delete it to start "
                "again, or name another --out"
            )

    @contextlib.contextmanager
    def writer(
        self,
        seeds: Sequence[int],
        run: Mapping[str, Any],
        *,
        subdirs: bool = False,
        workers: int | None = None,
        part_seconds: float = PART_SECONDS,
    ) -> Iterator[ResumableWriter]:
        """A writer for the images of `seeds`, as `open_writer`, that goes on from an interrupted run.

        Args:
            run: what the images depend on, in JSON's types. Parts of another run are not taken up.
            part_seconds: how often a part is closed, which is what a crash can cost.

        The block puts the images of `seeds[writer.done:]`. If it raises or ends without all of them, nothing appears
        at the output's path, and what was put is kept for the next call with the same arguments.
        Raises `ConfigError`, before anything is written, for a path that cannot be written and for parts of another
        run; and at the end, with the parts kept, for a path that has been filled meanwhile, and for parts that do not
        hold the images of their seeds.
        """
        self.check(run)
        path, folder = self.path, self.folder
        phase = _phase(path, folder)
        if phase == _WRITING:
            parts = _closed_parts(folder, _suffix(path))
            _check_numbers(parts, len(seeds))
            _write_run(folder, run, phase)
            remove_leftovers(folder / _RUN)
            kept = {folder / _RUN, folder / _LOCK, folder / f"{_WHOLE}{_suffix(path)}", *parts}
            for leftover in set(folder.iterdir()) - kept:
                _remove(leftover)
        writer = ResumableWriter(self, seeds, subdirs=subdirs, workers=workers, seconds=part_seconds)
        if phase != _WRITING:
            writer.done = len(writer.seeds)  # parts may have gone already
        try:
            yield writer
        except BaseException:
            writer.give_up()
            raise
        writer.close_part()
        if writer.done == len(writer.seeds):
            if phase == _WRITING:
                _check_images(writer.parts, writer.seeds, subdirs or path.suffix.lower() == ".zip")
            _finish(path, folder, run, phase)


@contextlib.contextmanager
def reserve(path: str | Path) -> Iterator[Reserved]:
    """The output at `path` for this process alone, from before the network is loaded until the images are written.

    Within the block SIGTERM ends what is done as Ctrl-C does, see `Interruptible`. A block that writes nothing leaves
    nothing behind. Raises `ConfigError` for a path that cannot be written, and while another process has it.
    """
    path = Path(path)
    _check_free(path)
    with Interruptible() as interruptible, _locked(path, interruptible) as folder:
        yield Reserved(path, folder, interruptible)


def part_folder(path: Path) -> Path:
    """Where the parts of an unfinished output lie."""
    return path.with_name(f".{path.name}.part")


def _check_free(path: Path) -> None:
    """Raise `ConfigError` if `path` cannot be written whatever the run, but for another process; touches nothing."""
    folder = part_folder(path)
    if not (folder / _RUN).is_file():
        check_new_output(path)
        if folder.exists() and set(folder.iterdir()) - {folder / _LOCK, *leftovers(folder / _RUN)}:
            raise ConfigError(f"{folder} is in the way and not of an interrupted run; move it, or name another --out")


@contextlib.contextmanager
def _locked(path: Path, interruptible: Interruptible) -> Iterator[Path]:
    """The folder of parts, made if it is not there, as this process's alone. It goes if it ends empty, and with it the
    folders above it that were made for it.

    Raises `ConfigError` if another process has it.
    """
    folder = part_folder(path)
    lock = folder / _LOCK
    with contextlib.ExitStack() as stack:
        with interruptible.held():
            made = [parent for parent in folder.parents if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, [folder, *made])
            file = stack.enter_context(lock.open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except BlockingIOError:
                ours = False
            except OSError as error:
                lock.unlink()
                raise ConfigError(
                    f"{folder} cannot be locked: {error.strerror}; name an --out on another disk"
                ) from error
            if not ours:  # or it was, of a process that removed the file as it ended, before this one came to lock it
                raise ConfigError(f"another process is writing {path}; let it end, or name another --out")
            stack.callback(lock.unlink, missing_ok=True)
        try:
            yield folder
        finally:
            with interruptible.held():
                stack.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # there are parts in it, or the next process has begun
        for folder in folders:
            folder.rmdir()


def _phase(path: Path, folder: Path) -> str:
    """How far a run has come, by what `run.json` says and whether the output of a zip or npz has got its name."""
    phase = _read_run(folder)[_PHASE] if (folder / _RUN).is_file() else _WRITING
    if phase == _JOINING and _suffix(path):
        phase = _WRITING if _whole(path, folder).exists() else _JOINED
    if phase == _JOINED and not path.exists():
        raise ConfigError(f"{path} was complete and has gone since; delete {folder} to make it again")
    return phase


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        return {_PHASE: _WRITING, **json.loads((folder / _RUN).read_text())}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder / _RUN} is damaged ({error}); delete the folder to start again") from error


def _write_run(folder: Path, run: Mapping[str, Any], phase: str) -> None:
    with atomic_write(folder / _RUN) as temporary:
        temporary.write_text(_text({**run, _PHASE: phase}))


def _text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=2, sort_keys=True)


def _suffix(path: Path) -> str:
    """That of a zip or npz, and of its parts; empty for a folder."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".zip", ".npz") else ""


def _closed_parts(folder: Path, suffix: str) -> list[Path]:
    """In order."""
    return sorted(path for path in folder.iterdir() if path.suffix == suffix and _PART.fullmatch(path.stem))


def _count(part: Path) -> int:
    return int(_PART.fullmatch(part.stem)[2])


def _check_numbers(parts: Sequence[Path], images: int) -> None:
    """Raise `ConfigError` unless these are parts one after the other, from the first on, of at most `images` images."""
    numbers = [int(_PART.fullmatch(part.stem)[1]) for part in parts]
    if numbers != list(range(len(parts))) or sum(map(_count, parts)) > images:
        names = ", ".join(part.name for part in parts)
        raise ConfigError(f"{parts[0].parent} is damaged, its parts are {names}; delete the folder to start again")


def _check_images(parts: Sequence[Path], seeds: Sequence[int], subdirs: bool) -> None:
    """Raise `ConfigError` unless every part holds the images of its seeds, by name, or in an npz by number."""
    start = 0
    for part in parts:
        own = seeds[start : start + _count(part)]
        start += len(own)
        if part.suffix == ".npz":
            whole = _npz_length(part) == len(own)
        else:
            whole = _image_names(part) == sorted(image_name(seed, subdirs) for seed in own)
        if not whole:
            raise ConfigError(
                f"{part} does not hold the {len(own)} images of its seeds; delete {part.parent} to start again"
            )


def _image_names(part: Path) -> list[str]:
    if part.is_dir():
        names = [path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()]
    else:
        with zipfile.ZipFile(part) as archive:
            names = archive.namelist()
    return sorted(name for name in names if name != _LABELS)


def _npz_length(part: Path) -> int:
    """Of its first array, by its header: the images are not read."""
    with zipfile.ZipFile(part) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0][0]


def _whole(path: Path, folder: Path) -> Path:
    """What becomes the output once all parts are closed."""
    parts = _closed_parts(folder, _suffix(path))
    return parts[0] if len(parts) == 1 else folder / f"{_WHOLE}{_suffix(path)}"


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _finish(path: Path, folder: Path, run: Mapping[str, Any], phase: str) -> None:
    """The steps of the module's description, from where `phase` says that an earlier process came to."""
    parts = _closed_parts(folder, _suffix(path))
    if phase == _WRITING:
        if _suffix(path) and not _whole(path, folder).exists():
            (_join_zips if _suffix(path) == ".zip" else _join_arrays)(parts, _whole(path, folder))
        check_new_output(path)  # whoever has filled it meanwhile keeps it
        _write_run(folder, run, _JOINING)
    if phase != _JOINED:
        if _suffix(path):
            _whole(path, folder).replace(path)
            sync_folder(path.parent)
        else:
            _join_folders(parts, path)
        _write_run(folder, run, _JOINED)
    for leftover in set(folder.iterdir()) - {folder / _RUN, folder / _LOCK}:
        _remove(leftover)
    (folder / _RUN).unlink()


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
    remove_leftovers(path / _LABELS)
    if labels:
        with atomic_write(path / _LABELS) as temporary:
            temporary.write_text(json.dumps({"labels": labels}))
