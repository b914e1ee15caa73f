"""Statistics of real images in files: this library's, and those of projects to compare figures with.

| file | what is in it | whose |
|---|---|---|
| .npz | mu, sigma; here also n, features, image_shape and, on request, feats | EDM, ADM, clean-fid, pytorch-fid, ours |
| .npz | feats, of every image | clean-fid's for KID |
| .pkl | {"fid": {mu, sigma}, "fd_dinov2": {mu, sigma}} | EDM2 |
| .pt, .pth | {mu, sigma}, or the features of every image | torch-fidelity's cache |

Nothing in a file is executed, and moments that no set of images can have are refused: a distance to them could be
anything, even 0.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gdd_fast.data.npz import read_arrays
from gdd_fast.errors import DataError, UnsafePickleError
from gdd_fast.files import atomic_write
from gdd_fast.metrics.frechet import Statistics
from gdd_fast.metrics.population import Needs, Population
from gdd_fast.models.files.numpy_pickle import load_arrays

_FIELDS = ("mu", "sigma", "n", "features", "image_shape", "feats")
_EDM2 = {"fid": "inception", "fd_dinov2": "dinov2-224"}


def load_references(path: str | Path) -> list[Population]:
    """The populations in a file of any of the formats above; most hold one.

    `features` is "" if the file does not name its network; `rows` are set if the file has them. Raises `DataError` for
    any other file, for moments that are not finite, and for a sigma that is not a covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no statistics at {path}")
    match path.suffix.lower():
        case ".pkl":
            return _from_pickle(path)
        case ".pt" | ".pth":
            return [_population(_from_torch(path), path)]
        case _:
            return [_population(_from_npz(path), path)]


def choose_reference(
    files: Sequence[tuple[Path, Population]], name: str, dim: int, image_shape: tuple[int, ...], needs: Needs
) -> Population | None:
    """The reference for the features `name`, of `dim` dimensions, that has what is needed; None if there is none.

    One that does not name its network is taken only if no other fits and its dimensions do. Raises `DataError` for a
    reference of this name with another image size or other dimensions.
    """
    for path, population in sorted(files, key=lambda file: file[1].features == ""):
        if population.features not in ("", name):
            continue
        if population.features == name and population.image_shape not in (None, tuple(image_shape)):
            theirs, ours = population.image_shape, image_shape
            raise DataError(
                f"{path} is of images {theirs[0]} x {theirs[1]}^2, the generated ones are {ours[0]} x {ours[1]}^2; "
                "compare images of the same size and channels (python -m gdd_fast.prepare resizes)"
            )
        if population.features == name and population.statistics.dim != dim:
            raise DataError(f"{path} holds {population.statistics.dim} features of {name}, but here it has {dim}")
        if population.statistics.dim == dim and (population.rows is not None or not needs.rows):
            return population
    return None


def save_reference(population: Population, path: str | Path, *, rows: bool = False, new: bool = False) -> None:
    """Write an npz that EDM's and clean-fid's code can read too, with the features themselves if `rows`. `new`: as for
    `atomic_write`.
    """
    statistics = population.statistics
    known = {"n": statistics.count, "image_shape": statistics.image_shape}
    extra = {name: value for name, value in known.items() if value is not None}
    if rows:
        extra["feats"] = population.rows.cpu().numpy()
    with atomic_write(path, new=new) as temporary, temporary.open("wb") as file:
        mu, sigma = statistics.mean.cpu().numpy(), statistics.covariance.cpu().numpy()
        np.savez(file, mu=mu, sigma=sigma, features=statistics.features, **extra)


def _from_npz(path: Path) -> dict[str, np.ndarray]:
    return read_arrays(path, _FIELDS)


def _from_pickle(path: Path) -> list[Population]:
    try:
        arrays = load_arrays(path)
    except UnsafePickleError as error:
        raise DataError(f"{path} is not a pickle of statistics: {error}") from None
    sets: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        key, _, field = name.rpartition(".")
        if field in ("mu", "sigma"):
            sets.setdefault(key, {"features": np.array(_EDM2.get(key, ""))})[field] = array
    found = [_population(fields, path) for fields in sets.values()]
    if not found:
        raise DataError(f"{path} holds no statistics: it needs arrays named mu and sigma")
    return found


def _from_torch(path: Path) -> dict[str, np.ndarray]:
    plain = [
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
        np._core.multiarray._reconstruct,
    ]
    try:
        with torch.serialization.safe_globals(plain):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a file of statistics: {str(error).splitlines()[0]}") from None
    if isinstance(content, torch.Tensor):
        return {"feats": content.float().numpy()}
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no statistics: it needs arrays named mu and sigma")
    return {name: np.asarray(content[name]) for name in _FIELDS if name in content}


def _population(arrays: dict[str, np.ndarray], path: Path) -> Population:
    if not {"mu", "sigma"} <= arrays.keys():
        if arrays.keys() != {"feats"}:
            raise DataError(f"{path} holds no statistics: it needs arrays named mu and sigma, or feats")
        return _of_features(arrays["feats"], path)
    shape = arrays.get("image_shape", np.zeros(3, np.int64))
    count = arrays.get("n", np.array(2))
    if (shape.shape, count.shape, shape.dtype.kind, count.dtype.kind) != ((3,), (), "i", "i") or count < 2:
        raise DataError(f"{path}: n or image_shape are not a number of images, at least 2, and (C, H, W)")
    name = str(arrays.get("features", ""))
    image_shape = tuple(shape.tolist()) if "image_shape" in arrays else None
    try:
        statistics = Statistics.of_moments(
            arrays["mu"], arrays["sigma"], name, int(count) if "n" in arrays else None, image_shape
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    rows = arrays.get("feats")
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != statistics.dim or rows.dtype.kind != "f"):
        raise DataError(f"{path}: feats {rows.dtype} {rows.shape} are not features of {statistics.dim} dimensions")
    return Population(
        name,
        image_shape,
        statistics,
        None if rows is None else torch.from_numpy(rows.astype(np.float32)),
        statistics.count or 0,
    )


def _of_features(feats: np.ndarray, path: Path) -> Population:
    """The population of features (N, F) alone, which do not name their network."""
    if feats.ndim != 2 or feats.dtype.kind != "f" or len(feats) < 2:
        raise DataError(f"{path}: feats {feats.dtype} {feats.shape} are not features (N, F) of at least 2 images")
    rows = torch.from_numpy(feats.astype(np.float32))
    population = Population("", None, Statistics(rows.shape[1]), rows[:0])
    try:
        for part in rows.split(4096):
            population.update(part)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    population.finish()
    return population
