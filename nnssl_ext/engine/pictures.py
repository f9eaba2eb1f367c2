"""The two pictures of a run: what the network reconstructs, and how its numbers move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nnssl_ext.engine.panels import TEACHER, Records, default_style, draw_moments, draw_panel, moments, recorded, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = ("axial", "coronal", "sagittal")
WINDOW_PERCENTILES = (0.5, 99.5)
DPI = 110
GOLDEN_RATIO = 0.618034
"""Of the circle of hues lies between a label's colour and the next one's."""
CELL_INCHES = 2.4
BLUE, ORANGE, GREEN, RED, GREY = "#2c6fbb", "#d9822b", "#3a8a57", "#b8433f", "#6b7280"
COLUMNS = 3


def mid_slices(volume: npt.NDArray[Any], spacing: Sequence[float]) -> list[tuple[npt.NDArray[Any], float]]:
    """The middle slice of every plane.

    Args:
        volume: One channel, (Z, Y, X) or (Y, X).
        spacing: In mm, in the order of the axes.

    Returns:
        Per plane its pixels and the height of a pixel over its width: axial (Y, X), coronal (Z, X), sagittal (Z, Y); of
        a 2D image the image itself.
    """
    if volume.ndim == 2:
        return [(volume, spacing[0] / spacing[1])]
    slices = []
    for axis in range(3):
        rows, columns = (other for other in range(3) if other != axis)
        slices.append((volume.take(volume.shape[axis] // 2, axis=axis), spacing[rows] / spacing[columns]))
    return slices


@default_style()
def draw_reconstruction(images: Mapping[str, npt.NDArray[Any]], spacing: Sequence[float], title: str) -> Figure:
    """Mid-slices of one sample: a row per plane, a column per picture, all in the grey window of the first.

    Args:
        images: Name to (C, *patch); the first channel is drawn. Integers are labels: each has a colour, and 0 is black.
        spacing: In mm, in the order of the axes.
        title: Stands above.
    """
    from matplotlib.figure import Figure

    volumes = {name: np.asarray(image[0]) for name, image in images.items()}
    low, high = np.percentile(next(iter(volumes.values())), WINDOW_PERCENTILES)
    columns = {name: mid_slices(volume, spacing) for name, volume in volumes.items()}
    planes = next(iter(columns.values()))
    heights = [pixels.shape[0] * aspect / pixels.shape[1] for pixels, aspect in planes]
    size = (CELL_INCHES * len(columns), CELL_INCHES * sum(heights) + 0.7)
    figure = Figure(figsize=size, layout="constrained", facecolor="black")
    axes = figure.subplots(len(planes), len(columns), squeeze=False, height_ratios=heights)
    for column, (name, slices) in enumerate(columns.items()):
        axes[0, column].set_title(name, color="white", fontsize=10)
        for row, (pixels, aspect) in enumerate(slices):
            axis = axes[row, column]
            shades = label_colours(pixels) if np.issubdtype(pixels.dtype, np.integer) else pixels
            axis.imshow(
                shades, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest"
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if column == 0 and len(slices) == len(PLANES):
                axis.set_ylabel(PLANES[row], color="white", fontsize=9)
    figure.suptitle(title, color="white", fontsize=10)
    return figure


def label_colours(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A colour for each whole number, the same everywhere, neighbours unlike: (..., 3), in [0, 1]; black for 0."""
    hue = 6 * (labels * GOLDEN_RATIO % 1)[..., None]
    bright = np.where(labels[..., None] // 2 % 2, 1.0, 0.7)
    return np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * bright * (labels[..., None] != 0)


@default_style()
def draw_progress(metrics: Records, timing: Records, title: str, interventions: Records = ()) -> Figure:
    """Loss, learning rate, speed and every panel of features that the run has numbers for, over the epochs.

    Args:
        metrics: Records of `metrics.jsonl`.
        timing: Records of `timing.jsonl`.
        title: Stands above.
        interventions: Records of `interventions.jsonl`.
    """
    from matplotlib.figure import Figure

    panels = recorded(metrics)
    rows = -(-(3 + len(panels)) // COLUMNS)
    figure = Figure(figsize=(13, 3.5 * rows), layout="constrained", facecolor="white")
    loss, rate, speed, *others = figure.subplots(rows, COLUMNS, squeeze=False).flat
    _draw_loss(loss, metrics)
    _draw_rate(rate, metrics)
    _draw_speed(speed, timing)
    used, unused = others[: len(panels)], others[len(panels) :]
    for axis, (name, lines) in zip(used, panels.items(), strict=True):
        axis.set_title(name)
        draw_panel(axis, metrics, lines, (BLUE, ORANGE, GREEN))
    for axis in (loss, *used):
        draw_moments(axis, moments(metrics, interventions), RED)
    for axis in (loss, rate, speed, *used):
        _tidy(axis)
    for axis in unused:
        axis.remove()
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _line(axis: Axes, records: Records, name: str, label: str, color: str) -> None:
    epochs, values = series(records, name)
    if values:
        marker = "o" if len(values) == 1 else ""
        axis.plot(epochs, values, color=color, label=label, linewidth=1.6, marker=marker, markersize=4)


def _draw_loss(axis: Axes, metrics: Records) -> None:
    axis.set_title("Loss")
    _line(axis, metrics, "train_loss", "training", BLUE)
    _line(axis, metrics, "val_loss", "validation, held-out patients", ORANGE)
    epochs, values = series(metrics, "val_loss")
    if values and not any(TEACHER in record for record in metrics):
        best = int(np.argmin(values))
        axis.plot(epochs[best], values[best], "v", color=ORANGE, markersize=7, label=f"best {values[best]:.4g}")


def _draw_rate(axis: Axes, metrics: Records) -> None:
    axis.set_title("Learning rate and gradient norm")
    _line(axis, metrics, "lr", "learning rate", GREEN)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    epochs, norms = series(metrics, "train_gradient_norm")
    if norms:
        other = axis.twinx()
        other.plot(epochs, norms, color=GREY, linewidth=1.0)
        other.set_ylabel("gradient norm", color=GREY, fontsize=8)
        other.tick_params(axis="y", labelsize=8, colors=GREY)
        other.set_ylim(bottom=0)
        other.spines[["top", "left"]].set_visible(False)


def _draw_speed(axis: Axes, timing: Records) -> None:
    axis.set_title("Speed")
    _line(axis, timing, "steps_per_second", "steps per second", BLUE)
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    epochs, shares = series(timing, "data_wait_share")
    if shares:
        other = axis.twinx()
        other.fill_between(epochs, np.multiply(shares, 100), color=ORANGE, alpha=0.25, linewidth=0)
        other.set_ylim(0, 100)
        other.set_ylabel("waiting for data, % of time", color=ORANGE, fontsize=8)
        other.tick_params(axis="y", labelsize=8, colors=ORANGE)
        other.spines[["top", "left"]].set_visible(False)


def _tidy(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines["top"].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
