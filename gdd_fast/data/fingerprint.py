"""Digests of what a run is made from: a file may move or be packed again and still counts as the same.

A run resumes only with the teacher and the images that it began with, and a report holds only for those it measured.
`gdd_fast.models.files.load.network_digest` is the same for a network.
"""

import hashlib
import json

import numpy as np

from gdd_fast.data import ImageDataset

SAMPLE = 256
"""How many images of a data set are hashed."""


def dataset_digest(dataset: ImageDataset) -> str:
    """SHA-256 of an image set's size, form and labels, if it is opened with them, and of the pixels of some images.

    Those are `SAMPLE` at equal distances, the first and the last among them: a set of millions takes a moment. Sets
    that differ in other images alone are taken for the same.

    Raises:
        DataError: one of the images is corrupt.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), *dataset.shape, dataset.label_dim]).encode())
    if dataset.labels is not None:
        digest.update(dataset.labels.astype("<i8"))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).round().astype(int))
    for images in dataset.chunks(chosen):
        digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()
