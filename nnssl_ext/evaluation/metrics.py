"""Whole-volume segmentation metrics of one case: Dice, normalised surface Dice and the 95% Hausdorff distance.

Foreground classes only. A surface voxel is a voxel of the mask with a face neighbour outside the mask or outside the
image; distances run between voxel centres in mm. Both are the conventions of MONAI (without sub-voxels), so the numbers
agree with `compute_surface_dice` and `compute_hausdorff_distance`; Dice is nnU-Net's.

Empty masks:
    - reference and prediction both empty: Dice 1, NSD 1, HD95 0, as to say that there is nothing is right (as BraTS
      counts; nnU-Net's summary leaves such a case out, of one arm and not of another that predicts something there);
    - one of them empty: Dice 0, NSD 0, and HD95 is the diagonal of the volume, the worst that could happen in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

HAUSDORFF_PERCENTILE = 95.0
DEFAULT_TOLERANCE_MM = 1.0
METRICS = ("dice", "nsd", "hd95")
METRICS_VERSION = 2
"""Of what the metrics mean; scores of another one are computed again. 2: correctly empty counts as best."""
HIGHER_IS_BETTER = {"dice": True, "nsd": True, "hd95": False}


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Scores of one class in one case; `None` where one is not known."""

    dice: float | None
    """Twice the overlap over the sum of both volumes, 0 to 1."""
    nsd: float | None
    """Share of both surfaces that lies within the tolerance of the other one, 0 to 1."""
    hd95: float | None
    """The larger of the two directed 95th percentiles of surface distance, in mm."""
    reference_voxels: int
    predicted_voxels: int

    def metric(self, name: str) -> float | None:
        """One of `METRICS` by name."""
        value: float | None = getattr(self, name)
        return value


def score_case(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    ignore_label: int | None = None,
) -> dict[str, ClassScores]:
    """Scores every class of one case on the whole volume.

    Args:
        reference: Label map, (Z, Y, X). An axis of length 1 is dropped, so a 2D image gets 2D surfaces.
        prediction: Label map of the same shape.
        spacing: Voxel size in mm, in the order of the axes.
        classes: Class name to its label values; several values make a region, as in nnU-Net.
        tolerance_mm: Distance within which two surfaces count as agreeing.
        ignore_label: Reference voxels of this value count for nothing.

    Raises:
        ValueError: If the shapes differ, a class is the background, or the tolerance is negative.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"reference {reference.shape} and prediction {prediction.shape} have different shapes")
    if len(spacing) != reference.ndim:
        raise ValueError(f"spacing {tuple(spacing)} does not have one entry per axis of {reference.shape}")
    if tolerance_mm < 0:
        raise ValueError(f"a surface tolerance of {tolerance_mm} mm is not possible; give 0 or more")
    background = [name for name, values in classes.items() if 0 in values]
    if background:
        raise ValueError(f"class {background[0]!r} contains the background (0), which is never scored")
    keep = None if ignore_label is None else reference != ignore_label
    scores = {}
    for name, values in classes.items():
        masks = [np.isin(labels, list(values)) for labels in (reference, prediction)]
        if keep is not None:
            masks = [mask & keep for mask in masks]
        scores[name] = score_masks(masks[0], masks[1], spacing, tolerance_mm)
    return scores


def score_masks(reference: Mask, prediction: Mask, spacing: Sequence[float], tolerance_mm: float) -> ClassScores:
    """Scores one pair of binary masks of equal shape; see `score_case`."""
    sizes = {"reference_voxels": int(reference.sum()), "predicted_voxels": int(prediction.sum())}
    if not any(sizes.values()):
        return ClassScores(dice=1.0, nsd=1.0, hd95=0.0, **sizes)
    if not all(sizes.values()):
        return ClassScores(dice=0.0, nsd=0.0, hd95=_diagonal(reference.shape, spacing), **sizes)
    to_prediction, to_reference = surface_distances(reference, prediction, spacing)
    return ClassScores(
        dice=2.0 * int((reference & prediction).sum()) / sum(sizes.values()),
        nsd=_surface_dice(to_prediction, to_reference, tolerance_mm),
        hd95=float(max(np.percentile(d, HAUSDORFF_PERCENTILE) for d in (to_prediction, to_reference))),
        **sizes,
    )


def surface_distances(
    first: Mask, second: Mask, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance in mm from each surface voxel of one mask to the nearest surface voxel of the other, both ways.

    Both masks must have voxels. The work is done in the bounding box of their union, which is exact.
    """
    from scipy.ndimage import distance_transform_edt

    axes = [axis for axis, size in enumerate(first.shape) if size > 1] or [0]
    sampling = [float(spacing[axis]) for axis in axes]
    dropped = tuple(axis for axis in range(first.ndim) if axis not in axes)
    first, second = np.squeeze(first, dropped), np.squeeze(second, dropped)
    box = _bounding_box(first | second)
    first_surface, second_surface = _surface(first[box]), _surface(second[box])
    from_first = distance_transform_edt(~second_surface, sampling=sampling)[first_surface]
    from_second = distance_transform_edt(~first_surface, sampling=sampling)[second_surface]
    return from_first, from_second


def _surface(mask: Mask) -> Mask:
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask)


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    positions = np.nonzero(mask)
    return tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in positions)


def _surface_dice(first: NDArray[np.float64], second: NDArray[np.float64], tolerance_mm: float) -> float:
    within = int((first <= tolerance_mm).sum()) + int((second <= tolerance_mm).sum())
    return within / (len(first) + len(second))


def _diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    extents = [(size - 1) * float(step) for size, step in zip(shape, spacing, strict=True)]
    return float(np.linalg.norm(extents))
