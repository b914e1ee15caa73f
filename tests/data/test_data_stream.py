"""Training batches: what is seen, in which order, by which rank; a stopped stream goes on at the next image."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdd_fast.data import ArrayDataset, BatchStream, open_dataset, write_edm_zip
from gdd_fast.data.order import ShardedOrder
from gdd_fast.errors import CheckpointError, ConfigError, DataError


def numbered(count, classes=None):
    """Images 2x2 that tell their index, (index // 256, index % 256) in the top row; perhaps labels index % classes."""
    pixels = np.zeros((count, 2, 2), np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.divmod(np.arange(count), 256)
    return ArrayDataset("numbered", pixels, np.arange(count) % classes if classes else None)


def index_of(images):
    return (images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1]).tolist()


def seen(stream, batches):
    return [index for _ in range(batches) for index in index_of(next(stream)[0])]


@pytest.fixture(scope="module")
def zip_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "set.zip"
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), np.uint8)
    write_edm_zip(path, images, np.arange(50) % 4)
    return path


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    world=st.integers(1, 5),
    batch=st.integers(1, 30),
    skip=st.integers(0, 9),
)
def test_between_them_the_ranks_see_every_item_once_an_epoch(size, seed, world, batch, skip):
    sequence = np.empty(0, np.int64)
    orders = [ShardedOrder(size, seed, rank, world) for rank in range(world)]
    for step in range(3 * size // (batch * world) + 2):
        shares = [order.take(step * batch * world, batch) for order in orders]
        sequence = np.concatenate([sequence, np.stack(shares, 1).reshape(-1)])
    for epoch in range(3):
        assert sorted(sequence[epoch * size : (epoch + 1) * size]) == list(range(size))
    skip = min(skip, len(sequence) - 1)
    # Any place is reached directly, and does not depend on how many ranks there are.
    alone = ShardedOrder(size, seed).take(skip, len(sequence) - skip)
    np.testing.assert_array_equal(alone, sequence[skip:])


def test_the_order_is_this_one_for_good():
    """A checkpoint stores only a place in the order, so the order may never change; these were written down once."""
    assert ShardedOrder(10, 0).take(0, 20).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4, 7, 3, 5, 0, 1, 4, 6, 8, 9, 2]
    assert ShardedOrder(10, 2**33, rank=1, world_size=2).take(10, 10).tolist() == [6, 9, 7, 5, 4, 6, 4, 1, 2, 3]


def test_epochs_and_seeds_differ():
    first, second = (seen(BatchStream(numbered(300), 300, seed=seed), 2) for seed in (0, 1))
    assert first[:300] != first[300:] and first[:300] != second[:300]
    assert first == seen(BatchStream(numbered(300), 300, seed=0), 2)
    assert first[:300] != list(range(300))


def test_batches_have_the_promised_types():
    images, labels = next(BatchStream(numbered(10, classes=3), 4, seed=0))
    assert images.shape == (4, 1, 2, 2) and images.dtype == torch.uint8
    assert labels.shape == (4, 3) and labels.dtype == torch.float32
    assert next(BatchStream(numbered(10), 4, seed=0))[1] is None


def test_classes_by_the_thousand_cost_a_batch_and_not_their_square(monkeypatch):
    """The largest class number there may be; an identity matrix of that size would have 40 GB."""
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: made.append(shape) or zeros(*shape, **options))
    monkeypatch.setattr(torch, "eye", None)
    dataset = ArrayDataset("set", np.zeros((6, 2, 2), np.uint8), np.array([0, 1, 99_999, 5, 99_999, 7]))
    _, labels = next(BatchStream(dataset, 6, seed=0))
    assert labels.shape == (6, 100_000) and sorted(labels.argmax(1).tolist()) == [0, 1, 5, 7, 99_999, 99_999]
    assert made == [(6, 100_000)] and labels.sum() == 6


def test_labels_belong_to_their_images():
    stream = BatchStream(numbered(300, classes=7), 50, seed=5, x_flip=False)
    for _ in range(12):
        images, labels = next(stream)
        assert (labels.sum(1) == 1).all()
        assert labels.argmax(1).tolist() == [index % 7 for index in index_of(images)]


def test_x_flip_shows_each_image_both_ways_once_an_epoch():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8)
    dataset = ArrayDataset("set", pixels, np.arange(20))
    images, labels = next(BatchStream(dataset, 40, seed=0, x_flip=True))
    got = sorted(
        (label, image.numpy().tobytes()) for label, image in zip(labels.argmax(1).tolist(), images, strict=True)
    )
    plain = [(i, pixels[i].tobytes()) for i in range(20)]
    mirrored = [(i, np.ascontiguousarray(pixels[i][:, ::-1]).tobytes()) for i in range(20)]
    assert got == sorted(plain + mirrored)


def test_a_set_smaller_than_a_batch_repeats():
    assert sorted(seen(BatchStream(numbered(3), 9, seed=0), 1)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("x_flip", [False, True])
def test_streaming_gives_the_batches_of_memory_and_resumes(zip_path, workers, x_flip):
    def stream(**options):
        dataset = open_dataset(zip_path, use_labels=True)
        return BatchStream(dataset, 8, seed=3, rank=1, world_size=2, x_flip=x_flip, **options)

    memory = stream()
    expected = [next(memory) for _ in range(15)]
    assert memory.in_memory
    with stream(memory_limit=0, workers=workers) as streamed:
        assert not streamed.in_memory
        got = [next(streamed) for _ in range(7)]
        state = json.loads(json.dumps(streamed.state_dict()))
        # On the same object, workers having run ahead; then on a new one.
        next(streamed)
        streamed.load_state_dict(state)
        got += [next(streamed) for _ in range(3)]
        state = json.loads(json.dumps(streamed.state_dict()))
    with stream(memory_limit=0, workers=workers) as resumed:
        resumed.load_state_dict(state)
        got += [next(resumed) for _ in range(5)]
    for (images, labels), (expected_images, expected_labels) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_the_limit_is_in_bytes_of_pixels(zip_path):
    dataset = open_dataset(zip_path)
    size = 50 * 3 * 8 * 8
    assert BatchStream(dataset, 4, seed=0, memory_limit=size).in_memory
    assert not BatchStream(dataset, 4, seed=0, memory_limit=size - 1).in_memory


def test_a_run_resumes_with_other_ranks_and_batches_at_the_next_image():
    whole = seen(BatchStream(numbered(100), 1, seed=9), 60)
    streams = [BatchStream(numbered(100), 5, seed=9, rank=rank, world_size=3) for rank in range(3)]
    shares = [seen(stream, 2) for stream in streams]
    assert np.stack(shares, 1).reshape(-1).tolist() == whole[:30]
    state = streams[0].state_dict()
    assert all(stream.state_dict() == state for stream in streams)
    alone = BatchStream(numbered(100), 30, seed=0)
    alone.load_state_dict(state)
    assert seen(alone, 1) == whole[30:]


def test_a_state_of_another_set_is_refused():
    state = BatchStream(numbered(100), 5, seed=9).state_dict()
    with pytest.raises(CheckpointError, match=r"made with 100 images.*now there are 99"):
        BatchStream(numbered(99), 5, seed=9).load_state_dict(state)
    with pytest.raises(CheckpointError, match="x_flip=False"):
        BatchStream(numbered(100), 5, seed=9, x_flip=True).load_state_dict(state)
    for broken in ({"epoch": 1}, state | {"position": "7"}, state | {"epoch": -1}, state | {"more": 1}):
        with pytest.raises(CheckpointError, match="not the state of a data stream"):
            BatchStream(numbered(100), 5, seed=9).load_state_dict(broken)


@pytest.mark.parametrize("options", [{"memory_limit": 0}, {"memory_limit": 0, "workers": 1}, {}])
def test_a_bad_image_stops_the_stream_before_its_first_batch(tmp_path, options):
    write_edm_zip(tmp_path / "set.zip", np.zeros((10, 3, 8, 8), np.uint8))
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[content.rindex(b"IHDR", 0, content.rindex(b"IDAT"))] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"img00000009\.png"):
        BatchStream(open_dataset(tmp_path / "set.zip"), 2, seed=0, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_later_is_one_clear_error(tmp_path, workers):
    write_edm_zip(tmp_path / "set.zip", np.zeros((10, 3, 8, 8), np.uint8))
    with BatchStream(open_dataset(tmp_path / "set.zip"), 10, seed=0, memory_limit=0, workers=workers) as stream:
        with (tmp_path / "set.zip").open("r+b") as file:
            file.truncate(100)
        for _ in range(2):  # the second time too, rather than as the end of the data
            with pytest.raises(DataError) as error:
                next(stream)
    assert "cannot be read" in str(error.value) and "Traceback" not in str(error.value)


def test_workers_end_with_the_stream_and_survive_an_interrupt(zip_path):
    before = set(multiprocessing.active_children())
    stream = BatchStream(open_dataset(zip_path), 5, seed=0, memory_limit=0, workers=2)
    for _ in range(2):
        next(stream)  # one of each worker, which has then started and leaves signals to its parent
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:  # what a terminal's Ctrl-C does, apart from the parent
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):
        next(stream)
    assert all(worker.is_alive() for worker in workers)
    stream.close()
    for worker in workers:
        worker.join(timeout=30)
        assert not worker.is_alive()
    next(stream)  # closing is not the end of it
    stream.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_batches_on_their_way_hold_no_file_descriptors(zip_path):
    """torch hands a tensor over as an open file; `ulimit -n` may be small, and workers run ahead."""
    before = set(multiprocessing.active_children())
    with BatchStream(open_dataset(zip_path), 5, seed=0, memory_limit=0, workers=2) as stream:
        for _ in range(2):
            next(stream)
        time.sleep(0.5)  # for the next ones to be on their way
        pids = [os.getpid(), *(worker.pid for worker in set(multiprocessing.active_children()) - before)]
        held = [link for pid in pids for link in map(os.path.realpath, Path(f"/proc/{pid}/fd").iterdir())]
    assert len(pids) == 3 and not [link for link in held if "/torch_" in link]


def test_nothing_is_drawn_from_the_global_generators(zip_path):
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for options in ({}, {"memory_limit": 0}, {"memory_limit": 0, "workers": 1}):
        with BatchStream(open_dataset(zip_path, max_images=20), 8, seed=0, x_flip=True, **options) as stream:
            next(stream)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"workers": -1}, {"seed": -1}, {"rank": 2, "world_size": 2}, {"rank": -1}]
)
def test_settings_that_cannot_work(options):
    with pytest.raises(ConfigError):
        BatchStream(numbered(10), **{"batch": 4, "seed": 0, **options})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"memory_limit": 0}, {"memory_limit": 0, "workers": 2}])
def test_batches_on_the_gpu_are_those_of_the_cpu(zip_path, options):
    dataset = open_dataset(zip_path, use_labels=True)
    with BatchStream(dataset, 8, seed=0, x_flip=True, device="cuda", **options) as stream:
        for (images, labels), (expected, expected_labels) in zip(
            (next(stream) for _ in range(20)), BatchStream(dataset, 8, seed=0, x_flip=True), strict=False
        ):
            assert images.is_cuda and labels.is_cuda
            assert torch.equal(images.cpu(), expected) and torch.equal(labels.cpu(), expected_labels)
