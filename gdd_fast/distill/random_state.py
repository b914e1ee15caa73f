"""The random numbers of a run: one generator a rank, saved with the checkpoint."""

import hashlib

import torch
from torch import Tensor

from gdd_fast.distill.distributed import World


class RandomState:
    """A generator on the training device for this rank.

    Args:
        seed: of the run; every rank draws other numbers from the same seed.
        world: the ranks whose states are saved together.
    """

    def __init__(self, seed: int, world: World) -> None:
        self._seed, self._world = seed, world
        self.generator = torch.Generator(world.device)
        self._reseed(0)

    def _reseed(self, images: int) -> None:
        key = f"{self._seed} {images} {self._world.rank}".encode()
        self.generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))

    def tensors(self) -> dict[str, Tensor]:
        """The state of every rank by rank number; called on every rank."""
        return {str(rank): state for rank, state in enumerate(self._world.gather(self.generator.get_state()))}

    def restore(self, states: dict[str, Tensor], images: int) -> None:
        """Go on where `tensors` was taken. With another number of ranks there is no such place: reseed from `images`."""
        if len(states) == self._world.size:
            self.generator.set_state(states[str(self._world.rank)].cpu())
        else:
            self._reseed(images)
