"""Encoded image files in a folder or a zip archive, behind one interface."""

import contextlib
import json
import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from gdd_fast.data.classes import as_classes
from gdd_fast.data.npz import check_expansion
from gdd_fast.errors import DataError

# What Pillow decodes in its default build.
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".tif", ".tiff", ".tga", ".jp2", ".avif"}
)
LABEL_FILE = "dataset.json"


class Container(Protocol):
    """Image files by name.

    path: the folder or archive; names: sorted names of the image files, relative, with forward slashes; left_out: how
    many other files there are, by suffix; read(name): the bytes of any file in it, by any number of threads and forked
    processes at once.
    """

    path: Path
    names: list[str]
    left_out: dict[str, int]

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...


def check_there(path: Path) -> None:
    """Raise `DataError` if there is no file or folder; a pipe, which might never end, is neither."""
    if not (path.is_dir() or path.is_file()):
        raise DataError(f"{path}: {'neither a file nor a folder' if path.exists() else 'no such file or folder'}")


def open_container(path: Path) -> Container:
    """The folder or zip archive at `path`; `DataError` when it is neither, or holds no image file."""
    if path.is_dir():
        container = FolderContainer(path)
    elif zipfile.is_zipfile(path):
        container = ZipContainer(path)
    else:
        raise DataError(f"{path}: neither a folder nor a zip archive")
    if not container.names:
        raise DataError(f"{path}: holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return container


class FolderContainer:
    """The image files below a folder."""

    def __init__(self, path: Path):
        self.path = path
        folders: dict[tuple[int, int], str] = {}
        files: dict[tuple[int, int], str] = {}
        found: list[str] = []
        links: list[os.DirEntry[str]] = []
        real, linked = [os.fspath(path)], list[str]()
        while real or linked:  # links last, so that errors name them and not the originals
            root = real.pop() if real else linked.pop()
            try:
                device = _count_once(root, os.stat(root), folders)
                with os.scandir(root) as entries:
                    for entry in entries:
                        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                            (linked if entry.is_symlink() else real).append(entry.path)
                            continue
                        name = Path(os.path.relpath(entry.path, path)).as_posix()
                        found.append(name)
                        if not _is_image(name):
                            continue
                        if entry.is_symlink():
                            links.append(entry)
                        else:
                            files[device, entry.inode()] = entry.path
            except OSError as error:
                raise DataError(f"{path}: {root} cannot be read: {error.strerror}") from error
        for link in links:
            with contextlib.suppress(OSError):  # a dangling link; reading it will say so
                _count_once(link.path, link.stat(), files)
        self.names = sorted(name for name in found if _is_image(name))
        self.left_out = _left_out(found)

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        try:
            # non-blocking, as there may be a pipe among the files
            with open(os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise DataError(f"{self.path}: {name} is not a file")
                return file.read()
        except OSError as error:
            raise DataError(f"{self.path}: {name} cannot be read: {error}") from error


def _count_once(path: str, status: os.stat_result, seen: dict[tuple[int, int], str]) -> int:
    """Record a folder or file, and return its device. `DataError` for one that was seen under another name.

    A link to a folder that contains it would make the walk endless.
    """
    earlier = seen.setdefault((status.st_dev, status.st_ino), path)
    if earlier != path:
        raise DataError(f"{path} is a link to {earlier}, whose images would count twice: remove the link")
    return status.st_dev


class ZipContainer:
    """The image files of a zip archive.

    `zipfile.ZipFile` shares one file position, so it may be used neither from several threads nor after a fork. Here it
    only lists the archive, once; `read` uses `os.pread`, which has no position, on one descriptor.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                files = [info for info in archive.infolist() if not info.filename.endswith("/")]
        except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a readable zip archive: {error}") from error
        self._entries = {info.filename: _Entry.of(info) for info in files}
        if len(self._entries) < len(files):
            twice = next(name for name, count in Counter(info.filename for info in files).items() if count > 1)
            raise DataError(f"{path}: holds {twice} more than once; pack the archive again")
        self.names = sorted(name for name in self._entries if _is_image(name))
        self.left_out = _left_out(self._entries)
        self._file = path.open("rb")

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._file = self.path.open("rb")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> bytes:
        try:
            return self._entries[name].read(self._file.fileno())
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise DataError(f"{self.path}: {name} cannot be read: {error}") from error


class _Entry:
    """The location of one file in the archive: only a few integers, since an archive may hold millions."""

    __slots__ = ("compressed", "crc", "method", "offset", "size")

    _HEADER = struct.Struct("<4s22xHH")

    @classmethod
    def of(cls, info: zipfile.ZipInfo) -> "_Entry":
        entry = cls()
        entry.offset, entry.compressed, entry.size = info.header_offset, info.compress_size, info.file_size
        entry.crc = info.CRC
        entry.method = None if info.flag_bits & 1 else info.compress_type
        return entry

    def read(self, descriptor: int) -> bytes:
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("it is encrypted, or compressed by a method other than deflate")
        header = os.pread(descriptor, self._HEADER.size, self.offset)
        magic, name_length, extra_length = self._HEADER.unpack(header)
        if magic != b"PK\3\4":
            raise ValueError("its entry in the archive is damaged")
        start = self.offset + self._HEADER.size + name_length + extra_length
        if start + self.compressed > os.fstat(descriptor).st_size:
            raise ValueError("it goes beyond the end of the archive")
        check_expansion(self.size, self.compressed)
        content = os.pread(descriptor, self.compressed, start)
        if self.method == zipfile.ZIP_DEFLATED:
            # One byte more than stated is enough to detect an entry that expands beyond its stated size.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.size + 1)
        if len(content) != self.size or zlib.crc32(content) != self.crc:
            raise ValueError("its bytes do not match the archive's checksum")
        return content


def read_labels(container: Container) -> np.ndarray | None:
    """The classes in `dataset.json`, int64 in the order of `container.names`; None when there are none.

    Raises `DataError` when the file is not in EDM's format, a label is not a class number, or one is missing.
    """
    if LABEL_FILE not in container:
        return None
    where = f"{container.path}: {LABEL_FILE}"
    content = container.read(LABEL_FILE)
    try:
        pairs = json.loads(content)["labels"]
        labels = None if pairs is None else dict(pairs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{where} is not of the form {{"labels": [["name.png", 0], ...]}}') from error
    if labels is None:
        return None
    missing = [name for name in container.names if name not in labels]
    if missing:
        raise DataError(f"{where} has no label for {missing[0]} ({len(missing)} missing in all)")
    names = container.names
    return as_classes([labels[name] for name in names], lambda index: f"{where}: the label of {names[index]}")


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_hidden(name: str) -> bool:
    """Hidden files and folders, and the shadow copies that macOS puts into archives."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _left_out(names: Iterable[str]) -> dict[str, int]:
    others = (name for name in names if not (_is_hidden(name) or _is_image(name) or name == LABEL_FILE))
    return dict(Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in others))
