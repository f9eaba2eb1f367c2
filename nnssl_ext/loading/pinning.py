"""Memory that a GPU copies from by itself: page-locked, so that nobody waits while the copy goes on."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the work that was given to a device."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...

    def synchronize(self) -> None:
        """Waits until it has."""
        ...


class HostMemory(Protocol):
    """What a device wants done about memory that it copies from."""

    def lock(self, memory: Tensor) -> None:
        """Keeps the pages of a tensor (N,), uint8, where they are."""
        ...

    def unlock(self, memory: Tensor) -> None:
        """Undoes `lock`."""
        ...

    def mark(self) -> Mark:
        """A mark behind every copy that was asked for so far."""
        ...


class CudaHostMemory:
    """Page-locks memory of any origin, shared between processes too; copies are asked for on the current stream.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def lock(self, memory: Tensor) -> None:
        """See `HostMemory.lock`.

        Raises:
            RuntimeError: If the system refuses it.
        """
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(status):
            raise RuntimeError(
                f"{memory.numel()} bytes cannot be page-locked for {self.device} (CUDA error {int(status)}): the "
                "system is short of memory, or /dev/shm is full. Use fewer workers (-num_workers)."
            )

    def unlock(self, memory: Tensor) -> None:
        """See `HostMemory.unlock`."""
        with torch.cuda.device(self.device):
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))

    def mark(self) -> Mark:
        """See `HostMemory.mark`."""
        return torch.cuda.current_stream(self.device).record_event()


def host_memory(device: torch.device | str) -> HostMemory | None:
    """What a device wants done about memory that it copies from; None on a CPU, which copies nothing."""
    device = torch.device(device)
    return CudaHostMemory(device) if device.type == "cuda" else None
