"""Memory that batches are decoded into, used again as soon as nothing refers to its last batch.

Fresh memory costs a page fault every 4 kB, and a tensor sent between processes a copy: for a batch of large crops more
than half of what decoding them takes. For a GPU the memory is page-locked as well, and left alone until the GPU has
copied what it was asked to.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.loading.pinning import HostMemory, Mark

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
        host: Of the device that copies from them; None where none does.
    """

    def __init__(self, num_bytes: int, shared: bool, host: HostMemory | None = None) -> None:
        self.num_bytes, self.shared, self.host = num_bytes, shared, host
        self._made = 0
        self._free: list[Buffer] = []
        self._leaving: deque[tuple[Mark, Buffer]] = deque()
        """Buffers that nothing refers to, and how far the device has to come before they are free."""
        self._locked: dict[int, torch.Tensor] = {}
        if host is not None:
            weakref.finalize(self, _unlock, host, self._locked)

    def take(self) -> Buffer:
        """A buffer for one batch; `lease` or `give_back` it."""
        while self._leaving and self._leaving[0][0].query():
            self._free.append(self._leaving.popleft()[1])
        return self._free.pop() if self._free else self._make()

    def _make(self) -> Buffer:
        buffer = Buffer(self._made, _pages(self.num_bytes, self.shared))
        self._made += 1
        if self.host is not None:
            self.host.lock(buffer.memory)
            self._locked[buffer.number] = buffer.memory
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Makes a buffer that nothing refers to, and nothing was copied from, available again."""
        self._free.append(buffer)

    def lease(self, buffer: Buffer) -> torch.Tensor:
        """The buffer's memory; the buffer is given back when no tensor on it is left, however it was derived."""
        owner: Bytes = buffer.memory.numpy()
        weakref.finalize(owner, self._left, buffer).atexit = False
        return torch.from_numpy(owner)

    def _left(self, buffer: Buffer) -> None:
        """Takes back a buffer on which no tensor is left: all copies of it were asked for, but may be going on."""
        if self.host is None:
            self.give_back(buffer)
        elif buffer.number in self._locked:  # else the pool was closed
            self._leaving.append((self.host.mark(), buffer))

    def close(self) -> None:
        """Unlocks all memory when nothing is copied from it any more. Batches that are kept can still be used."""
        if self.host is not None:
            self._free.clear()
            self._leaving.clear()
            _unlock(self.host, self._locked)


def _pages(num_bytes: int, shared: bool) -> torch.Tensor:
    """Memory that begins with a page, as locking is by page."""
    if shared:
        return torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def _unlock(host: HostMemory, locked: dict[int, torch.Tensor]) -> None:
    if locked:
        host.mark().synchronize()
    while locked:
        host.unlock(locked.popitem()[1])
