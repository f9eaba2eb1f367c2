"""Which voxel size to resample to, in which order to store the axes, and what shape that gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPACING_RULES = ("iso", "median", "noresample")
ANISOTROPY_THRESHOLD = 3.0
ANISOTROPIC_PERCENTILE = 10
MAX_SPACING = 100.0
_NO_SPACING = (
    "spacing {} is not possible: give three numbers in mm (z y x; two for 2D data), each above 0 and at most "
    f"{MAX_SPACING:g}, for example: -spacing 1.5 1.5 1.5"
)
DIGITS = 6


def is_two_dimensional(shapes: ArrayLike) -> bool:
    """Whether the typical case is one slice.

    Args:
        shapes: (cases, 3) in (z, y, x).
    """
    return float(np.median(np.asarray(shapes)[:, 0])) == 1


def target_spacing(rule: str | Sequence[float], spacings: ArrayLike, shapes: ArrayLike) -> tuple[float, float, float]:
    """The voxel size that all cases are resampled to.

    - `iso`: cubes of the dataset's median voxel volume (squares of the median pixel area for 2D data);
    - `median`: nnU-Net's rule: the median of each axis; where one axis is over three times as coarse as the others and
      has less than a third of their voxels, the 10th percentile of that axis;
    - `noresample`: voxels stay as they are; the median is only what the network's topology is based on;
    - three numbers (two for 2D data): taken as they are.

    Args:
        rule: A name, or numbers in mm in (z, y, x).
        spacings: (cases, 3) in mm, in (z, y, x).
        shapes: (cases, 3) voxels after cropping.

    Returns:
        Three numbers in mm; for 2D data the first is the median of the slice distance.

    Raises:
        ValueError: If the rule is unknown or the numbers make no voxel.
    """
    check_spacing_rule(rule)
    spacings, flat = np.asarray(spacings, dtype=float), is_two_dimensional(shapes)
    if not isinstance(rule, str):
        spacing = _explicit(rule, flat, float(np.median(spacings[:, 0])))
    elif rule == "iso":
        axes = (1, 2) if flat else (0, 1, 2)
        edge = float(np.median(np.prod(spacings[:, axes], axis=1))) ** (1 / len(axes))
        spacing = np.where(np.isin(np.arange(3), axes), edge, np.median(spacings, axis=0))
    elif rule == "median":
        spacing = _nnunet_spacing(spacings, np.asarray(shapes))
    else:
        spacing = np.median(spacings, axis=0)
    z, y, x = (round(float(value), DIGITS) for value in spacing)
    return z, y, x


def check_spacing_rule(rule: str | Sequence[float]) -> None:
    """Refuses what is a spacing of no data at all.

    Raises:
        ValueError: If the rule is unknown or the numbers make no voxel.
    """
    if isinstance(rule, str):
        if rule not in SPACING_RULES:
            raise ValueError(f"spacing rule {rule!r} is not known. Give {', '.join(SPACING_RULES)} or numbers in mm")
    elif len(rule) not in (2, 3) or not all(0 < value <= MAX_SPACING for value in rule):
        raise ValueError(_NO_SPACING.format(list(rule)))


def _explicit(values: Sequence[float], flat: bool, slice_distance: float) -> NDArray[np.floating]:
    if len(values) == 2 and flat:
        values = (slice_distance, *values)
    elif len(values) != 3:
        raise ValueError(_NO_SPACING.format(list(values)))
    return np.asarray(values, dtype=float)


def _nnunet_spacing(spacings: NDArray[np.floating], shapes: NDArray[np.integer]) -> NDArray[np.floating]:
    target = np.median(spacings, axis=0)
    median_shape = np.median(shapes, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    coarsest_other = float(target[others].max())
    thick = target[coarse] > ANISOTROPY_THRESHOLD * coarsest_other
    few = median_shape[coarse] * ANISOTROPY_THRESHOLD < median_shape[others].min()
    if thick and few:
        finer = float(np.percentile(spacings[:, coarse], ANISOTROPIC_PERCENTILE))
        target[coarse] = max(finer, coarsest_other + 1e-5)
    return target


def transposition(spacing: Sequence[float]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Order of the stored axes, the coarsest first as nnU-Net has it, and the order that undoes it.

    Args:
        spacing: Three numbers in mm, in (z, y, x).
    """
    coarse = int(np.argmax(spacing))
    first, second = (axis for axis in range(3) if axis != coarse)
    forward = (coarse, first, second)
    return forward, (forward.index(0), forward.index(1), forward.index(2))


def resampled_shapes(shapes: ArrayLike, spacings: ArrayLike, spacing: Sequence[float]) -> NDArray[np.int64]:
    """The shape of each case after resampling, rounded as nnU-Net does.

    Args:
        shapes: (cases, 3) voxels.
        spacings: (cases, 3) mm.
        spacing: The target in mm.

    Returns:
        (cases, 3) voxels, at least 1 each.
    """
    exact = np.asarray(shapes) * np.asarray(spacings, dtype=float) / np.asarray(spacing, dtype=float)
    return np.maximum(1, np.rint(exact).astype(np.int64))


def resampling_keys(kept: bool) -> dict[str, Any]:
    """nnU-Net's keys for resampling images, labels and probabilities: its own defaults.

    Args:
        kept: Whether voxels stay as they are.
    """
    common = {"order_z": 0, "force_separate_z": None}
    arguments = {
        "data": {"is_seg": False, "order": 3, **common},
        "seg": {"is_seg": True, "order": 1, **common},
        "probabilities": {"is_seg": False, "order": 1, **common},
    }
    keys: dict[str, Any] = {}
    for kind, values in arguments.items():
        keys[f"resampling_fn_{kind}"] = "no_resampling_hack" if kept else "resample_data_or_seg_to_shape"
        keys[f"resampling_fn_{kind}_kwargs"] = {} if kept else values
    return keys
