"""Learning-rate schedules as pure functions of the optimiser step.

A schedule is a factor in [0, 1] on the peak learning rate. Steps count from 0, so a run of `total` steps asks for
`0 .. total - 1`. A warm-up of `w` steps climbs in equal rises of `1 / (w + 1)` and the curve after it begins at exactly
1: the peak is reached by one more such rise, never by a jump.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nnssl_ext.core.checks import above_zero, at_least, within
from nnssl_ext.engine.optim import Role


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run. The default is nnU-Net's polynomial decay, taken per optimiser step."""

    name: Literal["poly", "cosine", "constant", "sawtooth"] = "poly"
    """Shape after the warm-up: `poly`, `cosine`, `constant`, or `sawtooth` (a tooth for the heads, then for all)."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up, 0 or more."""
    warmup_share: float = 0.0
    """Shortest warm-up as a share of the run, in [0, 1]: long runs lengthen theirs."""
    warmup_limit: float = 0.1
    """Longest warm-up as a share of the run, in [0, 1]: short runs shorten their warm-up, so that they leave it."""
    exponent: float = 0.9
    """Exponent of the polynomial decay, above 0."""
    final_factor: float = 0.0
    """Factor that the cosine ends at, in [0, 1]."""
    head_steps: int = 0
    """Steps of the sawtooth's first tooth, in which the encoder rests; its first half is warm-up."""

    def __post_init__(self) -> None:
        if self.name not in ("poly", "cosine", "constant", "sawtooth"):
            raise ValueError(f"schedule.name={self.name!r} is unknown: use 'poly', 'cosine', 'constant' or 'sawtooth'.")
        at_least(self, "schedule.", warmup_steps=0, head_steps=0)
        within(self, "[0, 1]", "schedule.warmup_share", "schedule.warmup_limit", "schedule.final_factor")
        above_zero(self, "schedule.exponent")


def poly(step: int, total: int, exponent: float = 0.9) -> float:
    """Polynomial decay from 1 at step 0 towards 0 at `total`: `(1 - step / total) ** exponent`."""
    return float((1 - step / total) ** exponent)


def cosine(step: int, total: int, final_factor: float = 0.0) -> float:
    """Half a cosine from 1 at step 0 towards `final_factor` at `total`."""
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * step / total))


def warmup(step: int, steps: int) -> float:
    """Linear warm-up: `1 / (steps + 1)` at step 0, one rise short of 1 at the last of its `steps`."""
    return (step + 1) / (steps + 1)


def tooth(step: int, total: int, warmup_steps: int, exponent: float = 0.9) -> float:
    """One sawtooth: warm-up over `warmup_steps`, then polynomial decay over what is left of `total`."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return poly(step - warmup_steps, total - warmup_steps, exponent)


def warmup_length(config: ScheduleConfig, total: int) -> int:
    """Steps of warm-up in a run of `total` steps: the configured number, within the shares of the run."""
    return min(max(config.warmup_steps, int(config.warmup_share * total)), int(config.warmup_limit * total))


def head_length(config: ScheduleConfig, total: int) -> int:
    """Steps of the sawtooth's first tooth in a run of `total` steps, shortened as the warm-up is."""
    return min(config.head_steps, int(config.warmup_limit * total))


def schedule_factor(config: ScheduleConfig, step: int, total: int, role: Role = "rest") -> float:
    """Factor on the peak learning rate at one optimiser step.

    Args:
        config: The schedule's record.
        step: Optimiser step in `[0, total)`.
        total: Optimiser steps of the run.
        role: `encoder` or `rest`; only the sawtooth tells them apart.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: Where the step lies outside the run.
    """
    if not 0 <= step < total:
        raise ValueError(f"Step {step} lies outside the run of {total} steps: steps count from 0 to {total - 1}.")
    length = warmup_length(config, total)
    if config.name == "sawtooth":
        head = head_length(config, total)
        if step < head:
            return 0.0 if role == "encoder" else tooth(step, head, head // 2, config.exponent)
        return tooth(step - head, total - head, min(length, total - head - 1), config.exponent)
    if step < length:
        return warmup(step, length)
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        return cosine(step - length, total - length, config.final_factor)
    return poly(step - length, total - length, config.exponent)
