"""Reads tables of class embeddings: StyleGAN-XL's and GDD's pickle, a NumPy array, or a safetensors file."""

from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.data.npz import read_npy
from gdd_fast.errors import DataError, WeightsError
from gdd_fast.models.backbone_weights import read_tensors
from gdd_fast.models.files.pickle_reader import load_layers

MAX_BYTES = 2**30


def read_class_table(path: Path) -> Tensor:
    """The table in `path`, float32 (classes, width); nothing in the file is executed.

    A .pkl is a dict with a `torch.nn.Embedding` in it, like the public code's in_embeddings/*.pkl; a .npy or
    .safetensors holds one matrix. Raises a `WeightsError` or `UnsafePickleError` that names the file.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file; --class-embedding needs a table (classes, width)")
    matrices = [t for t in _tensors(path) if t.ndim == 2 and t.is_floating_point()]
    if len(matrices) != 1:
        raise WeightsError(f"{path} holds {len(matrices)} floating-point matrices; a class table is a single one")
    table = matrices[0].to(torch.float32)
    if not table.isfinite().all():
        raise WeightsError(f"{path} has NaN or infinite values; get it again")
    return table.contiguous()


def _tensors(path: Path) -> list[Tensor]:
    if path.suffix == ".pkl":
        return [t for layer in load_layers(path, max_bytes=MAX_BYTES).values() for t in layer.values()]
    if path.suffix == ".npy":
        try:
            array = read_npy(path)
        except DataError as error:
            raise WeightsError(str(error)) from None
        return [torch.from_numpy(array)] if array.dtype.kind == "f" else []
    try:
        return list(read_tensors(path).values())
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
