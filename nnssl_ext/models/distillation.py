"""How a teacher, its targets and the prototypes move over a run of self-distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnssl_ext.core.checks import above_zero, at_least, within
from nnssl_ext.models.ema import ema_momentum

Centring = Literal["softmax", "sinkhorn"]
STEP_SHARE = 0.1
"""No constant number of steps exceeds this share of the run."""


@dataclass(frozen=True)
class Pace:
    """What holds from one optimiser step to the next."""

    momentum: float
    """Of the teacher."""
    centre_momentum: float
    temperature: float
    """Of the teacher at the next step."""
    moving: bool
    """Whether prototypes learn at the next step."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Settings of a teacher and of what it asks."""

    prototypes: int | None = None
    """Number of prototypes, 2 or more; none: the power of two at or above 4 per case, from 256 to 8192."""
    student_temperature: float = 0.1
    """Above 0. Caron et al. 2021."""
    teacher_temperature: tuple[float, float] = (0.04, 0.05)
    """At the start and after the ramp, above 0. A fast or far rise is the main cause of collapse on volumes."""
    temperature_ramp: float = 0.6
    """Length of the rise as a share of the run, in [0, 1]."""
    centring: Centring = "softmax"
    """What keeps targets from being all the same: a running centre, or balance over the batch (large ones only)."""
    centre_momentum: float = 0.999
    """Of the running centre, in [0, 1); never above the teacher's, so that it forgets as fast."""
    ema: tuple[float, float] = (0.992, 0.9995)
    """The teacher's momentum at the start and at the end, each in [0, 1)."""
    short_ema: tuple[float, float] = (0.98, 0.996)
    """The same in runs shorter than `short_run`: a slower teacher is still the untrained one when they end."""
    short_run: int = 5000
    """In optimiser steps, 0 or more."""
    freeze_steps: int = 1500
    """Optimiser steps in which prototypes rest, 0 or more; at most a tenth of the run."""

    def __post_init__(self) -> None:
        within(self, "[0, 1)", "centre_momentum", "ema", "short_ema", note=": at 1 nothing would ever move")
        above_zero(self, "student_temperature", "teacher_temperature")
        within(self, "[0, 1]", "temperature_ramp")
        at_least(self, prototypes=2, short_run=0, freeze_steps=0)

    def pace(self, step: int, total: int) -> Pace:
        """What holds after step `step`, from 0, of `total`."""
        momentum = ema_momentum(step, total, *(self.short_ema if total < self.short_run else self.ema))
        start, end = self.teacher_temperature
        return Pace(
            momentum=momentum,
            centre_momentum=min(self.centre_momentum, momentum),
            temperature=start + (end - start) * min(1.0, (step + 1) / max(self.temperature_ramp * total, 1)),
            moving=step + 1 >= min(self.freeze_steps, int(STEP_SHARE * total)),
        )
