"""One look for all figures: colours of arms, fonts, and pictures embedded as text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nnssl_ext.engine.panels import default_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nnssl_ext.evaluation.records import Arm

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
REFERENCE_COLOUR = "#52606d"
ALARM_COLOUR = "#b91c1c"
ARM_COLOURS = ("#0f766e", "#b45309", "#4338ca", "#be185d", "#4d7c0f", "#0369a1")
"""Distinguishable in the common forms of colour blindness when taken in order."""
CLASS_COLOURS = ("#f59e0b", "#06b6d4", "#e11d48", "#84cc16", "#8b5cf6", "#f97316", "#14b8a6", "#ec4899")
DPI = 144
CSS_PIXELS_PER_INCH = 96
PAGE_WIDTH = 9.9
"""Width of the report's text in inches; figures are shown at their own size, so their letters stay alike."""
_MAX_WITHIN = 6
"""Most names for which a panel has room."""
_LEGEND_COLUMN, _LEGEND_ROW = 1.8, 0.2
"""Width and height of a name beneath the panels, in inches."""
_RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}


def arm_colours(arms: Sequence[Arm]) -> dict[str, str]:
    """Colour of each arm by name: the reference is grey, the others take the palette in turn."""
    others = [arm.name for arm in arms if arm.role != "reference"]
    colours = {name: ARM_COLOURS[i % len(ARM_COLOURS)] for i, name in enumerate(others)}
    return {arm.name: colours.get(arm.name, REFERENCE_COLOUR) for arm in arms}


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    uri: str
    """PNG as a data URI."""
    width: int | None = None
    """Width on the page in CSS pixels; None: the image's own, as far as the page is wide."""


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of the given size in inches, with the house style in force while it is drawn.

    It is drawn by Agg and belongs to no window, so it works without a display and needs no closing.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with default_style(), matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def grid_of_axes(figure: Figure, rows: int, columns: int, **options: Any) -> list[list[Axes]]:
    """A grid of axes that is a list of rows also when it has a single one."""
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return [list(row) for row in axes]


def legend(figure: Figure, axes: Axes, loc: Literal["best", "lower right"]) -> None:
    """Names of lines: within the panel, or beneath all panels where they are many, for which the figure grows."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= _MAX_WITHIN:
        axes.legend(loc=loc)
        return
    columns = max(1, int(figure.get_figwidth() / _LEGEND_COLUMN))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def integer_ticks(axes: Axes) -> None:
    """Whole numbers along the horizontal axis, and few enough of them on both for a small panel."""
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=6)


def encode(figure: Figure) -> Picture:
    """A figure as a picture of its own size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(data_uri(buffer.getvalue()), round(figure.get_figwidth() * CSS_PIXELS_PER_INCH))


def data_uri(content: bytes) -> str:
    """The bytes of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
