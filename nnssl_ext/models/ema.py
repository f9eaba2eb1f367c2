"""Teachers: copies of a network that follow it slowly (Tarvainen and Valpola 2017, arXiv:1703.01780)."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import Self


class Teacher(nn.Module):
    """A copy of some modules, equal to them at the start, without gradient, and always in eval mode.

    Its parts are attributes under the names they were given, so a teacher of `encoder` is called as
    `teacher.encoder(x)`.

    Args:
        modules: What is followed, by name.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.add(**modules)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def add(self, **modules: nn.Module) -> None:
        """Follows further modules from now on."""
        for name, module in modules.items():
            self.add_module(name, deepcopy(module).requires_grad_(False).eval())

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a teacher drops nothing."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, momentum: float, **modules: nn.Module) -> None:
        """Moves every weight to `momentum` times itself plus the rest of the student's. Once per optimiser step.

        Args:
            momentum: In [0, 1).
            modules: The same as at the start; buffers are copied.

        Raises:
            ValueError: If the momentum is out of range: at 1 the teacher would never learn.
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1): a teacher with 1 never moves.")
        for name, student in modules.items():
            own = self.get_submodule(name)
            weights: list[torch.Tensor] = list(own.parameters())
            if weights:
                torch._foreach_lerp_(weights, list(student.parameters()), 1 - momentum)
            for buffer, source in zip(own.buffers(), student.buffers(), strict=True):
                buffer.copy_(source)


def ema_momentum(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to just below `end` at the last of `total` steps."""
    return end - (end - start) * (1 + math.cos(math.pi * step / total)) / 2
