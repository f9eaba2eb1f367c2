"""Pretext tasks that are solved: a network that always answers right has nothing more to learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CEILING = 0.99
"""An accuracy from which on an answer is right as good as always."""
NUM_EPOCHS = 5
"""Epochs in a row at the ceiling after which a task counts as solved."""
_ACCURACY, _CHANCE = "accuracy", "_chance"


def solved(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Accuracies on held-out cases that have stood at their ceiling, and the epoch in which that was first clear.

    An accuracy is a metric with that word in its name and its chance beside it. One whose chance is at the ceiling
    itself says nothing.

    Args:
        records: Of `metrics.jsonl`, epoch by epoch.
    """
    found: dict[str, int] = {}
    lengths: dict[str, int] = {}
    for record in records:
        for name in (name for name in record if name.startswith("val_") and _ACCURACY in name):
            chance = record.get(name + _CHANCE)
            if name in found or chance is None or chance >= CEILING:
                continue
            lengths[name] = lengths.get(name, 0) + 1 if (record[name] or 0) >= CEILING else 0
            if lengths[name] == NUM_EPOCHS:
                found[name] = record["epoch"]
    return found


def verdict(name: str, epoch: int) -> str:
    """What to say of an accuracy that `solved` found."""
    words = name.removeprefix("val_").replace("_", " ")
    return (
        f"The {words} on held-out cases has been {CEILING:g} or more for {NUM_EPOCHS} epochs by epoch {epoch + 1}: the "
        "task is solved, and longer training teaches little more."
    )
