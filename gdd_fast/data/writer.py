"""Writing image sets: EDM's zip of PNGs with `dataset.json`, and a compact .npz."""

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from gdd_fast.data.classes import MAX_CLASSES
from gdd_fast.data.containers import LABEL_FILE
from gdd_fast.errors import DataError
from gdd_fast.files import atomic_write

Item = tuple[np.ndarray, int | None]
"""One image, uint8 (C, H, W) with C = 1 or 3, and its class or None."""


def write_edm_zip(path: str | Path, images: Iterable[np.ndarray], labels: Sequence[int] | None = None) -> None:
    """Write images, each uint8 (C, H, W), for example one (N, C, H, W) array, as a zip of PNGs in EDM's format.

    Files are `00000/img00000000.png`, ...; `dataset.json` holds the classes, or null without `labels`. Atomic: `path`
    appears, or is replaced, only when all is written. Raises `DataError` for an empty set, for images that are not
    uint8, not gray or RGB or not all of one shape, for labels that are not class numbers, and if the numbers of labels
    and images differ.
    """
    if labels is not None and hasattr(images, "__len__") and len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} images and {len(labels)} labels")
    write_dataset(Path(path), zip(images, repeat(None) if labels is None else labels, strict=labels is not None))


def write_dataset(path: Path, items: Iterable[Item], *, new: bool = False) -> None:
    """Write items to `path`, an EDM zip or an .npz by its suffix; either all or none have a class.

    The .npz holds `images` uint8 (N, H, W) or (N, H, W, 3) and, with classes, `labels` int64 (N,); at 32x32 and below
    it is about half as large as PNGs. The same items give the same bytes. Errors as `write_edm_zip`; `new` as for
    `atomic_write`.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise DataError(f"{path}: the name of a data set must end in {' or '.join(WRITERS)}")
    with atomic_write(path, new=new) as temporary:
        WRITERS[suffix](temporary, _checked(items))


def _write_zip(path: Path, items: Iterator[Item]) -> None:
    from PIL import Image

    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index, (image, label) in enumerate(items):
            name = f"{index // 1000:05d}/img{index:08d}.png"
            encoded = io.BytesIO()
            pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
            Image.fromarray(pixels).save(encoded, "PNG")
            _add(archive, name, encoded.getvalue())
            labels.append(None if label is None else [name, int(label)])
        content = {"labels": None if labels[0] is None else labels}
        _add(archive, LABEL_FILE, json.dumps(content).encode())


def _write_npz(path: Path, items: Iterator[Item]) -> None:
    images, labels = zip(*items, strict=True)
    stacked = np.stack(images)
    arrays = {"images": stacked[:, 0] if stacked.shape[1] == 1 else stacked.transpose(0, 2, 3, 1)}
    if labels[0] is not None:
        arrays["labels"] = np.array(labels, np.int64)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            encoded = io.BytesIO()
            np.lib.format.write_array(encoded, np.ascontiguousarray(array), allow_pickle=False)
            _add(archive, f"{name}.npy", encoded.getvalue())


WRITERS = {".zip": _write_zip, ".npz": _write_npz}


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Use ZipInfo's constant date instead of the current time, so that equal input gives equal bytes."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    archive.writestr(info, content, compress_type=archive.compression, compresslevel=archive.compresslevel)


def _checked(items: Iterable[Item]) -> Iterator[Item]:
    first: Item | None = None
    for index, (image, label) in enumerate(items):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
            raise DataError(f"image {index} must be uint8 (1 or 3, H, W), not {image.dtype} {image.shape}")
        first = first or (image, label)
        if image.shape != first[0].shape:
            raise DataError(f"image {index} has shape {image.shape}, the first {first[0].shape}; all must be alike")
        if (label is None) != (first[1] is None):
            raise DataError(f"image {index} has {'no' if label is None else 'a'} label, unlike those before it")
        if label is not None and not 0 <= label < MAX_CLASSES:
            raise DataError(f"image {index} has label {label}; labels must be integers from 0 to {MAX_CLASSES - 1}")
        yield image, label
    if first is None:
        raise DataError("there is no image to write")
