"""Random flips, rotations, scalings and elastic deformations of a batch, in one resampling.

Rotations are made in millimetres, so anatomy is not sheared where voxels are anisotropic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnssl_ext.core.checks import at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.views.transform import SpatialTransform, SpatialView, apply_transform, columns, place_view

_HALF_TURN = 180
_SPLINE_SUPPORT = 4
"""Control points that a cubic B-spline depends on along each axis."""
_MAX_INJECTIVE = 0.4
"""Cubic B-spline displacements below this share of a control cell cannot fold, in 3D (Choi and Lee 2000)."""


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """How a view may be moved. The defaults are nnU-Net's, without its elastic deformation as there."""

    flip: float = 0.5
    """Probability of a flip, for each axis on its own."""
    rotation: float = 0.2
    """Probability that a sample is rotated."""
    rotation_degrees: float = 30.0
    """Largest angle, in each plane, to either side."""
    max_anisotropy: float = 3.0
    """Planes whose voxel edges differ by more than this factor are not rotated. nnU-Net's threshold."""
    scaling: float = 0.2
    """Probability that a sample is scaled."""
    scale_range: tuple[float, float] = (0.7, 1.4)
    """Magnification, the same along all axes, log-uniform; above 1 enlarges the anatomy."""
    elastic: float = 0.0
    """Probability that a sample is deformed."""
    elastic_cells: int = 4
    """Cells of the deformation's control grid along each axis of the view."""
    elastic_magnitude: float = 0.25
    """Largest displacement in control cells, up to 0.4: beyond, a cubic B-spline may fold."""
    inside: bool = False
    """Whether a view is shrunk until it lies in the real voxels. If not, it is only moved, and what sticks out is
    invalid."""

    def __post_init__(self) -> None:
        within(self, "[0, 1]", "flip", "rotation", "scaling", "elastic", note=": it is a probability")
        within(self, f"[0, {_HALF_TURN}]", "rotation_degrees")
        rising(self, "(0, inf)", "scale_range")
        within(self, f"[0, {_MAX_INJECTIVE}]", "elastic_magnitude")
        at_least(self, elastic_cells=1, max_anisotropy=1)


def spatial_view(
    data: Tensor,
    valid: Tensor,
    spacing: Tensor,
    random: SampleRandom,
    config: SpatialConfig,
    size: Sequence[int] | None = None,
) -> SpatialView:
    """A randomly flipped, rotated, scaled and deformed view of every sample.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        spacing: (B, D) in mm.
        random: Keyed by sample.
        config: What may happen.
        size: Voxels of the view per axis, at most those of the crop; None: as the crop.
    """
    transform = draw_transform(valid, spacing, random, config, size or valid.shape[2:])
    return apply_transform(data, valid, transform)


def training_view(batch: Batch, random: SampleRandom, config: SpatialConfig, train: bool) -> tuple[Tensor, Tensor]:
    """A batch's crops and their validity: in training `spatial_view`s of their own size, in validation as they are.

    Args:
        batch: The crops.
        random: Keyed by sample; its child `spatial` is used.
        config: What may happen.
        train: Whether it may.

    Returns:
        (B, C, *crop), and (B, 1, *crop), bool.
    """
    if not train:
        return batch.data, batch.valid
    moved = spatial_view(batch.data, batch.valid, batch.spacing, random.child("spatial"), config)
    return moved.data, moved.valid


def draw_transform(
    valid: Tensor,
    spacing: Tensor,
    random: SampleRandom,
    config: SpatialConfig,
    size: Sequence[int],
    zoom: Tensor | None = None,
    place: Tensor | None = None,
) -> SpatialTransform:
    """Draws where each sample is looked at.

    A view starts at the middle of the crop and is then moved so that it lies in the real voxels, as far as it fits.

    Args:
        valid: (B, 1, *crop), bool.
        spacing: (B, D) in mm.
        random: Keyed by sample.
        config: What may happen.
        size: Voxels of the view per axis.
        zoom: (B,), crop voxels per voxel of the view before scaling; None: 1.
        place: (B, D), from 0 (at the first real voxels) to 1 (at the last ones); None: at the middle of the crop.
    """
    flipped = random.bernoulli("flip", config.flip, (len(size),))
    matrix, moved = _matrix(spacing.to(valid.device), random, config)
    matrix = matrix * torch.from_numpy(1 - 2 * flipped.astype(np.float32)).to(valid.device).unsqueeze(1)
    displacement, deformed = _displacement(random, config, size, valid.device)
    if zoom is not None:
        matrix = matrix * zoom.view(-1, 1, 1)
    transform = place_view(valid, matrix, displacement, size, config.inside, place)
    resized = any(edge > full for edge, full in zip(size, valid.shape[2:], strict=True))
    if resized or zoom is not None or place is not None or config.inside:
        return transform
    unmoved = np.flatnonzero(~(moved | deformed)).tolist()
    return replace(transform, unmoved={row: tuple(np.flatnonzero(flipped[row]).tolist()) for row in unmoved})


def _matrix(spacing: Tensor, random: SampleRandom, config: SpatialConfig) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """Rotations in millimetres and scaling as one matrix (B, D, D), and which rows are rotated or scaled."""
    batch, dims = spacing.shape
    device = spacing.device

    def draw(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    planes = [(a, b) for a in range(dims) for b in range(a + 1, dims)]
    limit = np.deg2rad(config.rotation_degrees)
    angles = draw(random.uniform("angles", -limit, limit, (len(planes),)))
    rotated, scaled = random.bernoulli("rotate", config.rotation), random.bernoulli("rescale", config.scaling)
    angles = angles * draw(rotated).unsqueeze(1)
    matrix = torch.eye(dims, device=device).expand(batch, -1, -1)
    for number, (a, b) in enumerate(planes):
        ratio = torch.maximum(spacing[:, a] / spacing[:, b], spacing[:, b] / spacing[:, a])
        matrix = _rotated(matrix, angles[:, number] * (ratio <= config.max_anisotropy), a, b)
    matrix = matrix * spacing.unsqueeze(1) / spacing.unsqueeze(2)
    low, high = np.log(config.scale_range)
    zoom = draw(random.uniform("scale", low, high)) * draw(scaled)
    return matrix * torch.exp(-zoom).view(-1, 1, 1), rotated | scaled


def _rotated(matrix: Tensor, angle: Tensor, a: int, b: int) -> Tensor:
    """Rows a and b turned by an angle (B,): without a matrix product, which a GPU may round to ten bits."""
    cos, sin = torch.cos(angle).unsqueeze(1), torch.sin(angle).unsqueeze(1)
    turned = matrix.clone()
    turned[:, a] = cos * matrix[:, a] - sin * matrix[:, b]
    turned[:, b] = sin * matrix[:, a] + cos * matrix[:, b]
    return turned


def _displacement(
    random: SampleRandom, config: SpatialConfig, size: Sequence[int], device: torch.device
) -> tuple[Tensor | None, npt.NDArray[np.bool_]]:
    """A cubic B-spline of uniform control vectors, (B, D, *size) in voxels, and which rows are deformed."""
    chosen = random.bernoulli("deform", config.elastic)
    if not chosen.any():
        return None, chosen
    dims, points = len(size), config.elastic_cells + _SPLINE_SUPPORT - 1
    control = random.uniform("control", -config.elastic_magnitude, config.elastic_magnitude, (dims, *[points] * dims))
    vectors = torch.from_numpy(control * chosen.reshape(-1, *[1] * (dims + 1))).to(device)
    cells = torch.tensor([edge / config.elastic_cells for edge in size], device=device)
    vectors = vectors * columns(cells, dims)
    for axis, edge in enumerate(size, start=2):
        weights = _spline_weights(edge, config.elastic_cells).to(device)
        vectors = torch.tensordot(vectors, weights, dims=([axis], [1])).movedim(-1, axis)
    return vectors, chosen


def _spline_weights(size: int, cells: int) -> Tensor:
    """Cubic B-spline basis (size, cells + 3): weight of each control point at each voxel."""
    position = (torch.arange(size) + 0.5) / size * cells
    distance = (position.unsqueeze(1) - (torch.arange(cells + _SPLINE_SUPPORT - 1) - 1)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)
