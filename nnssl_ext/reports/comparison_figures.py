"""The figures of a comparison of methods: scores, critical differences, probabilities of ranks, pairs, probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnssl_ext.evaluation.comparison_records import MethodComparison, Ranking
from nnssl_ext.evaluation.comparison_statistics import RankTest
from nnssl_ext.reports.style import (
    ARM_COLOURS,
    GRID,
    INK,
    MUTED,
    PAGE_WIDTH,
    REFERENCE_COLOUR,
    Picture,
    drawing,
    encode,
    grid_of_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 0.34
"""Height of an arm's row, in inches."""
_LABELS = 1.5
"""Height of titles and axes of a figure of rows, in inches."""
_HALF = (PAGE_WIDTH - 0.3) / 2
"""Width of two pictures side by side."""
_SIDE = 1.7
"""Room for labels on each side of a scale of ranks, in inches."""
_TICK = 0.28
"""Width of a rank on it, in inches, where the page has room."""
_PROBE_KINDS = (("method", ARM_COLOURS[0], "o"), ("its sham run", ARM_COLOURS[1], "s"), ("untrained", MUTED, "D"))
_DARK = 0.55
"""Share above which a cell's text is white."""


def colours_of(comparison: MethodComparison) -> dict[str, str]:
    """Colour of each row by label: grey without pretraining, else the palette in turn; shams have their method's."""
    trainers = list(dict.fromkeys(row.trainer for row in comparison.methods if row.trainer))
    palette = {trainer: ARM_COLOURS[index % len(ARM_COLOURS)] for index, trainer in enumerate(trainers)}
    return {row.label: palette.get(row.trainer, REFERENCE_COLOUR) for row in comparison.methods}


def fine_tuned(comparison: MethodComparison) -> Picture:
    """Mean Dice of every arm with its interval, best first, one panel per size; small dots are seeds."""
    colours, rankings = colours_of(comparison), comparison.rankings
    width = PAGE_WIDTH if len(rankings) > 1 else 0.62 * PAGE_WIDTH
    with drawing(width, _LABELS * 0.6 + _ROW * len(rankings[0].arms)) as figure:
        (panels,) = grid_of_axes(figure, 1, len(rankings))
        for axes, ranking in zip(panels, rankings, strict=True):
            for place, arm in enumerate(ranking.arms):
                hollow = "white" if comparison.method(arm.label).sham else colours[arm.label]
                low, high = (max(0.0, arm.mean - arm.interval.low), max(0.0, arm.interval.high - arm.mean))
                line: Any = {"color": colours[arm.label], "mfc": hollow, "capsize": 3, "elinewidth": 1.4, "ms": 6}
                axes.errorbar([arm.mean], [place], xerr=[[low], [high]], fmt="o", **line)
                if len(arm.seed_means) > 1:
                    heights = [place + 0.26] * len(arm.seed_means)
                    axes.scatter(arm.seed_means, heights, s=9, color=colours[arm.label], alpha=0.5, linewidths=0)
            _rows(axes, [arm.label for arm in ranking.arms])
            axes.set_title(f"{ranking.num_train} training cases")
            axes.set_xlabel("mean foreground Dice")
        return encode(figure)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def critical_difference(ranking: Ranking, test: RankTest, title: str) -> Picture:
    """Mean ranks on a line, best on the left; bars join arms whose ranks lie within the critical difference."""
    labels, ranks = [arm.label for arm in ranking.arms], test.mean_ranks
    order = sorted(range(len(labels)), key=lambda index: ranks[index])
    half = (len(labels) + 1) // 2
    depth = 0.5 + 0.26 * len(test.groups)
    width = min(PAGE_WIDTH, max(_HALF, 2 * _SIDE + _TICK * len(labels)))
    room = _SIDE * max(len(labels) - 1, 1) / (width - 2 * _SIDE)  # of the labels beside the scale, in ranks
    with drawing(width, 1.25 + _ROW * (half + 0.8 * len(test.groups))) as figure:
        axes = figure.add_subplot()
        last = len(labels)
        axes.plot([1, last], [0, 0], color=INK, lw=1.2)
        for tick in range(1, last + 1):
            axes.plot([tick, tick], [0, 0.12], color=INK, lw=1)
            axes.text(tick, 0.2, str(tick), ha="center", va="bottom")
        margin = 0.11 * room
        for place, index in enumerate(order):
            left = place < half
            height = -depth - 0.6 * (place if left else last - 1 - place)
            end = 1 - margin if left else last + margin
            axes.plot([ranks[index], ranks[index], end], [0, height, height], color=MUTED, lw=1)
            text = f"{labels[index]} {ranks[index]:.2f}" if left else f"{ranks[index]:.2f} {labels[index]}"
            axes.text(
                end + (-margin if left else margin) / 3, height, text, ha="right" if left else "left", va="center"
            )
        for row, group in enumerate(test.groups):
            ends = sorted(ranks[index] for index in group)
            bar = margin / 3
            axes.plot(
                [ends[0] - bar, ends[-1] + bar], [-0.3 - 0.26 * row] * 2, color=INK, lw=3.5, solid_capstyle="butt"
            )
        shown = min(test.critical_difference, last - 1)
        note = "" if shown == test.critical_difference else ", wider than the scale"
        axes.plot([1, 1 + shown], [1.05, 1.05], color=ARM_COLOURS[1], lw=1.6, marker="|", ms=7)
        axes.text(
            1, 1.3, f"critical difference {test.critical_difference:.2f}{note}", color=ARM_COLOURS[1], va="bottom"
        )
        axes.set_title(title, pad=10)
        axes.set_axis_off()
        axes.set_xlim(1 - room, last + room)
        axes.set_ylim(-depth - 0.6 * half, 2.0)
        return encode(figure)


def rank_probabilities(ranking: Ranking) -> Picture:
    """How often each arm got each rank, in percent of the resamples."""
    shares = np.array([arm.probabilities for arm in ranking.arms])
    size = len(ranking.arms)
    with drawing(min(PAGE_WIDTH, max(_HALF, 2.0 + 0.55 * size)), _LABELS * 0.62 + _ROW * size) as figure:
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="BuGn", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            text = {0: "", 1: "100"}.get(
                share, "<1" if share < 0.01 else ">99" if share > 0.99 else f"{100 * share:.0f}"
            )
            axes.text(
                column, row, text, ha="center", va="center", color="white" if share > _DARK else INK, fontsize=8.5
            )
        axes.set_xticks(range(size), [str(rank + 1) for rank in range(size)])
        _rows(axes, [arm.label for arm in ranking.arms])
        axes.grid(visible=False)
        axes.set_xlabel("rank")
        axes.set_title(f"{ranking.num_train} training cases")
        return encode(figure)


def pairs(ranking: Ranking) -> Picture:
    """Differences of mean Dice, row minus column; filled where they are decided."""
    labels = [arm.label for arm in ranking.arms]
    size = len(labels)
    width = min(PAGE_WIDTH, max(_HALF, 1.6 + 0.62 * size))
    font = min(8.0, 17 * (width - 1.6) / size)  # in points, so that six characters fit into a column
    with drawing(width, _LABELS * 0.9 + _ROW * size) as figure:
        axes = figure.add_subplot()
        axes.imshow(_pair_colours(ranking), aspect="auto")
        for row in range(size):
            for column in range(size):
                pair = ranking.pair(labels[row], labels[column])
                if row == column or pair is None or pair.row.difference is None:
                    continue
                value = pair.row.difference if pair.first == labels[row] else -pair.row.difference
                text = f"{value:+.3f}".replace("-", "\u2212")
                style: Any = {"color": INK, "weight": "bold"} if pair.decided else {"color": MUTED}
                axes.text(column, row, text, ha="center", va="center", fontsize=font, **style)
        axes.set_xticks(range(size), labels, rotation=35, ha="right")
        _rows(axes, labels)
        axes.grid(visible=False)
        axes.set_title(f"{ranking.num_train} training cases")
        return encode(figure)


def _pair_colours(ranking: Ranking) -> np.ndarray:
    """White where nothing is decided, teal where the row is better, amber where it is worse."""
    from matplotlib.colors import to_rgb

    labels = [arm.label for arm in ranking.arms]
    image = np.ones((len(labels), len(labels), 3))
    for place in range(len(labels)):
        image[place, place] = to_rgb(GRID)
    for pair in ranking.pairs:
        if pair.decided:
            better, worse = labels.index(pair.first), labels.index(pair.second)
            image[better, worse], image[worse, better] = to_rgb("#b7e0da"), to_rgb("#f5dcc0")
    return image


def probes(comparison: MethodComparison) -> Picture:
    """Dice of linear probes on frozen features: each method beside its sham run and its untrained network."""
    rows = [row for row in comparison.methods if row.trainer and not row.sham]
    shams = {row.trainer: row.probe for row in comparison.methods if row.sham}
    with drawing(0.72 * PAGE_WIDTH, _LABELS * 0.75 + 1.15 * _ROW * len(rows)) as figure:
        axes = figure.add_subplot()
        for (name, colour, marker), offset in zip(_PROBE_KINDS, (-0.22, 0.0, 0.22), strict=True):
            for place, row in enumerate(rows):
                untrained = comparison.method(row.scratch).probe
                scores = {"method": row.probe, "untrained": untrained}.get(name, shams.get(row.trainer, {}))
                values = list(scores.values())
                axes.scatter(
                    values, [place + offset] * len(values), s=14, color=colour, marker=marker, alpha=0.45, lw=0
                )
                if values:
                    axes.scatter([np.mean(values)], [place + offset], s=42, color=colour, marker=marker, lw=0)
            if name != "its sham run" or shams:
                axes.scatter([], [], s=36, color=colour, marker=marker, label=name)
        _rows(axes, [row.label for row in rows])
        axes.set_xlabel("mean foreground Dice of a linear probe")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return encode(figure)
