"""Settings and fixtures of all tests."""

import os

import pytest
import torch
from hypothesis import settings

# triton reads this when a kernel is defined, so it is set before any test can import triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("gdd_fast", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("gdd_fast")


@pytest.fixture
def canary(tmp_path):
    """A path that whatever a file smuggles in creates when it runs; the test fails if it did."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
