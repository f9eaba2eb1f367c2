"""Intensity statistics of a case's foreground, and of a dataset from those of its cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnssl_ext.fingerprint.record import IntensityStatistics

QUANTILE_LEVELS = np.concatenate([np.linspace(0, 0.02, 21), np.linspace(0.03, 0.97, 48), np.linspace(0.98, 1, 21)])
"""Where a case's distribution is recorded: densely at the tails, since CT normalisation clips at .5 and 99.5%."""

PERCENTILES = (0.5, 50.0, 99.5)
MAX_SORTED = 1 << 20
MAX_POOLED = 10_000_000
MAX_POOLED_PER_CASE = 1000


def intensity_statistics(values: NDArray[np.floating]) -> IntensityStatistics | None:
    """Statistics of one channel of one case; percentiles from every n-th voxel of a large one.

    Args:
        values: (voxels,) of the foreground.

    Returns:
        None where there is no voxel.
    """
    if not values.size:
        return None
    low, median, high = np.percentile(_thinned(values), PERCENTILES)
    return IntensityStatistics(
        mean=float(values.mean(dtype=np.float64)),
        median=float(median),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
        percentile_99_5=float(high),
        percentile_00_5=float(low),
    )


def intensity_quantiles(values: NDArray[np.floating]) -> tuple[float, ...]:
    """The distribution of one channel of one case: its quantiles at `QUANTILE_LEVELS`; empty without voxels."""
    return tuple(np.quantile(_thinned(values), QUANTILE_LEVELS).tolist()) if values.size else ()


def _thinned(values: NDArray[np.floating]) -> NDArray[np.floating]:
    return values[:: -(-values.size // MAX_SORTED)]


def pool_statistics(cases: Sequence[IntensityStatistics], quantiles: Sequence[Sequence[float]]) -> IntensityStatistics:
    """Statistics of one channel over a dataset. Each case weighs the same, as in nnU-Net, which samples each alike.

    Args:
        cases: Of the cases that have foreground.
        quantiles: Of the same cases, at `QUANTILE_LEVELS`.

    Raises:
        ValueError: If there is no case.
    """
    if not cases:
        raise ValueError("no case has foreground in some channel: every image of it is constant. Look at the images")
    per_case = int(np.clip(MAX_POOLED // len(cases), len(QUANTILE_LEVELS), MAX_POOLED_PER_CASE))
    levels = (np.arange(per_case) + 0.5) / per_case
    pooled = np.concatenate([np.interp(levels, QUANTILE_LEVELS, values) for values in quantiles])
    low, median, high = np.percentile(pooled, PERCENTILES, method="hazen")  # the i-th of n lies at (i + .5) / n
    means, deviations = np.array([case.mean for case in cases]), np.array([case.std for case in cases])
    return IntensityStatistics(
        mean=float(means.mean()),
        median=float(median),
        std=float(np.sqrt(np.mean(deviations**2) + means.var())),
        min=min(case.min for case in cases),
        max=max(case.max for case in cases),
        percentile_99_5=float(high),
        percentile_00_5=float(low),
    )
