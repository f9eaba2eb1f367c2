"""The pretraining behind an arm, from its run folder: loss curves, monitors, reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.engine.panels import Records, account, draw_moments, draw_panel, moments, recorded
from nnssl_ext.engine.recovery import INTERVENTIONS_FILE
from nnssl_ext.engine.saturation import solved, verdict
from nnssl_ext.engine.tracking import read_records
from nnssl_ext.reports.style import (
    ALARM_COLOUR,
    ARM_COLOURS,
    PAGE_WIDTH,
    Picture,
    data_uri,
    drawing,
    encode,
    grid_of_axes,
    integer_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
RECONSTRUCTIONS_FOLDER = "reconstructions"
COLUMNS = 4
MEANINGS = {
    "Targets": "Mutual information: how much a target tells of its case. Entropy near 1: targets are flat.",
    "Known for its case": "Known for its case: how often a crop's target is predicted best by a crop of its own case.",
    "Directions": "Rank: in how many directions features spread, as a share of the most possible. Between cases: the "
    "share of their variance that is between cases.",
    "Token spread": "Token spread: how much features differ from place to place in a crop.",
    "Same case found": "Same case found: how often, or how early, a crop finds another one of its case.",
    "Dice of probes": "Probes: the encoder frozen, on labelled cases that it was not trained on.",
}
"""Of the panels, for the caption."""


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
    meanings: tuple[str, ...] = ()
    """Of what the curves show."""
    solved: tuple[str, ...] = ()
    """What is to be said of tasks that the network has solved."""
    interventions: tuple[str, ...] = ()
    """What the engine did while it ran, and why."""


def read_pretraining(folder: Path) -> Pretraining:
    """Reads a run folder; what is not there is left out."""
    records = read_records(folder / METRICS_FILE)
    interventions = read_records(folder / INTERVENTIONS_FILE)
    pictures = sorted((folder / RECONSTRUCTIONS_FOLDER).glob("epoch_*.png"))
    return Pretraining(
        name=folder.parent.name,
        folder=str(folder),
        curves=_draw(records, interventions) if records else None,
        first=Picture(data_uri(pictures[0].read_bytes())) if len(pictures) > 1 else None,
        last=Picture(data_uri(pictures[-1].read_bytes())) if pictures else None,
        num_epochs=len(records),
        meanings=tuple(MEANINGS[title] for title in recorded(records)),
        solved=tuple(verdict(name, epoch) for name, epoch in solved(records).items()),
        interventions=tuple(map(account, interventions)),
    )


def _draw(records: Records, interventions: Records) -> Picture:
    number = 1 + len(recorded(records))
    columns = min(number, COLUMNS)
    with drawing(PAGE_WIDTH * columns / COLUMNS, 2.9 * -(-number // COLUMNS)) as figure:
        draw_curves(figure, columns, records, interventions)
        return encode(figure)


def draw_curves(figure: Figure, columns: int, records: Records, interventions: Records) -> None:
    """The loss and each panel of `engine.panels` that the run has numbers for, and where it was intervened in.

    Args:
        figure: Where.
        columns: Panels side by side.
        records: Of `metrics.jsonl`.
        interventions: Of `interventions.jsonl`.
    """
    panels = {"Loss": {"train_loss": "training", "val_loss": "validation"}, **recorded(records)}
    axes = [axis for row in grid_of_axes(figure, -(-len(panels) // columns), columns) for axis in row]
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        axis.set_title(title)
        draw_panel(axis, records, lines, ARM_COLOURS, from_zero=title != "Loss")
        draw_moments(axis, moments(records, interventions), ALARM_COLOUR)
        axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.24))
        axis.set_xlabel("epoch")
        integer_ticks(axis)
    for axis in axes[len(panels) :]:
        axis.remove()
