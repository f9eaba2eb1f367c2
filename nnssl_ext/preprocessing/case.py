"""What happens to one image: transpose, crop, normalise, resample, in nnU-Net's order and with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnssl_ext.fingerprint.foreground import foreground_mask, nonzero_box
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.preprocessing.crop import crop_to_box
from nnssl_ext.preprocessing.normalize import normalize
from nnssl_ext.preprocessing.resample import NO_RESAMPLING_FUNCTION, new_shape, resample, resize_nearest


@dataclass(frozen=True)
class PreprocessedArray:
    """A volume ready to be stored."""

    data: npt.NDArray[np.float32]
    """(C, Z, Y, X), axes in the plan's order."""
    foreground: npt.NDArray[np.bool_]
    """(Z, Y, X): where some channel shows something, by the rule of the fingerprint, and was not altered."""
    spacing: tuple[float, ...]
    """In mm, (Z, Y, X), of `data`."""
    properties: dict[str, Any]
    """nnU-Net's names for the original spacing, the crop and the shapes, as JSON builtins."""
    altered: npt.NDArray[np.bool_] | None = None
    """(Z, Y, X): what was altered to make the subject unrecognisable; None where nothing is known to be."""


def preprocess_array(
    data: npt.NDArray[np.floating],
    spacing: Sequence[float],
    plan: Plan,
    configuration: Configuration,
    device: str = "cpu",
    altered: npt.NDArray[np.bool_] | None = None,
) -> PreprocessedArray:
    """Transposes, crops to non-zero, normalises and resamples an image as nnU-Net's `DefaultPreprocessor` does.

    Args:
        data: Raw intensities (C, Z, Y, X), finite; not changed.
        spacing: In mm, (Z, Y, X).
        plan: Gives the foreground statistics of the dataset.
        configuration: Gives axes, spacing, normalisation and resampling.
        device: Where images are resampled; see `resample`.
        altered: (Z, Y, X), the anonymisation mask. It does not change the intensities, which stay nnU-Net's.

    Raises:
        ValueError: If the image is zero everywhere, has a voxel that is not finite, does not fit the plan, or differs
            in shape from its anonymisation mask.
    """
    check_finite(data)
    if altered is not None and altered.shape != data.shape[1:]:
        raise ValueError(f"the anonymisation mask has shape {altered.shape}, the image {data.shape[1:]}")
    axes = configuration.transpose_forward
    foreground = np.any([foreground_mask(channel) for channel in data], axis=0).transpose(axes)
    data = np.transpose(np.asarray(data, dtype=np.float32), (0, *(axis + 1 for axis in axes)))
    old_spacing = tuple(float(spacing[axis]) for axis in axes)
    box = nonzero_box(data)
    cropped = crop_to_box(data, box)
    if not cropped.any():
        raise ValueError("the image is zero everywhere; remove the case from the dataset")
    target, shape = _target(cropped.shape[1:], old_spacing, configuration)
    resampled = resample(
        _normalized(cropped, plan, configuration),
        shape,
        old_spacing,
        target,
        configuration.resampling_fn_data,
        device=device,
        **configuration.resampling_fn_data_kwargs,
    )
    properties = {
        "spacing": [float(edge) for edge in spacing],
        "shape_before_cropping": list(data.shape[1:]),
        "bbox_used_for_cropping": [list(side) for side in box],
        "shape_after_cropping_and_before_resampling": list(cropped.shape[1:]),
    }
    inside = tuple(slice(*side) for side in box)
    foreground = resize_nearest(foreground[inside], shape)
    if altered is not None:
        altered = resize_nearest(altered.transpose(axes)[inside], shape)
        foreground = foreground & ~altered
    return PreprocessedArray(resampled, foreground, target, properties, altered)


def _normalized(data: npt.NDArray[np.float32], plan: Plan, configuration: Configuration) -> npt.NDArray[np.float32]:
    schemes, use_mask = configuration.normalization_schemes, configuration.use_mask_for_norm
    return normalize(data, schemes, use_mask, plan.foreground_intensity_properties)


def _target(
    shape: Sequence[int], spacing: tuple[float, ...], configuration: Configuration
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Spacing and shape after resampling; a 2D configuration leaves the distance of slices alone."""
    if configuration.resampling_fn_data == NO_RESAMPLING_FUNCTION:
        return spacing, tuple(shape)
    target = (spacing[0], *configuration.spacing) if len(configuration.spacing) < len(shape) else configuration.spacing
    return target, new_shape(shape, spacing, target)


def check_finite(data: npt.NDArray[np.floating]) -> None:
    """Refuses an image with NaN or infinity.

    Raises:
        ValueError: With the channel and the number of such voxels.
    """
    for number, channel in enumerate(data):
        if not np.isfinite([channel.min(), channel.max()]).all():
            count = int(np.count_nonzero(~np.isfinite(channel)))
            raise ValueError(
                f"channel {number} has {count} voxels that are NaN or infinite; repair or remove the image"
            )
