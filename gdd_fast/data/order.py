"""The order in which a data set is traversed: endless, reshuffled each epoch, divided among ranks."""

import numpy as np

from gdd_fast.errors import ConfigError


class ShardedOrder:
    """An endless sequence of item indices, the same on every rank, of which a rank takes every `world_size`-th.

    Epoch e is a permutation of all `size` items that depends on (seed, e) alone, so any position in the sequence can be
    reached directly, and together the ranks visit every item exactly once per epoch.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1):
        if seed < 0:
            raise ConfigError(f"the seed of the data order must be at least 0, not {seed}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not within a world of {world_size}")
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def take(self, start: int, count: int) -> np.ndarray:
        """This rank's share, int64 (count,), of the `count * world_size` items from position `start` on."""
        places = start + self.rank + self.world_size * np.arange(count)
        epochs, offsets = np.divmod(places, self.size)
        items = np.empty(count, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            items[here] = self._permutation(epoch)[offsets[here]]
        return items

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            # A resumed run must see the same order: RandomState is frozen by NumPy's policy, Generator is not.
            source = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            self._cached = (epoch, source.permutation(self.size))
        return self._cached[1]
