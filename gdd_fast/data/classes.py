"""Which class numbers are allowed, whatever their source."""

import reprlib
from collections.abc import Callable, Sequence

import numpy as np

from gdd_fast.errors import DataError

MAX_CLASSES = 100_000
"""The most classes per data set. ImageNet-21k has 21,841; one-hot labels of many more would fill the memory."""


def as_classes(labels: Sequence[object] | np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """Labels (N,) of any type as int64 (N,).

    Raises `DataError` for the first that is not an integer from 0 to `MAX_CLASSES - 1`; `where(i)` names label i.
    """
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value < MAX_CLASSES:
            raise DataError(
                f"{where(index)} is {reprlib.repr(value)}; labels must be integers from 0 to {MAX_CLASSES - 1}: "
                "number the classes from 0"
            )
    return np.array(values, np.int64)
