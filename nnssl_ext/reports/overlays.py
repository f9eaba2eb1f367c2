"""Best, median and worst case: the image in three planes with the reference and what each arm predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nnssl_ext.core.paths import find_dataset
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.evaluation.analysis import tabulate
from nnssl_ext.evaluation.records import MEAN_CLASS, Evaluation, NumTrain
from nnssl_ext.evaluation.scoring import VALIDATION_FOLDER
from nnssl_ext.evaluation.statistics import mean_over_seeds
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.imageio import Geometry, read_image, read_segmentation
from nnssl_ext.reports.style import CLASS_COLOURS, MUTED, PAGE_WIDTH, Picture, drawing, encode, grid_of_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANES = ("axial", "coronal", "sagittal")
MAX_ARMS = 3
_MARGIN_MM = 12.0
_MARGIN_SHARE = 0.35
"""Surroundings shown on each side of the structures: at least so many mm, or this share of their extent."""
_WINDOW = (0.5, 99.5)
"""Percentiles of intensity that become black and white."""
_ROW_HEIGHT = 2.2
_TITLE_HEIGHT = 0.3
"""In inches."""
_FILL = 0.22


@dataclass(frozen=True)
class Ranked:
    """A case that is shown, and why."""

    rank: str
    """`best`, `median` or `worst`."""
    case: str
    dice: dict[str, float]
    """Mean foreground Dice over seeds, by arm."""


def rank_cases(evaluation: Evaluation, size: NumTrain) -> list[Ranked]:
    """The best, median and worst case by the mean Dice of the arms together, so that no arm is favoured."""
    tables = {arm: table for (arm, s), table in tabulate(evaluation.cases, "dice", MEAN_CLASS).items() if s == size}
    per_arm = {arm: mean_over_seeds(table.values) for arm, table in tables.items()}
    together = np.mean(list(per_arm.values()), axis=0)
    cases = next(iter(tables.values())).cases
    order = [int(i) for i in np.argsort(together) if np.isfinite(together[i])]
    if not order:
        return []
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    return [
        Ranked(rank, cases[i], {arm: float(values[i]) for arm, values in per_arm.items()}) for rank, i in chosen.items()
    ]


def missing_files(evaluation: Evaluation, size: NumTrain) -> str:
    """Why the cases cannot be drawn, or an empty text when they can."""
    try:
        find_dataset(evaluation.dataset, nnunet_root("raw"))
    except (FileNotFoundError, ValueError) as error:
        return f"The raw images are not here ({error})."
    folders = {Path(run.folder) for run in evaluation.runs if run.num_train == size}
    gone = sorted(str(folder) for folder in folders if not (folder / VALIDATION_FOLDER).is_dir())
    return f"The predictions are not here any more, such as {gone[0]}." if gone else ""


def draw_case(evaluation: Evaluation, ranked: Ranked, size: NumTrain) -> Picture:
    """One case: a column per plane, a row for the reference and for each arm."""
    manifest = Manifest.load(find_dataset(evaluation.dataset, nnunet_root("raw")))
    case = manifest.case(ranked.case)
    image, geometry = read_image(case.images)
    if case.label is None:
        raise ValueError(f"case {case.case_id} of {manifest.dataset_name} has no label file")
    turn = Orientation.of(geometry)
    rows = {"reference": turn.array(read_segmentation(case.label)[0])}
    for arm in [arm for arm in evaluation.arms if arm.name in ranked.dice][:MAX_ARMS]:
        file = _prediction_file(evaluation, arm.name, size, case.case_id, manifest.file_ending)
        rows[f"{arm.label}\nDice {ranked.dice[arm.name]:.3f}"] = turn.array(read_segmentation(file)[0])
    return _draw(turn.array(image[0]), turn.spacing, rows, evaluation.classes)


@dataclass(frozen=True)
class Orientation:
    """How to turn an array so that its axes run to the head, to the back and to the left, as pictures are read."""

    axes: tuple[int, int, int]
    """Array axes that become (z, y, x)."""
    flipped: tuple[int, ...]
    """Axes to be reversed after that."""
    spacing: tuple[float, float, float]
    """Voxel size in mm of the turned array."""

    @classmethod
    def of(cls, geometry: Geometry) -> Orientation:
        """The turn for an image; none for a 2D image or one without a direction."""
        z, y, x = geometry.spacing
        if len(geometry.direction) != 9:
            return cls((0, 1, 2), (), (z, y, x))
        cosines = np.reshape(geometry.direction, (3, 3))[
            ::-1, ::-1
        ]  # rows: z, y, x of the patient; columns: of the array
        order = [0, 1, 2]
        if sorted(np.abs(cosines).argmax(axis=1)) == order:
            order = [int(axis) for axis in np.abs(cosines).argmax(axis=1)]
        flipped = tuple(row for row, axis in enumerate(order) if cosines[row, axis] < 0)
        first, second, third = order
        return cls((first, second, third), flipped, tuple(geometry.spacing[axis] for axis in order))  # type: ignore[arg-type]

    def array(self, array: NDArray[Any]) -> NDArray[Any]:
        """A (Z, Y, X) array, turned."""
        return np.flip(np.transpose(array, self.axes), self.flipped)


def _prediction_file(evaluation: Evaluation, arm: str, size: NumTrain, case: str, ending: str) -> Path:
    """The prediction of the first seed."""
    runs = (run for run in evaluation.runs if (run.arm, run.num_train) == (arm, size) and case in run.val_cases)
    return Path(next(runs).folder) / VALIDATION_FOLDER / f"{case}{ending}"


def _draw(
    image: NDArray[np.floating],
    spacing: Sequence[float],
    rows: Mapping[str, NDArray[np.integer]],
    classes: Mapping[str, Sequence[int]],
) -> Picture:
    """A row per segmentation, the reference first, and a column per plane."""
    reference = next(iter(rows.values())) > 0
    box = region_of_interest(reference, spacing)
    window = tuple(float(value) for value in np.percentile(image, _WINDOW))
    cropped, slices, shown = image[box], widest_slices(reference[box]), planes(image.shape)
    extents = [size * step for size, step in zip(cropped.shape, spacing, strict=True)]
    ratios = [width / height for height, width in (plane_size(extents, plane) for plane in shown)]
    row_height = min(_ROW_HEIGHT, PAGE_WIDTH / sum(ratios))
    with drawing(row_height * sum(ratios), row_height * len(rows) + _TITLE_HEIGHT) as figure:
        axes = grid_of_axes(figure, len(rows), len(shown), width_ratios=ratios)
        for row, (name, labels) in enumerate(rows.items()):
            for column, plane in enumerate(shown):
                pixels = np.take(cropped, slices[plane], axis=plane)
                outlines = np.take(labels[box], slices[plane], axis=plane)
                _panel(axes[row][column], pixels, outlines, window, pixel_aspect(spacing, plane), plane, classes)
                if row == 0:
                    axes[row][column].set_title(PLANES[plane], color=MUTED, fontweight="normal", loc="center")
            axes[row][0].set_ylabel(name)
        return encode(figure)


def planes(shape: Sequence[int]) -> list[int]:
    """Axes to cut across: all three, or only the first for a 2D image."""
    return [0] if shape[0] == 1 else [0, 1, 2]


def plane_size(extents: Sequence[float], plane: int) -> tuple[float, float]:
    """Height and width in mm of the picture across an axis."""
    height, width = (extent for axis, extent in enumerate(extents) if axis != plane)
    return height, width


def pixel_aspect(spacing: Sequence[float], plane: int) -> float:
    """Height of a voxel over its width in the picture across an axis."""
    height, width = plane_size(spacing, plane)
    return height / width


def region_of_interest(mask: NDArray[np.bool_], spacing: Sequence[float]) -> tuple[slice, ...]:
    """The structures with some of what surrounds them; everything where there is no structure.

    Args:
        mask: Foreground of the reference, (Z, Y, X).
        spacing: Voxel size in mm, (z, y, x).
    """
    if not mask.any():
        return tuple(slice(0, size) for size in mask.shape)
    box = []
    for axis, positions in enumerate(np.nonzero(mask)):
        first, last = int(positions.min()), int(positions.max())
        margin = max(round(_MARGIN_MM / spacing[axis]), round(_MARGIN_SHARE * (last - first + 1)))
        box.append(slice(max(0, first - margin), min(mask.shape[axis], last + margin + 1)))
    return tuple(box)


def widest_slices(mask: NDArray[np.bool_]) -> list[int]:
    """Per axis the slice with the most foreground; the middle one where there is none."""
    slices = []
    for axis in range(mask.ndim):
        areas = mask.sum(axis=tuple(other for other in range(mask.ndim) if other != axis))
        slices.append(int(areas.argmax()) if areas.any() else mask.shape[axis] // 2)
    return slices


def _panel(
    axes: Axes,
    pixels: NDArray[np.floating],
    labels: NDArray[np.integer],
    window: Sequence[float],
    aspect: float,
    plane: int,
    classes: Mapping[str, Sequence[int]],
) -> None:
    origin: Literal["upper", "lower"] = (
        "upper" if plane == 0 else "lower"
    )  # the first axis of the other planes points to the head
    axes.imshow(
        pixels, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect, origin=origin, interpolation="bilinear"
    )
    for index, values in enumerate(classes.values()):
        mask = np.isin(labels, list(values)).astype(float)
        if mask.any():
            colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
            axes.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=_FILL)
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
