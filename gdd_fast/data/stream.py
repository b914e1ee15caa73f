"""Endless training batches on a device, from a data set in memory or streamed from disk, in the same order."""

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gdd_fast.data.dataset import ImageDataset, Progress
from gdd_fast.data.order import ShardedOrder
from gdd_fast.errors import CheckpointError, ConfigError, DataError

_STATE_KEYS = {"seed", "epoch", "position", "size", "x_flip"}


class BatchStream:
    """Iterator of (images uint8 (batch, C, H, W), labels float32 one-hot (batch, label_dim) or None), both on `device`.

    batch: images per step on this rank. seed, rank, world_size: see `ShardedOrder`.
    x_flip: as in EDM, the set counts twice, the second time mirrored: an epoch shows each image both ways. workers:
    processes that decode ahead if the set is streamed; 0 decodes in this process. memory_limit: bytes. A set that fits
    is held as one uint8 tensor on `device` and `workers` is not used; a larger one is streamed. Both give identical
    batches. Default: a quarter of the device's free memory, 4 GiB on the CPU; 0 always streams. progress: called while
    every image (when streaming: of this rank's share) is read and checked, which the constructor does, so that a bad
    image raises `DataError` before training starts.

    Close a stream that has workers by `close()`, or use it as a context manager. Raises `ConfigError` for bad sizes.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        x_flip: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
        memory_limit: int | None = None,
        progress: Progress | None = None,
    ):
        if batch < 1 or workers < 0:
            raise ConfigError(f"batch must be at least 1 and workers at least 0, not {batch} and {workers}")
        self.dataset = dataset
        self.batch = batch
        self.x_flip = x_flip
        self.device = torch.device(device)
        self._order = ShardedOrder(len(dataset) * (2 if x_flip else 1), seed, rank, world_size)
        self._start = 0
        limit = _default_memory_limit(self.device) if memory_limit is None else memory_limit
        self.in_memory = len(dataset) * math.prod(dataset.shape) <= limit
        if self.in_memory:
            self._source = _MemorySource(dataset, self.device, progress)
        else:
            dataset.validate(range(rank, len(dataset), world_size), progress)
            self._source = _DiskSource(dataset, self.device, workers)
        self._labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(self.device)
        self._batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._batches is None:
            self._batches = self._source.batches(self._requests(self._start))
        try:
            items, images = next(self._batches)
        except Exception:
            self.close()  # a generator that has raised would silently end a for loop the next time
            raise
        self._start += self.batch * self._order.world_size
        if self.x_flip:
            mirrored = items >= len(self.dataset)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, None if self._labels is None else self._one_hot(self._labels[items % len(self.dataset)])

    def _one_hot(self, classes: torch.Tensor) -> torch.Tensor:
        """As torch's one_hot, which first checks the range of the classes and so waits for the GPU."""
        rows = torch.zeros(len(classes), self.dataset.label_dim, device=self.device)
        return rows.scatter_(1, classes[:, None], 1.0)

    def _requests(self, start: int) -> Iterator[np.ndarray]:
        """Item indices, batch by batch; item i is image i % len(dataset), mirrored in the second half."""
        while True:
            yield self._order.take(start, self.batch)
            start += self.batch * self._order.world_size

    def state_dict(self) -> dict[str, int | bool]:
        """The position, the same on all ranks, as JSON types: the next batch starts at `position` of `epoch`."""
        epoch, position = divmod(self._start, self._order.size)
        size = len(self.dataset)
        return {"seed": self._order.seed, "epoch": epoch, "position": position, "size": size, "x_flip": self.x_flip}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue at the very next image, with the seed of `state`, even with another batch size or number of ranks.

        Raises `CheckpointError` if `state` is not such a state, or is for another data set or `x_flip`.
        """
        places = [state.get(key) for key in ("seed", "epoch", "position")]
        if set(state) != _STATE_KEYS or any(type(place) is not int or place < 0 for place in places):
            raise CheckpointError(f"not the state of a data stream: {state}")
        if (state["size"], state["x_flip"]) != (len(self.dataset), self.x_flip):
            raise CheckpointError(
                f"the checkpoint was made with {state['size']} images and x_flip={state['x_flip']}, "
                f"now there are {len(self.dataset)} and x_flip={self.x_flip}"
            )
        self.close()
        order = self._order
        self._order = ShardedOrder(order.size, state["seed"], order.rank, order.world_size)
        self._start = state["epoch"] * order.size + state["position"]

    def close(self) -> None:
        """End the worker processes, if any. The stream can be used again and continues where it was."""
        if self._batches is not None:
            self._batches.close()  # the generator holds the only reference to the workers
            self._batches = None

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _MemorySource:
    """The whole set as one uint8 tensor on the device; reading it is also its validation."""

    def __init__(self, dataset: ImageDataset, device: torch.device, progress: Progress | None):
        self._device = device
        self._images = torch.empty((len(dataset), *dataset.shape), dtype=torch.uint8, device=device)
        start = 0
        for chunk in dataset.chunks(progress=progress):
            self._images[start : start + len(chunk)] = torch.from_numpy(chunk)
            start += len(chunk)

    def batches(self, requests: Iterator[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for request in requests:
            items = torch.from_numpy(request)
            if self._device.type == "cuda":
                items = items.pin_memory().to(self._device, non_blocking=True)
            yield items, self._images[items % len(self._images)]


class _DiskSource:
    """Images decoded batch by batch, ahead of use if there are worker processes."""

    def __init__(self, dataset: ImageDataset, device: torch.device, workers: int):
        self._dataset, self._device, self._workers = dataset, device, workers

    def batches(self, requests: Iterator[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = DataLoader(
            _Decoder(self._dataset),
            batch_size=None,  # a request is a whole batch
            sampler=requests,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator().manual_seed(0),  # else its workers' seed comes from the global generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            items, images = map(torch.as_tensor, (batch.items, batch.images))
            yield items.to(self._device, non_blocking=True), images.to(self._device, non_blocking=True)


@dataclass(frozen=True)
class _Batch:
    """What a worker sends. Arrays go through a pipe, whereas each tensor in transit would hold a file descriptor."""

    items: np.ndarray | torch.Tensor
    images: np.ndarray | torch.Tensor

    def pin_memory(self) -> "_Batch":
        """Called by the DataLoader, in a separate thread."""
        return _Batch(*(torch.as_tensor(part).pin_memory() for part in (self.items, self.images)))


class _Decoder(Dataset):
    """Runs in the workers. An error is returned as a value: raised there, it would arrive wrapped in a traceback."""

    def __init__(self, dataset: ImageDataset):
        self._dataset = dataset

    def __getitem__(self, items: np.ndarray) -> _Batch | DataError:
        try:
            images = self._dataset.images(items % len(self._dataset))
        except DataError as error:
            return error
        return _Batch(items, images)


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C reaches all processes of the terminal, but the parent, which may save first, ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _default_memory_limit(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return 4 << 30
