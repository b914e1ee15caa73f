"""Writes images to PNG files named by seed, encoded on threads, and checks which outputs can be written.

The encoder releases the interpreter lock, so the sampler need not wait for it. Equal images give equal bytes.
"""

import io
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gdd_fast.errors import ConfigError

_NOT_A_FOLDER = {".bmp", ".gif", ".gz", ".jpeg", ".jpg", ".npy", ".png", ".pt", ".tar", ".tgz", ".webp"}
_PENDING_PER_WORKER = 64  # images that may wait to be written: bounds memory, keeps every thread busy
_END_OF_PNG = b"IEND\xaeB`\x82"


def check_new_output(path: str | Path) -> None:
    """Raise `ConfigError` for an output that cannot be a new `.zip`, `.npz` or folder; touches nothing."""
    path = Path(path)
    if path.suffix.lower() in (".zip", ".npz"):
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder; name a file, or leave the suffix out")
    elif path.suffix.lower() in _NOT_A_FOLDER:
        raise ConfigError(f"--out {path}: images are written as a .zip, an .npz or a folder, not {path.suffix}")
    elif path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path} is a file; name a folder, a .zip or an .npz")
    elif path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"--out {path} is not empty; name a new folder, so that no old image stays among the new")
    if path.is_file():
        raise ConfigError(f"--out {path} exists and is not overwritten; name another file or move it away")


def image_name(seed: int, subdirs: bool) -> str:
    """The name of a seed's image within a zip or folder; with `subdirs`, every thousand seeds have a folder."""
    return f"{seed - seed % 1000:06d}/{seed:06d}.png" if subdirs else f"{seed:06d}.png"


def encode_png(image: np.ndarray) -> bytes:
    """uint8 `(H, W, C)`, C 1 or 3, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def is_whole_png(path: Path) -> bool:
    """Whether there is a PNG that was written to its end, as it may not be after a crash of the machine."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END_OF_PNG), os.SEEK_END)
            return file.read() == _END_OF_PNG
    except OSError:  # missing, or shorter than that
        return False


class PngFolder:
    """Writes images to an existing `folder`: encoded on `workers` threads, written in order by the caller's thread."""

    def __init__(self, folder: Path, subdirs: bool, workers: int | None = None) -> None:
        self._folder, self._subdirs = folder, subdirs
        workers = workers or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="png")
        self._limit = workers * _PENDING_PER_WORKER
        self._pending: deque[tuple[str, Future[bytes]]] = deque()

    def put(self, seeds: Sequence[int], images: torch.Tensor) -> None:
        """Take uint8 images `(N, H, W, C)`, C 1 or 3, of `seeds`. Raises `ValueError` for others."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"expected uint8 images (N, H, W, 1 or 3), got {images.dtype} {tuple(images.shape)}")
        array = images.cpu().numpy()
        for seed, image in zip(seeds, array, strict=True):
            self._pending.append((image_name(seed, self._subdirs), self._pool.submit(encode_png, image)))
        self._write(at_most=self._limit)

    def close(self) -> None:
        """Write all images that were put, and end the threads."""
        try:
            self._write(at_most=0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _write(self, at_most: int) -> None:
        """Write what is encoded, waiting until at most `at_most` images are left."""
        while self._pending and (len(self._pending) > at_most or self._pending[0][1].done()):
            name, future = self._pending.popleft()
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            # never half an image under its final name; not flushed one by one, see is_whole_png
            temporary = path.with_name(f".{path.name}.part")
            temporary.write_bytes(future.result())
            temporary.replace(path)
