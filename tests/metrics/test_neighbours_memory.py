"""Distances between 50,000 and 50,000 images in less than 2 GB: counted on tensors that have shapes and no values."""

import contextlib

import pytest
import torch
from peak_memory import PeakMemory
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gdd_fast.metrics.neighbours import density_coverage, nearest, precision_recall


@pytest.mark.parametrize("metric", [precision_recall, density_coverage, nearest])
def test_tiles_need_little_beside_the_features(metric):
    with FakeTensorMode():
        generated, real = torch.empty(50_000, 2048), torch.empty(50_000, 2048)
        features = generated.nbytes + real.nbytes
        # The value itself, at the end of the work, is not to be had.
        with PeakMemory() as memory, contextlib.suppress(DataDependentOutputException):
            metric(generated, real)
    assert 64e6 < memory.most < 0.25e9, "at least a tile of distances"
    assert features + memory.most < 1.1e9
