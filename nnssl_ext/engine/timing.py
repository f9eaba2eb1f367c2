"""How fast a run is: steps per second, share of time spent waiting for data, GPU memory, remaining time."""

from __future__ import annotations

import time

import torch

from nnssl_ext.planners.rules import GIBIBYTE

_SHORTEST = 1e-9


class Stopwatch:
    """Times one epoch after another.

    Args:
        device: The GPU whose memory is read; a CPU has none to tell of.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart(0.0)

    def restart(self, waited: float) -> None:
        """Begins an epoch; `waited` is the loader's count of seconds so far."""
        self._start, self._waited, self._steps = time.monotonic(), waited, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step(self, waited: float) -> dict[str, float]:
        """Counts an optimiser step and tells the speed of the epoch so far.

        Args:
            waited: The loader's count of seconds.

        Returns:
            `steps_per_second`, `data_wait_share` in [0, 1] and, on a GPU, `gpu_memory_gb`, the peak in GiB.
        """
        self._steps += 1
        return self.speed(waited)

    def speed(self, waited: float) -> dict[str, float]:
        """The same as `step` tells, without counting one."""
        seconds = max(time.monotonic() - self._start, _SHORTEST)
        values = {
            "steps_per_second": self._steps / seconds,
            "data_wait_share": min((waited - self._waited) / seconds, 1.0),
        }
        if self.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / GIBIBYTE
        return values

    def epoch(self, steps_left: int) -> dict[str, float]:
        """The whole epoch, validation included.

        Args:
            steps_left: Optimiser steps until the run's end.

        Returns:
            `seconds` and `eta_seconds`.
        """
        seconds = time.monotonic() - self._start
        return {"seconds": seconds, "eta_seconds": steps_left * seconds / max(self._steps, 1)}
