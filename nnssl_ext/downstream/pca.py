"""Principal components of dense features, of several images together, and colours made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.downstream.features import FeatureMap

COLOUR_CELLS = 1 << 18
"""Cells of an image, spread evenly over those that count, whose percentiles are taken; bounds the memory."""
COLOUR_PERCENTILES = (1.0, 99.0)
"""Of each component over all cells that count: they become no and full red, green or blue."""


@dataclass(frozen=True)
class PCA:
    """The directions in which features vary most."""

    mean: torch.Tensor
    """(D,), float32."""
    components: torch.Tensor
    """(k, D), orthonormal, of falling variance; the largest entry of each is positive."""
    variances: torch.Tensor
    """(k,), along each component."""
    total_variance: float
    """Along all D."""


def fit_pca(maps: Sequence[FeatureMap], number: int, foreground: bool = False) -> PCA:
    """The first principal components over all cells that count, of all images together.

    Every cell counts alike; padding and altered voxels never do. Moments are summed in float64, slice by slice.

    Args:
        maps: Features of one width.
        number: How many components.
        foreground: Whether only cells of the foreground count.

    Raises:
        ValueError: If there are fewer channels than components, or no more cells than components.
    """
    width = len(maps[0].values)
    if width < number:
        raise ValueError(f"{number} components of {width} channels are not possible: choose another --level")
    count, total, products = 0, torch.zeros(width).double(), torch.zeros(width, width).double()
    for cells in _slices(maps, foreground):
        count, total, products = count + len(cells), total + cells.sum(0), products + cells.T @ cells
    if count <= number:
        raise ValueError(
            f"only {count} cells of the feature maps hold neither padding nor altered"
            f"{' nor background' if foreground else ''} voxels: choose a finer --level or larger images"
        )
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:number].clamp(min=0), directions.flip(1)[:, :number].T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    components = directions * largest.sign()
    return PCA(mean.float(), components.float(), variances.float(), float(covariance.trace()))


def counted(features: FeatureMap, foreground: bool) -> torch.Tensor:
    """Cells that count, (Z, Y, X), bool."""
    return features.known & features.foreground if foreground else features.known


def _slices(maps: Sequence[FeatureMap], foreground: bool) -> Iterator[torch.Tensor]:
    """The features of cells that count, (n, D) float64, slice by slice."""
    for features in maps:
        for row, counts in enumerate(counted(features, foreground)):
            yield _row(features, row)[:, counts].T.double()


def _row(features: FeatureMap, row: int) -> torch.Tensor:
    return torch.from_numpy(np.array(features.values[:, row], dtype=np.float32))


def project(pca: PCA, features: FeatureMap) -> torch.Tensor:
    """The components of every cell, (k, Z, Y, X), float32."""
    rows = range(features.values.shape[1])
    shift = (pca.components @ pca.mean)[:, None, None]
    return torch.stack([torch.einsum("kd,dyx->kyx", pca.components, _row(features, row)) - shift for row in rows], 1)


def colour_range(
    projected: Iterable[torch.Tensor], maps: Sequence[FeatureMap], foreground: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of each component that get no and full colour, (k,) each, over the cells that count of all images."""
    parts = (p[:, counted(m, foreground)] for p, m in zip(projected, maps, strict=True))
    values = torch.cat([part[:, :: part.shape[1] // COLOUR_CELLS + 1] for part in parts], 1).numpy()
    low, high = np.percentile(values, COLOUR_PERCENTILES, axis=1)
    return torch.from_numpy(low).float(), torch.from_numpy(high).float()


def colours(values: torch.Tensor, limits: tuple[torch.Tensor, torch.Tensor]) -> npt.NDArray[np.uint8]:
    """Components as red, green and blue.

    Args:
        values: (3, Z, Y, X).
        limits: Of `colour_range`.

    Returns:
        (Z, Y, X, 3), from 1 to 255: 0 is left for what is not shown.
    """
    low, high = (limit.view(-1, 1, 1, 1) for limit in limits)
    share = ((values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return np.ascontiguousarray((1 + share * 254).round().byte().movedim(0, -1).numpy())
