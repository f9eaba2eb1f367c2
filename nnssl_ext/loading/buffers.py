"""Memory that batches are decoded into, used again as soon as nothing refers to its last batch.

Fresh memory costs a page fault every 4 kB, and a tensor sent between processes a copy: for a batch of large crops more
than half of what decoding them takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Buffer:
    """A piece of memory and its number among those of its pool."""

    number: int
    memory: torch.Tensor
    """(N,), uint8."""


class BufferPool:
    """Buffers of one size; a new one is made where all others are in use.

    Args:
        num_bytes: Size of a buffer.
        shared: Whether other processes can be given them.
    """

    def __init__(self, num_bytes: int, shared: bool) -> None:
        self.num_bytes, self.shared = num_bytes, shared
        self._made = 0
        self._free: list[Buffer] = []

    def take(self) -> Buffer:
        """A buffer for one batch; `lease` or `give_back` it."""
        if self._free:
            return self._free.pop()
        memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._made += 1
        return Buffer(self._made - 1, memory.share_memory_() if self.shared else memory)

    def give_back(self, buffer: Buffer) -> None:
        """Makes a buffer that nothing refers to available again."""
        self._free.append(buffer)

    def lease(self, buffer: Buffer) -> torch.Tensor:
        """The buffer's memory; the buffer is given back when no tensor on it is left, however it was derived."""
        owner: Bytes = buffer.memory.numpy()
        give_back: Callable[[Buffer], None] = self._free.append
        weakref.finalize(owner, give_back, buffer).atexit = False
        return torch.from_numpy(owner)
