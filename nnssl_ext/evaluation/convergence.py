"""Was an arm still learning when it stopped? Read off the validation curves of its fine-tuning runs.

A baseline that was stopped early makes any pretraining look good, since pretraining mostly buys speed. So each arm is
judged on the mean curve of its runs, by one rule: over the last fifth of the epochs (at least `MIN_TAIL` of them) a
straight line is fitted to the validation curve. The arm was *still rising* when the line improves over that stretch
both by more than a threshold (`MIN_GAIN` Dice, or `MIN_LOSS_SHARE` of the loss curve's whole range) and by more than
`MIN_T` standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

TAIL_SHARE = 0.2
MIN_TAIL = 5
MIN_GAIN = 0.01
"""Dice gained over the tail; half of the spread that seeds alone cause on small data."""
MIN_LOSS_SHARE = 0.05
"""Share of the loss' whole fall that happens in the tail; a curve that is done has a fraction of that left."""
MIN_T = 2.0
NEAR_ZERO_DICE = 0.1
"""A mean Dice under this says that the network has learned next to nothing."""

State = Literal["settled", "rising", "unknown"]


@dataclass(frozen=True)
class Trend:
    """The straight line through the end of a validation curve."""

    state: State
    curve: str
    """`dice` or `loss`: what was judged."""
    gain: float | None
    """Improvement along the line over the tail, in units of the curve; negative when it gets worse."""
    t_value: float | None
    """The slope's improvement in standard errors."""
    epochs: int
    """Length of the tail."""


def judge(dice: Sequence[float | None], loss: Sequence[float | None]) -> Trend:
    """Applies the rule to a run's validation Dice per epoch or, where that was not recorded, to its validation loss."""
    curve, values, sign = "dice", _known(dice), 1.0
    if len(values) < MIN_TAIL:
        curve, values, sign = "loss", _known(loss), -1.0
    if len(values) < MIN_TAIL:
        return Trend("unknown", curve, None, None, len(values))
    tail = sign * values[-tail_length(len(values)) :]
    gain, t_value = _line(tail)
    threshold = MIN_GAIN if curve == "dice" else MIN_LOSS_SHARE * float(values.max() - values.min())
    rising = gain > threshold and t_value > MIN_T
    return Trend("rising" if rising else "settled", curve, gain, t_value, len(tail))


def tail_length(num_epochs: int) -> int:
    """Epochs at the end of a curve on which it is judged."""
    return max(MIN_TAIL, math.ceil(TAIL_SHARE * num_epochs))


def mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean over runs at each epoch, over as many epochs as the shortest run has; None where no run has a value."""
    means: list[float | None] = []
    for values in zip(*curves, strict=False):
        known = _known(values)
        means.append(float(known.mean()) if len(known) else None)
    return means


def _known(values: Sequence[float | None]) -> np.ndarray:
    return np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float)


def _line(values: np.ndarray) -> tuple[float, float]:
    """Rise of the least-squares line from the first to the last point, and the slope in standard errors."""
    steps = np.arange(len(values), dtype=float)
    centred = steps - steps.mean()
    slope = float(centred @ values / (centred @ centred))
    residual = values - values.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / (len(values) - 2) / float(centred @ centred))
    t_value = slope / error if error > 0 else math.copysign(math.inf, slope) if slope else 0.0
    return slope * (len(values) - 1), t_value
