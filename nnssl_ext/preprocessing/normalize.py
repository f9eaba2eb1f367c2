"""Intensity normalisation by nnU-Net's own classes, channel by channel, and one scheme that is not nnU-Net's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nnssl_ext.preprocessing.crop import nonzero_mask

Float32 = npt.NDArray[np.float32]
PERCENTILE_SCHEME = "PercentileNormalization"
PERCENTILES = (0.5, 99.5)
"""Intensities of the case that become 0 and 1."""
CT_SCHEME = "CTNormalization"
CT_PROPERTIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
RGB_SCHEME = "RGBTo01Normalization"
RGB_MAX = 255


def normalize(
    data: Float32,
    schemes: Sequence[str],
    use_mask: Sequence[bool],
    intensity_properties: Mapping[str, Mapping[str, float]],
) -> Float32:
    """Normalises every channel in place.

    Args:
        data: (C, Z, Y, X), cropped to its non-zero box; overwritten.
        schemes: nnU-Net's class name per channel, or `PercentileNormalization`.
        use_mask: Per channel, whether its scheme looks at the non-zero region only.
        intensity_properties: Foreground statistics of the dataset by channel index as text.

    Raises:
        ValueError: If channels and schemes differ in number, a scheme is unknown, or its statistics are missing.
    """
    check_normalization(schemes, intensity_properties)
    if not len(data) == len(schemes) == len(use_mask):
        raise ValueError(f"the image has {len(data)} channels, the plan normalises {len(schemes)}")
    outside = np.where(nonzero_mask(data), np.int8(0), np.int8(-1)) if any(use_mask) else None
    for channel, (scheme, masked) in enumerate(zip(schemes, use_mask, strict=True)):
        if scheme == PERCENTILE_SCHEME:
            data[channel] = scale_by_percentiles(data[channel])
            continue
        if scheme == RGB_SCHEME and not (data[channel].min() >= 0 and data[channel].max() <= RGB_MAX):
            raise ValueError(f"{RGB_SCHEME} wants values from 0 to {RGB_MAX}; correct the plan's normalization_schemes")
        properties = dict(intensity_properties.get(str(channel), {}))
        normalizer = _schemes()[scheme](use_mask_for_norm=bool(masked), intensityproperties=properties)
        data[channel] = normalizer.run(data[channel], outside)
    return data


def scale_by_percentiles(image: Float32) -> Float32:
    """Maps the 0.5 and 99.5 percentiles of an image to 0 and 1 and clips what lies beyond.

    Args:
        image: (Z, Y, X).
    """
    low, high = np.percentile(image, PERCENTILES).astype(np.float32)
    return np.clip((image - low) / max(high - low, np.finfo(np.float32).eps), 0, 1)


def check_normalization(schemes: Sequence[str], intensity_properties: Mapping[str, Mapping[str, float]]) -> None:
    """Refuses schemes that nobody knows, or that lack the dataset's statistics.

    Raises:
        ValueError: With what is allowed or missing.
    """
    known = {*_schemes(), PERCENTILE_SCHEME}
    for channel, scheme in enumerate(schemes):
        if scheme not in known:
            raise ValueError(
                f"normalisation {scheme!r} of channel {channel} is unknown; allowed: {', '.join(sorted(known))}"
            )
        missing = set(CT_PROPERTIES) - set(intensity_properties.get(str(channel), {}))
        if scheme == CT_SCHEME and missing:
            raise ValueError(
                f"{CT_SCHEME} of channel {channel} needs {', '.join(sorted(missing))} in the plan's "
                "foreground_intensity_properties_per_channel; run nnssl_extract_fingerprint and nnssl_plan_experiment"
            )


def _schemes() -> dict[str, Any]:
    from nnunetv2.preprocessing.normalization import default_normalization_schemes as module

    base = module.ImageNormalization
    classes = {name: item for name, item in vars(module).items() if isinstance(item, type)}
    return {name: item for name, item in classes.items() if issubclass(item, base) and item is not base}
