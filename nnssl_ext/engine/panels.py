"""Numbers of a run that are drawn side by side over its epochs, and the moments at which the engine intervened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

PANELS: Mapping[str, Mapping[str, str]] = {
    "Targets": {
        "health_mutual_information": "mutual information, nat",
        "health_target_entropy": "entropy, share of ln K",
    },
    "Known for its case": {"val_known_case": "held-out crops"},
    "Directions": {
        "effective_rank": "rank, features",
        "health_rank": "rank, embeddings",
        "health_between_share": "between cases",
    },
    "Token spread": {"token_spread": "held-out crops", "health_token_spread": "training crops"},
    "Same case found": {"same_case_retrieval": "nearest", "same_case_mrr": "reciprocal rank"},
    "Dice of probes": {"probe_dice": "linear", "probe_knn_dice": "nearest neighbours"},
}
"""Title to metrics with their labels; one whose chance is known has it under the name with `CHANCE` behind it."""
CHANCE = "_chance"
TEACHER = "health_target_entropy"
"""Logged where the loss is against a teacher's targets, which move: its lowest value is then not the best."""


@contextmanager
def default_style() -> Iterator[None]:
    """Matplotlib's own style, whatever others have left in the process: nnU-Net's curves make all letters large.

    A decorator as well.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """The epochs, from 1 on, that have a number, and the numbers."""
    rows = [(record["epoch"] + 1, record[name]) for record in records if record.get(name) is not None]
    return [epoch for epoch, _ in rows], [value for _, value in rows]


def recorded(records: Records) -> dict[str, dict[str, str]]:
    """The panels that a run has numbers for, each with the metrics that it has."""
    known = {name for record in records for name, value in record.items() if value is not None}
    panels = {title: {name: label for name, label in of.items() if name in known} for title, of in PANELS.items()}
    return {title: lines for title, lines in panels.items() if lines}


def moments(records: Records, interventions: Records) -> list[tuple[float, str]]:
    """Where along the epochs the drawn run was intervened in, and the statistics that caused it.

    After a roll-back that is the state that the run went back to: what came after it is no longer in the records.

    Args:
        records: Of `metrics.jsonl`.
        interventions: Of `interventions.jsonl`.
    """
    if not records or not interventions:
        return []
    steps_per_epoch = records[-1]["step"] / (records[-1]["epoch"] + 1)
    found: dict[int, dict[str, None]] = {}
    for record in interventions:
        if record["event"] == "intervention":
            found.setdefault(record["resumed_at"], {})[record["statistic"].replace("_", " ")] = None
    return [(step / steps_per_epoch, ", ".join(names)) for step, names in found.items()]


def account(record: Mapping[str, Any]) -> str:
    """A line of `interventions.jsonl` as a sentence."""
    step, event = record["step"], record["event"]
    if event == "skipped":
        return f"Step {step} was skipped: loss or gradient was not finite on cases {', '.join(record['cases'])}."
    diagnosis = record["diagnosis"].rstrip(".")
    if event == "intervention":
        return f"Step {step}: {diagnosis}. Intervened: {'; '.join(record['changes'])}."
    return f"Step {step}, {event}: {diagnosis}."


def draw_panel(
    axis: Axes, records: Records, lines: Mapping[str, str], colours: Sequence[str], from_zero: bool = True
) -> None:
    """A line for each metric, and a dotted one of what it is by chance.

    Args:
        axis: Where.
        records: Of `metrics.jsonl`.
        lines: Metrics with their labels.
        colours: One for each metric, or more.
        from_zero: Whether 0 is shown in any case.
    """
    for (name, label), colour in zip(lines.items(), colours, strict=False):
        for key, said, style in ((name, label, "-"), (name + CHANCE, "by chance", ":")):
            epochs, values = series(records, key)
            if epochs:
                marker = "." if len(epochs) < len(records) or len(epochs) == 1 else ""
                axis.plot(epochs, values, style, color=colour, label=said, linewidth=1.6, marker=marker)
    if from_zero:
        low, high = axis.get_ylim()
        axis.set_ylim(min(0, low), 1.05 * high)


def draw_moments(axis: Axes, found: Sequence[tuple[float, str]], colour: str) -> None:
    """A vertical line with its statistics at every moment of `moments`."""
    for epoch, name in found:
        axis.axvline(epoch, color=colour, linestyle=(0, (2, 2)), linewidth=1)
        axis.annotate(
            name,
            (epoch, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(2, 0),
            textcoords="offset points",
            rotation=90,
            verticalalignment="top",
            color=colour,
            fontsize=7,
        )
