"""The figures of an evaluation, each as a picture: data efficiency, folds, paired cases, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnssl_ext.evaluation.analysis import tabulate
from nnssl_ext.evaluation.convergence import tail_length
from nnssl_ext.evaluation.records import MEAN_CLASS, Arm, Evaluation, NumTrain
from nnssl_ext.evaluation.statistics import mean_over_seeds
from nnssl_ext.evaluation.verdict import HEADLINE_METRIC, size_text
from nnssl_ext.reports.style import (
    GRID,
    INK,
    MUTED,
    PAGE_WIDTH,
    Picture,
    arm_colours,
    drawing,
    encode,
    grid_of_axes,
    integer_ticks,
    legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPREAD = 0.1
"""Distance between two arms at one tick, in ticks."""
_MAX_SPREAD = 0.7
"""Of all arms at one tick."""
_SEED_SHIFT = 0.025
_PANEL = PAGE_WIDTH / 3
"""Width of one panel, in inches."""
_MAX_PANELS = 3
_NUM_TICKS = 5


def _width(sizes: Sequence[NumTrain]) -> float:
    return PAGE_WIDTH if len(sizes) > 1 else PAGE_WIDTH / 2


def _pairs_of_axes(figure: Figure, num_sizes: int, ratios: Sequence[float]) -> list[tuple[Axes, Axes]]:
    """Two panels for each size, one above the other; for a single size side by side."""
    if num_sizes == 1:
        ((left, right),) = grid_of_axes(figure, 1, 2)
        return [(left, right)]
    upper, lower = grid_of_axes(figure, 2, num_sizes, height_ratios=ratios)
    return list(zip(upper, lower, strict=True))


def _panel_size(num_sizes: int, height: float) -> tuple[float, float]:
    """Width and height in inches of a figure of pairs; `height` counts panels."""
    return (2 * _PANEL, 1.05 * _PANEL) if num_sizes == 1 else (num_sizes * _PANEL, height * _PANEL)


def data_efficiency(evaluation: Evaluation) -> Picture:
    """Mean score against the number of training cases, with intervals and one small dot per seed."""
    sizes, colours = list(evaluation.num_train), arm_colours(evaluation.arms)
    gap = min(_SPREAD, _MAX_SPREAD / len(evaluation.arms))
    with drawing(_width(sizes), 4.1) as figure:
        axes = figure.add_subplot()
        for index, arm in enumerate(evaluation.arms):
            offset = (index - (len(evaluation.arms) - 1) / 2) * gap
            _efficiency_line(axes, evaluation, arm, offset, colours[arm.name])
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xlabel("training cases per fold")
        axes.set_ylabel(f"mean foreground {metric_label(HEADLINE_METRIC)}")
        axes.grid(visible=False, axis="x")
        legend(figure, axes, "best")
        return encode(figure)


def _efficiency_line(axes: Axes, evaluation: Evaluation, arm: Arm, offset: float, colour: str) -> None:
    xs, ys, lows, highs = [], [], [], []
    for position, size in enumerate(evaluation.num_train):
        row = evaluation.summary(arm.name, size, HEADLINE_METRIC)
        if row is None or row.mean is None:
            continue
        low, high = (row.interval.low, row.interval.high) if row.interval else (row.mean, row.mean)
        xs.append(position + offset)
        ys.append(row.mean)
        lows.append(max(0.0, row.mean - low))
        highs.append(max(0.0, high - row.mean))
        seeds = list(row.seed_means.values()) if len(row.seed_means) > 1 else []
        axes.scatter(
            [position + offset + _SEED_SHIFT] * len(seeds), seeds, s=9, color=colour, alpha=0.45, linewidths=0, zorder=3
        )
    style = "--" if arm.role == "plain" else "-"
    axes.errorbar(
        xs, ys, [lows, highs], fmt="o" + style, color=colour, ms=5.5, capsize=3, elinewidth=1.2, label=arm.label
    )


def fold_spread(evaluation: Evaluation) -> Picture:
    """Mean of each fold as a dot, the mean over cases as a bar, for every arm and size."""
    colours = arm_colours(evaluation.arms)
    gap = min(1.6 * _SPREAD, _MAX_SPREAD / len(evaluation.arms))
    with drawing(_width(evaluation.num_train), 3.2) as figure:
        axes = figure.add_subplot()
        for index, arm in enumerate(evaluation.arms):
            offset = (index - (len(evaluation.arms) - 1) / 2) * gap
            for position, size in enumerate(evaluation.num_train):
                row = evaluation.summary(arm.name, size, HEADLINE_METRIC)
                if row is None or row.mean is None:
                    continue
                x, folds = position + offset, list(row.fold_means.values())
                axes.plot([x, x], [min(folds), max(folds)], color=colours[arm.name], lw=1, alpha=0.5)
                axes.scatter([x] * len(folds), folds, s=22, color=colours[arm.name], alpha=0.75, linewidths=0)
                axes.plot([x - gap * 0.375, x + gap * 0.375], [row.mean] * 2, color=colours[arm.name], lw=2.4)
            axes.scatter([], [], s=22, color=colours[arm.name], label=arm.label)
        axes.set_xticks(range(len(evaluation.num_train)), [str(size) for size in evaluation.num_train])
        axes.set_xlim(-0.5, len(evaluation.num_train) - 0.5)
        axes.set_xlabel("training cases per fold")
        axes.set_ylabel(f"mean {metric_label(HEADLINE_METRIC)} of a fold")
        axes.grid(visible=False, axis="x")
        legend(figure, axes, "best")
        return encode(figure)


def rows_of(sizes: Sequence[NumTrain]) -> list[Sequence[NumTrain]]:
    """Sizes in groups of as many as have room beside one another."""
    return [sizes[start : start + _MAX_PANELS] for start in range(0, len(sizes), _MAX_PANELS)]


def paired_cases(evaluation: Evaluation, arm: str, sizes: Sequence[NumTrain]) -> Picture:
    """Every case once per size: an arm's baseline against it, and the sorted differences beneath."""
    tables = tabulate(evaluation.cases, HEADLINE_METRIC, MEAN_CLASS)
    reference = evaluation.baseline(arm)
    colour = arm_colours(evaluation.arms)[arm]
    with drawing(*_panel_size(len(sizes), 1.75)) as figure:
        pairs = _pairs_of_axes(figure, len(sizes), [1.55, 1])
        for size, (scatter, bars) in zip(sizes, pairs, strict=True):
            base = mean_over_seeds(tables[reference.name, size].values)
            own = mean_over_seeds(tables[arm, size].values)
            known = np.isfinite(base) & np.isfinite(own)
            _scatter(scatter, base[known], own[known], colour)
            _differences(bars, own[known] - base[known], colour)
            scatter.set_title(size_text(size))
            scatter.set_xlabel(f"{reference.label}, {metric_label(HEADLINE_METRIC)}")
            bars.set_xlabel("cases, sorted")
        _share_height([bars for _, bars in pairs])
        pairs[0][0].set_ylabel(f"{evaluation.arm(arm).label}, {metric_label(HEADLINE_METRIC)}")
        pairs[0][1].set_ylabel("difference")
        return encode(figure)


def _scatter(axes: Axes, base: np.ndarray, own: np.ndarray, colour: str) -> None:
    both = np.concatenate([base, own])
    margin = 0.05 * max(float(np.ptp(both)), 0.02) if len(both) else 0.05
    low, high = (float(both.min()) - margin, float(both.max()) + margin) if len(both) else (0.0, 1.0)
    axes.plot([low, high], [low, high], color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.scatter(base, own, s=20, color=colour, alpha=0.7, linewidths=0)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.locator_params(nbins=_NUM_TICKS)
    axes.set_aspect("equal")


def _differences(axes: Axes, differences: np.ndarray, colour: str) -> None:
    ordered = np.sort(differences)
    axes.bar(np.arange(len(ordered)), ordered, width=0.9, color=np.where(ordered >= 0, colour, MUTED))
    axes.axhline(0, color=INK, lw=0.8)
    if len(ordered):
        axes.axhline(float(ordered.mean()), color=colour, lw=1.2, ls=(0, (4, 3)))
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")


def learning_curves(evaluation: Evaluation, sizes: Sequence[NumTrain]) -> Picture:
    """Validation Dice and loss per epoch: the mean over an arm's runs, their range shaded, the judged tail in grey."""
    colours = arm_colours(evaluation.arms)
    with drawing(*_panel_size(len(sizes), 1.45)) as figure:
        pairs = _pairs_of_axes(figure, len(sizes), [1, 1])
        for size, (dice, loss) in zip(sizes, pairs, strict=True):
            curves = [run.curve for run in evaluation.runs if run.num_train == size]
            for axes in (dice, loss):
                _mark_tail(axes, max(len(curve.val_loss) for curve in curves))
            for arm in evaluation.arms:
                runs = [run for run in evaluation.runs if (run.arm, run.num_train) == (arm.name, size)]
                _curve(dice, [run.curve.dice for run in runs], colours[arm.name], arm.label)
                _curve(loss, [run.curve.val_loss for run in runs], colours[arm.name], arm.label)
            dice.set_title(size_text(size))
            for axes in (dice, loss) if len(sizes) == 1 else (loss,):
                axes.set_xlabel("epoch")
        for panels in zip(*pairs, strict=True):
            _share_height(panels)
        pairs[0][0].set_ylabel("validation Dice (patches)")
        pairs[0][1].set_ylabel("validation loss")
        legend(figure, pairs[-1][0], "lower right")
        return encode(figure)


def _share_height(panels: Sequence[Axes]) -> None:
    """Gives panels that stand beside one another the same vertical axis, so that they can be compared."""
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _curve(axes: Axes, curves: Sequence[Sequence[float | None]], colour: str, label: str) -> None:
    columns = [[value for value in values if value is not None] for values in zip(*curves, strict=False)]
    points = [(epoch, values) for epoch, values in enumerate(columns, start=1) if values]
    if not points:
        return
    epochs = [epoch for epoch, _ in points]
    axes.fill_between(epochs, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.13, lw=0)
    axes.plot(epochs, [sum(v) / len(v) for _, v in points], color=colour, label=label)


def _mark_tail(axes: Axes, num_epochs: int) -> None:
    if num_epochs:
        integer_ticks(axes)
        start = max(0, num_epochs - tail_length(num_epochs))
        axes.axvspan(start + 1, num_epochs, color=GRID, alpha=0.5, lw=0, zorder=0)


def metric_label(metric: str) -> str:
    """A metric's name as it is written in the report."""
    return {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 (mm)"}[metric]
