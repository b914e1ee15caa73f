"""The random numbers of a run: one generator per rank, saved with the checkpoint."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from gdd_fast.ranks import World


class RandomState:
    """A generator on the training device for this rank.

    Args:
        seed: the run's; every rank draws different numbers from it.
        world: the ranks whose states are saved together.
    """

    def __init__(self, seed: int, world: World) -> None:
        self._seed, self._world = seed, world
        self.generator = torch.Generator(world.device)
        self._reseed(0)

    def _reseed(self, images: int) -> None:
        self.generator.manual_seed(self._derive("generator", images))

    def renew(self, state: Tensor) -> None:
        """Make a new generator in this state, as one that a failed capture has used may refuse to work."""
        self.generator = torch.Generator(self._world.device)
        self.generator.set_state(state)

    def _derive(self, purpose: str, images: int) -> int:
        key = f"{purpose} {self._seed} {images} {self._world.rank}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")

    @contextlib.contextmanager
    def for_layers(self, images: int) -> Iterator[None]:
        """For a block, seed torch's own generators, from which layers such as dropout draw, by iteration and rank."""
        device = self._world.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._derive("layers", images))
            yield

    def tensors(self, state: Tensor | None = None) -> dict[str, Tensor]:
        """The generators' states by rank, with this rank's current one or the earlier `state`. Every rank calls it."""
        own = self.generator.get_state() if state is None else state
        return {str(rank): state for rank, state in enumerate(self._world.gather(own))}

    def restore(self, states: dict[str, Tensor], images: int) -> None:
        """Resume where `tensors` was called.

        With another number of ranks or kind of device that is impossible: then reseed from `images`.
        """
        own = states.get(str(self._world.rank))
        same_world = own is not None and len(states) == self._world.size
        if same_world and own.shape == self.generator.get_state().shape:
            self.generator.set_state(own)
        else:
            self._reseed(images)
