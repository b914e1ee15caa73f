"""Images to disk, named by seed: an EDM-style zip, a folder, or an npz as ADM's evaluation reads it.

PNG encoding runs on threads (the encoder releases the interpreter lock), so that the sampler need not wait for it.
A zip or npz takes its name only once it is whole. Equal images give equal bytes.
"""

import contextlib
import io
import json
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write

_NOT_A_FOLDER = {".bmp", ".gif", ".gz", ".jpeg", ".jpg", ".npy", ".png", ".pt", ".tar", ".tgz", ".webp"}
_PENDING_PER_WORKER = 64  # encoded images that may wait to be written: bounds memory, keeps every thread busy


class ImageWriter(Protocol):
    """Where generated images go."""

    def put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        """Take uint8 images `(N, H, W, C)`, C 1 or 3, of `seeds`, and their class indices int64 `(N,)` if any."""


@contextlib.contextmanager
def open_writer(path: str | Path, *, subdirs: bool = False, workers: int | None = None) -> Iterator[ImageWriter]:
    """A writer for `path`: `*.zip`, `*.npz`, or else a folder, which has to be new or empty.

    Inside a zip, and with `subdirs` inside a folder, every thousand seeds have a folder of their own
    (`012000/012345.png`). Labelled images come with EDM's `dataset.json`. Files are complete when the block ends; if
    it raises, no zip or npz is left, and of a folder the images so far.
    Raises `ConfigError`, before anything is created, for a path that cannot be written as asked.
    """
    path = Path(path)
    check_output(path)
    workers = workers or min(8, os.cpu_count() or 1)
    if path.suffix.lower() == ".npz":
        npz = _NpzWriter()
        yield npz
        npz.save(path)
    elif path.suffix.lower() == ".zip":
        with (
            atomic_write(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            _PngWriter(_ZipSink(archive), True, workers) as writer,
        ):
            yield writer
    else:
        path.mkdir(parents=True, exist_ok=True)
        with _PngWriter(_FolderSink(path), subdirs, workers) as writer:
            yield writer


def check_output(path: str | Path) -> None:
    """Raise `ConfigError` if `open_writer` would refuse `path`; touches nothing."""
    path = Path(path)
    if path.suffix.lower() in (".zip", ".npz"):
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder; name a file, or leave the suffix out")
    elif path.suffix.lower() in _NOT_A_FOLDER:
        raise ConfigError(f"--out {path}: images are written as a .zip, an .npz or a folder, not {path.suffix}")
    elif path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path} is a file; name a folder, a .zip or an .npz")
    elif path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"--out {path} is not empty; name a new folder, so that no older image stays among the new")


def check_new_output(path: str | Path) -> None:
    """`check_output`, and raise `ConfigError` for a file that is there already; touches nothing."""
    check_output(path)
    if Path(path).is_file():
        raise ConfigError(f"--out {path} exists and is not written over; name another file or move it away")


def image_name(seed: int, subdirs: bool) -> str:
    """Of a seed's image within a zip or folder."""
    return f"{seed - seed % 1000:06d}/{seed:06d}.png" if subdirs else f"{seed:06d}.png"


def encode_png(image: np.ndarray) -> bytes:
    """uint8 `(H, W, C)`, C 1 or 3, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


class _Sink(Protocol):
    def write(self, name: str, data: bytes) -> None: ...


class _ZipSink:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def write(self, name: str, data: bytes) -> None:
        # A ZipInfo made this way carries no time of day: the same images make the same file.
        self.archive.writestr(zipfile.ZipInfo(name), data)


class _FolderSink:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        # Renamed into place but not flushed one by one: a crash of the machine may cost images, never half of one file
        # under its final name while the program runs.
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(data)
        temporary.replace(path)


class _PngWriter:
    """Encodes on `workers` threads; hands the results to the sink in order, on the caller's thread."""

    def __init__(self, sink: _Sink, subdirs: bool, workers: int) -> None:
        self.sink, self.subdirs = sink, subdirs
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="png")
        self.limit = workers * _PENDING_PER_WORKER
        self.pending: deque[tuple[str, Future[bytes]]] = deque()
        self.labels: list[tuple[str, int]] = []

    def __enter__(self) -> "_PngWriter":
        return self

    def put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        array = _as_array(seeds, images, classes)
        for i, seed in enumerate(seeds):
            name = image_name(seed, self.subdirs)
            self.pending.append((name, self.pool.submit(encode_png, array[i])))
            if classes is not None:
                self.labels.append((name, int(classes[i])))
        self._write(at_most=self.limit)

    def _write(self, at_most: int) -> None:
        """Write what is encoded, and wait until at most `at_most` images are left."""
        while self.pending and (len(self.pending) > at_most or self.pending[0][1].done()):
            name, future = self.pending.popleft()
            self.sink.write(name, future.result())

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._write(at_most=0)
                if self.labels:
                    self.sink.write("dataset.json", json.dumps({"labels": self.labels}).encode())
        finally:
            self.pool.shutdown(cancel_futures=True)


class _NpzWriter:
    """`arr_0` uint8 `(N, H, W, C)` and, for labelled images, `arr_1` int64 `(N,)`. Held in memory until saved."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.classes: list[np.ndarray] = []

    def put(self, seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        # copies: images come in pinned memory, which cannot be swapped out and is meant for the next batch
        self.images.append(_as_array(seeds, images, classes).copy())
        if classes is not None:
            self.classes.append(classes.cpu().numpy().copy())

    def save(self, path: Path) -> None:
        if not self.images:
            raise ConfigError(f"no images to write to {path}")
        arrays = [np.concatenate(part) for part in (self.images, self.classes) if part]
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, *arrays)


def _as_array(seeds: Sequence[int], images: torch.Tensor, classes: torch.Tensor | None) -> np.ndarray:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"expected uint8 images (N, H, W, 1 or 3), got {images.dtype} {tuple(images.shape)}")
    if len(images) != len(seeds) or (classes is not None and len(classes) != len(seeds)):
        raise ValueError("seeds, images and classes differ in number")
    return images.cpu().numpy()
