"""The pretraining behind an arm, from its run folder: loss curves, monitors, reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.engine.saturation import solved, verdict
from nnssl_ext.engine.tracking import read_records
from nnssl_ext.reports.style import (
    ARM_COLOURS,
    MUTED,
    PAGE_WIDTH,
    Picture,
    data_uri,
    drawing,
    encode,
    grid_of_axes,
    integer_ticks,
)

METRICS_FILE = "metrics.jsonl"
RECONSTRUCTIONS_FOLDER = "reconstructions"
MONITORS = {
    "effective_rank": "effective rank",
    "token_spread": "token spread",
    "same_case_retrieval": "same-case retrieval",
    "probe_dice": "Dice of a linear probe",
}
_CHANCE = "_chance"


@dataclass(frozen=True)
class Pretraining:
    """What the report shows of a pretraining run."""

    name: str
    """`TRAINER__PLANS__CONFIGURATION`."""
    folder: str
    curves: Picture | None
    """None where no epoch was recorded."""
    first: Picture | None
    """First reconstruction, where there are several."""
    last: Picture | None
    num_epochs: int
    solved: tuple[str, ...] = ()
    """What is to be said of tasks that the network has solved."""


def read_pretraining(folder: Path) -> Pretraining:
    """Reads a run folder; what is not there is left out."""
    records = read_records(folder / METRICS_FILE)
    pictures = sorted((folder / RECONSTRUCTIONS_FOLDER).glob("epoch_*.png"))
    return Pretraining(
        name=folder.parent.name,
        folder=str(folder),
        curves=_draw(records) if records else None,
        first=Picture(data_uri(pictures[0].read_bytes())) if len(pictures) > 1 else None,
        last=Picture(data_uri(pictures[-1].read_bytes())) if pictures else None,
        num_epochs=len(records),
        solved=tuple(verdict(name, epoch) for name, epoch in solved(records).items()),
    )


def _draw(records: Sequence[Mapping[str, Any]]) -> Picture:
    monitors = {key: label for key, label in MONITORS.items() if any(row.get(key) is not None for row in records)}
    columns = 1 + len(monitors)
    with drawing(PAGE_WIDTH if monitors else PAGE_WIDTH / 2, 2.5) as figure:
        (axes,) = grid_of_axes(figure, 1, columns, width_ratios=[1.5] + [1.0] * len(monitors))
        for name, colour in (("train_loss", MUTED), ("val_loss", ARM_COLOURS[0])):
            axes[0].plot(*_series(records, name), color=colour, label=name.split("_")[0])
        axes[0].set_title("loss")
        axes[0].legend()
        for panel, (key, label) in zip(axes[1:], monitors.items(), strict=True):
            epochs, values = _series(records, key)
            panel.plot(epochs, values, color=ARM_COLOURS[0], marker="." if len(epochs) < len(records) else "")
            panel.plot(*_series(records, key + _CHANCE), color=MUTED, ls=(0, (4, 3)), lw=1)
            panel.set_title(label)
        for panel in axes:
            panel.set_xlabel("epoch")
            integer_ticks(panel)
        return encode(figure)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["epoch"] + 1, row[name]) for row in records if row.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]
