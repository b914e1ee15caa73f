"""Digests of a run's inputs: a file that is moved or packed again still counts as the same.

A run resumes only with the teacher and images it started with, and a report is valid only for those it measured.
`gdd_fast.models.files.load.network_digest` is the counterpart for networks.
"""

import hashlib
import json

import numpy as np

from gdd_fast.data import ImageDataset

SAMPLE = 256
"""How many images of a data set are hashed."""


def dataset_digest(dataset: ImageDataset) -> str:
    """SHA-256 of an image set's size, image shape, labels (if opened with them) and the pixels of some images.

    Those are `SAMPLE` images at equal distances, first and last included, so that a set of millions takes only a
    moment. Sets that differ only in other images have the same digest.

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
