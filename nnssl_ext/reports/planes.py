"""The middle of an image in three planes, a row for everything that is to be seen on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnssl_ext.core.records import atomic_path
from nnssl_ext.imageio import Geometry
from nnssl_ext.reports.overlays import PLANES, Orientation, pixel_aspect, plane_size, planes
from nnssl_ext.reports.style import ARM_COLOURS, MUTED, PAGE_WIDTH, drawing, grid_of_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = (0.5, 99.5)
"""Percentiles of intensity that become black and white."""
HEAT = "inferno"
HEAT_PERCENTILES = (1.0, 99.5)
_ROW_HEIGHT = 2.6
_TITLE_HEIGHT = 0.3
"""In inches."""
_LINE_EVERY = 4
"""Voxels between the lines of a bent grid."""


@dataclass(frozen=True)
class Row:
    """What one row shows, on the voxels of one image."""

    name: str
    grey: NDArray[np.floating] | None = None
    """(Z, Y, X)."""
    colours: NDArray[np.uint8] | None = None
    """(Z, Y, X, 3); where it is black, the grey image shows."""
    heat: NDArray[np.floating] | None = None
    """(Z, Y, X), in colours from dark to bright; not finite is left clear."""
    bent: NDArray[np.floating] | None = None
    """(3, Z, Y, X): where each voxel is found, in voxels (z, y, x); drawn as a grid."""


def draw_planes(rows: Sequence[Row], geometry: Geometry, path: Path) -> None:
    """Writes a PNG with a column per plane, the head up.

    Args:
        rows: On the voxels of one image.
        geometry: Of the image.
        path: Of the PNG.
    """
    turn = Orientation.of(geometry)
    shape = next(array.shape[:3] for array in (rows[0].grey, rows[0].colours, rows[0].heat) if array is not None)
    turned = [shape[axis] for axis in turn.axes]
    across = planes(turned)
    extents = [size * step for size, step in zip(turned, turn.spacing, strict=True)]
    heights, widths = zip(*(plane_size(extents, plane) for plane in across), strict=True)
    inches = min(_ROW_HEIGHT / max(heights), PAGE_WIDTH / sum(widths))  # per mm, the same in all planes
    with drawing(inches * sum(widths), inches * max(heights) * len(rows) + _TITLE_HEIGHT) as figure:
        grid = grid_of_axes(figure, len(rows), len(across), width_ratios=widths)
        for row, line in zip(rows, grid, strict=True):
            for plane, axes in zip(across, line, strict=True):
                _show(axes, row, turn, plane)
            line[0].set_ylabel(row.name)
        for plane, axes in zip(across, grid[0], strict=True):
            axes.set_title(PLANES[plane], color=MUTED, fontweight="normal", loc="center")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def _show(axes: Axes, row: Row, turn: Orientation, plane: int) -> None:
    options: dict[str, Any] = {
        "aspect": pixel_aspect(turn.spacing, plane),
        "origin": "upper" if plane == 0 else "lower",  # the first axis of the other planes points to the head
    }
    if row.grey is not None:
        low, high = np.percentile(row.grey, WINDOW)
        axes.imshow(_middle(row.grey, turn, plane), cmap="gray", vmin=low, vmax=high, **options)
    if row.heat is not None:
        known = row.heat[np.isfinite(row.heat)]
        low, high = np.percentile(known, HEAT_PERCENTILES) if known.size else (0.0, 1.0)
        axes.imshow(_middle(row.heat, turn, plane), cmap=HEAT, vmin=low, vmax=high, **options)
    if row.colours is not None:
        pixels = np.stack([_middle(row.colours[..., part], turn, plane) for part in range(3)], axis=-1)
        clear = np.where(pixels.any(axis=-1, keepdims=True), np.uint8(255), np.uint8(0))
        axes.imshow(np.concatenate([pixels, clear], axis=-1), **options)
    if row.bent is not None:
        for axis in (axis for place, axis in enumerate(turn.axes) if place != plane):
            found = _middle(row.bent[axis], turn, plane)
            levels = np.arange(np.floor(found.min()), found.max(), _LINE_EVERY)
            axes.contour(found, levels=levels, colors=ARM_COLOURS[0], linewidths=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _middle(array: NDArray[Any], turn: Orientation, plane: int) -> NDArray[Any]:
    """The middle slice across an axis of the turned image."""
    turned = turn.array(array)
    return np.take(turned, turned.shape[plane] // 2, axis=plane)
