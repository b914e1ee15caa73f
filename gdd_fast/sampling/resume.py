"""Writes images so that an interrupted run can continue where it stopped.

Until a run is complete, its images are beside the output in a folder `.<name>.part`: `images`, with the PNGs under
their final names, `labels.jsonl`, the classes of labelled images, and `run.json`, which identifies the run. The files
show how far a run has come: its seeds in order, up to the first without a complete PNG. One process at a time may
write: it holds a lock on the file `lock`, which is released when the process ends.

At the end the output, a zip, an npz, or `images` itself, is made within that folder and appears by one rename. A
process may be killed between any two file operations, and the next one can continue.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_fast.data.decode import decode
from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write, leftovers, remove_leftovers, sync_folder
from gdd_fast.sampling.writers import PngFolder, check_new_output, image_name, is_whole_png
from gdd_fast.signals import Interruptible

_RUN, _LOCK, _LABELS, _IMAGES = "run.json", "lock", "labels.jsonl", "images"


class ResumableWriter:
    """Takes the images of the seeds after the first `done`, which an earlier process wrote."""

    def __init__(self, output: "Reserved", seeds: Sequence[int], subdirs: bool, workers: int | None) -> None:
        self._held, self._seeds = output.interruptible.held, list(seeds)
        self._names = [image_name(seed, subdirs) for seed in seeds]
        self._path, self._folder, self._images = output.path, output.folder, output.folder / _IMAGES
        self._images.mkdir(exist_ok=True)
        for temporary in self._images.rglob(".*.part"):  # left by a process that was killed
            temporary.unlink()
        remove_leftovers(self._images / "dataset.json")
        self._labels = self._read_labels()
        self.done = self._put = self._count_done()
        self._png = PngFolder(self._images, subdirs, workers)

    def put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        """Take uint8 images `(N, H, W, C)`, C 1 or 3, of the next `seeds`, and their class indices int64 `(N,)` if any.

        SIGINT and SIGTERM wait until it is done.
        """
        if list(seeds) != self._seeds[self._put : self._put + len(seeds)]:
            raise ValueError(
                f"got images of seeds {list(seeds)[:3]}..., but those of {self._seeds[self._put :][:3]}... are next"
            )
        with self._held():
            if classes is not None:  # first: an image counts only with its label
                names = self._names[self._put : self._put + len(seeds)]
                labels = dict(zip(names, classes.tolist(), strict=True))
                with (self._folder / _LABELS).open("a") as file:
                    file.writelines(json.dumps(label) + "\n" for label in labels.items())
                self._labels |= labels
            self._png.put(seeds, images)
            self._put += len(seeds)

    def flush(self) -> None:
        """Write all images that were put; no more can be put afterwards. SIGINT and SIGTERM wait until it is done."""
        with self._held():
            self._png.close()

    def finish(self) -> None:
        """If all images are there, make the output from them and remove the parts.

        Raises `ConfigError`, and nothing is lost, if something else has taken the output's name meanwhile.
        """
        if self._count_done() < len(self._seeds):
            return
        labels = [[name, self._labels[name]] for name in self._names] if self._labels else []
        suffix = self._path.suffix.lower()
        whole = self._folder / f"whole{suffix}" if suffix in (".zip", ".npz") else self._images
        with self._held():
            if suffix == ".npz":
                self._write_npz(whole, [label for _, label in labels])
            elif suffix == ".zip":
                self._write_zip(whole, labels)
            elif labels:
                with atomic_write(self._images / "dataset.json") as temporary:
                    temporary.write_text(json.dumps({"labels": labels}))
            check_new_output(self._path)  # something may have been written there meanwhile: it stays
            whole.replace(self._path)
            sync_folder(self._path.parent)
            for left in set(self._folder.iterdir()) - {self._folder / _LOCK}:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _write_zip(self, path: Path, labels: list[list[Any]]) -> None:
        # A ZipInfo made this way has no current time: the same images make the same file.
        with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in self._names:
                archive.writestr(zipfile.ZipInfo(name), (self._images / name).read_bytes())
            if labels:
                archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels}))

    def _write_npz(self, path: Path, classes: list[int]) -> None:
        """`arr_0` uint8 `(N, H, W, C)` and, for labelled images, `arr_1` int64 `(N,)`, as ADM's evaluation reads it."""
        paths = [self._images / name for name in self._names]
        images = np.stack([np.asarray(decode(path.read_bytes(), str(path))) for path in paths])
        arrays = [images if images.ndim == 4 else images[..., None], *([np.array(classes)] if classes else [])]
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, *arrays)

    def _count_done(self) -> int:
        for number, name in enumerate(self._names):
            if (self._labels and name not in self._labels) or not is_whole_png(self._images / name):
                return number
        return len(self._names)

    def _read_labels(self) -> dict[str, int]:
        path = self._folder / _LABELS
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last one may have been cut off
        with contextlib.suppress(ValueError):
            return dict(map(json.loads, lines))
        raise ConfigError(f"{path} is damaged; delete {self._folder} to start again")


@dataclass(frozen=True)
class Reserved:
    """An output that only this process may write, and the folder of its parts. See `reserve`."""

    path: Path
    folder: Path
    interruptible: Interruptible

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise `ConfigError` where `writer` would for such a run, before anything is made; touches nothing."""
        _check_free(self.path)
        if not (self.folder / _RUN).is_file():
            return
        try:
            before, now = json.loads((self.folder / _RUN).read_text()), json.loads(_text(run))
            changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.folder / _RUN} is damaged ({error}); delete the folder to start again") from error
        if changed:
            raise ConfigError(
                f"{self.folder} holds an unfinished run with another {', '.join(changed)}; delete it to start "
                "again, or name another --out"
            )

    @contextlib.contextmanager
    def writer(
        self, seeds: Sequence[int], run: Mapping[str, Any], *, subdirs: bool = False, workers: int | None = None
    ) -> Iterator[ResumableWriter]:
        """A writer for the images of `seeds` to `path`: `*.zip`, `*.npz`, or else a folder, new or empty.

        Inside a zip, and with `subdirs` inside a folder, every thousand seeds have a folder of their own
        (`012000/012345.png`). Labelled images come with EDM's `dataset.json`.

        Args:
            run: what the images depend on, as JSON types. A run with other values is not continued.

        The block has to put the images of `seeds[writer.done:]`. If it raises or ends without all of them, nothing
        appears at the output's path, and what was put is kept for the next call with the same arguments. Raises
        `ConfigError`, before anything is written, for a path that cannot be written and for images of another run; and
        at the end, with the images kept, if something was written at the path meanwhile.
        """
        self.check(run)
        with atomic_write(self.folder / _RUN) as temporary:
            temporary.write_text(_text(run))
        writer = ResumableWriter(self, seeds, subdirs or self.path.suffix.lower() == ".zip", workers)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(OSError):  # such as the disk's: the first error is the one that counts
                writer.flush()
            raise
        writer.flush()
        writer.finish()


@contextlib.contextmanager
def reserve(path: str | Path) -> Iterator[Reserved]:
    """Reserve the output at `path` for this process, from before the network is loaded until the images are written.

    Within the block SIGTERM ends the work as Ctrl-C does, see `Interruptible`. A block that writes nothing leaves
    nothing behind. Raises `ConfigError` for a path that cannot be written, or while another process has it.
    """
    path = Path(path)
    _check_free(path)
    with Interruptible() as interruptible, _locked(path, interruptible) as folder:
        yield Reserved(path, folder, interruptible)


def part_folder(path: Path) -> Path:
    """The folder for the parts of an unfinished output."""
    return path.with_name(f".{path.name}.part")


def _check_free(path: Path) -> None:
    """Raise `ConfigError` if no run could write `path`, other processes aside; touches nothing."""
    check_new_output(path)
    folder = part_folder(path)
    if not folder.exists() or (folder / _RUN).is_file():
        return
    if set(folder.iterdir()) - {folder / _LOCK, *leftovers(folder / _RUN)}:
        raise ConfigError(f"{folder} is in the way and not from an interrupted run; move it, or name another --out")


@contextlib.contextmanager
def _locked(path: Path, interruptible: Interruptible) -> Iterator[Path]:
    """The folder of parts, created if missing, locked for this process. If it ends empty it is removed, together with
    the parent folders that were created for it.

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
            if not ours:  # or an ending process removed the file before this one locked it
                raise ConfigError(f"another process is writing {path}; let it end, or name another --out")
            stack.callback(lock.unlink, missing_ok=True)
        try:
            yield folder
        finally:
            with interruptible.held():
                stack.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # it holds images, or the next process has begun
        for folder in folders:
            folder.rmdir()


def _text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=2, sort_keys=True)
