"""Settings and fixtures of all tests."""

import os
import signal

import pytest
import torch
from hypothesis import settings

# triton reads this when a kernel is defined, so it is set before any test can import triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell has its background jobs ignore Ctrl-C, and Python leaves it so: tests of it need what a user has.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("gdd_fast", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("gdd_fast")


@pytest.fixture
def canary(tmp_path):
    """A path that whatever a file smuggles in creates when it runs; the test fails if it did."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the teacher and the data of tiny_run.py."""
    from tiny_run import write_inputs

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def switches():
    """Of float32 on a GPU: PyTorch's defaults, before the test and after it."""

    def reset() -> None:
        torch.backends.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True

    reset()
    yield
    reset()


@pytest.fixture
def plain(monkeypatch):
    """One thread, so that a sum is the same sum everywhere; no TensorBoard, whose import takes seconds."""
    from gdd_fast.training import loggers

    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
