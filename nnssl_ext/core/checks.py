"""Checks of settings in one voice: a ValueError names the setting, its value and what is allowed.

Of a setting of several numbers each is checked; None passes, NaN never does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def at_least(config: Any, prefix: str = "", /, **least: float) -> None:
    """Refuses settings below the least values that are given by their names; the prefix is for messages: "optim."."""
    for name, limit in least.items():
        _check(config, prefix + name, f"[{limit}, inf]", f"be {limit} or more")


def above_zero(config: Any, *names: str) -> None:
    """Refuses settings of 0 or less."""
    for name in names:
        _check(config, name, "(0, inf]", "be above 0")


def within(config: Any, interval: str, *names: str, note: str = "") -> None:
    """Refuses settings outside of an interval, such as "[0, 1)"; names may have a prefix, as in "optim.betas"."""
    for name in names:
        _check(config, name, interval, f"lie in {interval}{note}")


def rising(config: Any, interval: str, *names: str) -> None:
    """Refuses settings that are not two numbers in an interval, the smaller one first."""
    for name in names:
        _check(config, name, interval, f"be two numbers in {interval}, the smaller one first", in_order=True)


def _check(config: Any, name: str, interval: str, rule: str, in_order: bool = False) -> None:
    value = getattr(config, name.rpartition(".")[2])
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = all(number > low if interval[0] == "(" else number >= low for number in numbers)
    below = all(number < high if interval[-1] == ")" else number <= high for number in numbers)
    if not (above and below) or (in_order and any(first > then for first, then in pairwise(numbers))):
        raise ValueError(f"{name}={value} must {rule}.")
