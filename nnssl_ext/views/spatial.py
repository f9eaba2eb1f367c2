"""Flips, rotation, scaling and elastic deformation of a batch in one resampling.

A view is described by where each of its voxels looks in the input: an affine map about the view's centre, composed with
a smooth displacement. Rotations are made in millimetres, so anatomy is not sheared where voxels are anisotropic. A
voxel of the view is valid only when everything that was interpolated for it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.core.random import SampleRandom

_TINY = 1e-6
_HALF_TURN = 180
_MOST_SHRUNK = 0.25
"""No view is shrunk further to lie inside: of a volume of a few slices hardly a point would be left."""
_MIN_WEIGHT = 1 - 1e-3
"""Interpolation weight on real voxels from which a view's voxel is valid: 1 but for rounding of coordinates."""
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
        for name in ("flip", "rotation", "scaling", "elastic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability and must lie in [0, 1].")
        if not 0 <= self.rotation_degrees <= _HALF_TURN:
            raise ValueError(f"rotation_degrees={self.rotation_degrees} must lie in [0, {_HALF_TURN}].")
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range={self.scale_range} must be two positive numbers, the smaller one first.")
        if not 0 <= self.elastic_magnitude <= _MAX_INJECTIVE:
            raise ValueError(f"elastic_magnitude={self.elastic_magnitude} must lie in [0, {_MAX_INJECTIVE}].")
        if self.elastic_cells < 1:
            raise ValueError(f"elastic_cells={self.elastic_cells} must be 1 or more.")
        if self.max_anisotropy < 1:
            raise ValueError(f"max_anisotropy={self.max_anisotropy} must be 1 or more.")


@dataclass(frozen=True)
class SpatialTransform:
    """Where a view's voxels look in its input: `centre + matrix @ (voxel - middle of the view + displacement)`."""

    size: tuple[int, ...]
    """Voxels of the view per axis."""
    matrix: Tensor
    """(B, D, D): input voxels per voxel of the view."""
    centre: Tensor
    """(B, D): input voxel, with fractions, that the middle of the view looks at."""
    displacement: Tensor | None = None
    """(B, D, *size), in voxels of the view; None is no deformation."""
    unmoved: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Rows of the batch that are cut and flipped along these axes, and otherwise as they are: copied, not
    interpolated."""

    def of(self, rows: Sequence[int]) -> SpatialTransform:
        """The transform of some rows of the batch, all to be interpolated."""
        displacement = None if self.displacement is None else self.displacement[rows]
        return SpatialTransform(self.size, self.matrix[rows], self.centre[rows], displacement)

    def coordinates(self) -> Tensor:
        """Input voxel coordinates of every voxel of the view: (B, D, *size)."""
        dims = len(self.size)
        total = _columns(self.centre, dims)
        for axis, edge in enumerate(self.size):
            offset = (torch.arange(edge, device=total.device) - (edge - 1) / 2).view(-1, *[1] * (dims - 1 - axis))
            if self.displacement is not None:
                offset = offset + self.displacement[:, axis : axis + 1]
            total = total + _columns(self.matrix[:, :, axis], dims) * offset
        return total


@dataclass(frozen=True)
class SpatialView:
    """A view of a batch."""

    data: Tensor
    """(B, C, *size), 0 where invalid."""
    valid: Tensor
    """(B, 1, *size), bool: whether all that was interpolated is real."""
    transform: SpatialTransform
    """Where it was taken."""


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
    if zoom is not None or place is not None or config.inside:
        return transform
    unmoved = np.flatnonzero(~(moved | deformed)).tolist()
    return replace(transform, unmoved={row: tuple(np.flatnonzero(flipped[row]).tolist()) for row in unmoved})


def place_view(
    valid: Tensor,
    matrix: Tensor,
    displacement: Tensor | None,
    size: Sequence[int],
    inside: bool = False,
    place: Tensor | None = None,
) -> SpatialTransform:
    """Gives a view a centre such that it looks at real voxels, as far as it fits between them. See `draw_transform`."""
    lower, upper = valid_box(valid)
    half = _half_extent(matrix, displacement, size)
    if inside:
        shrink = ((upper - lower) / 2 / half.clamp(min=_TINY)).amin(1, keepdim=True).clamp(_MOST_SHRUNK, 1)
        matrix, half = matrix * shrink.unsqueeze(2), half * shrink
    first, last = lower + half, upper - half
    if place is None:
        middle = [(full - edge) // 2 + (edge - 1) / 2 for full, edge in zip(valid.shape[2:], size, strict=True)]
        centre = torch.tensor(middle, device=valid.device)
        centre = centre.clamp(torch.minimum(first, last), torch.maximum(first, last))
    else:
        centre = torch.lerp(first, last, place)
    return SpatialTransform(tuple(size), matrix, centre, displacement)


def apply_transform(data: Tensor, valid: Tensor, transform: SpatialTransform) -> SpatialView:
    """Resamples data (linearly) and validity (strictly) in one pass."""
    together = torch.cat([data, valid.to(data.dtype)], dim=1)
    moved = [row for row in range(len(data)) if row not in transform.unmoved]
    if len(moved) == len(data):
        sampled = _interpolate(together, transform)
    else:
        sampled = together.new_empty(*together.shape[:2], *transform.size)
        for row, flipped in transform.unmoved.items():
            sampled[row] = _cut(together[row], transform, row).flip([axis + 1 for axis in flipped])
        if moved:
            sampled[moved] = _interpolate(together[moved], transform.of(moved))
    inside = sampled[:, -1:] > _MIN_WEIGHT
    return SpatialView(sampled[:, :-1].masked_fill(~inside, 0), inside, transform)


def _interpolate(data: Tensor, transform: SpatialTransform) -> Tensor:
    crop = torch.tensor(data.shape[2:], device=data.device)  # grid_sample counts from -1 to 1 across the crop's edges
    matrix, centre = transform.matrix * 2 / crop.unsqueeze(1), (2 * transform.centre + 1) / crop - 1
    grid = replace(transform, matrix=matrix.flip(1), centre=centre.flip(1)).coordinates().movedim(1, -1)
    return F.grid_sample(data, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _cut(sample: Tensor, transform: SpatialTransform, row: int) -> Tensor:
    """The voxels (C, *size) of a sample (C, *crop) that an unmoved view looks at."""
    for axis, edge in enumerate(transform.size):
        if edge != sample.shape[axis + 1]:
            start = (transform.centre[row, axis] - (edge - 1) / 2).round().long()
            sample = sample.index_select(axis + 1, start + torch.arange(edge, device=sample.device))
    return sample


def _columns(values: Tensor, dims: int) -> Tensor:
    return values.view(*values.shape, *[1] * dims)


def valid_box(valid: Tensor) -> tuple[Tensor, Tensor]:
    """First and last valid voxel per axis, each (B, D) float; the whole crop where nothing is valid."""
    lower: list[Tensor] = []
    upper: list[Tensor] = []
    rest = valid.float()
    for axis in range(valid.dim() - 1, 1, -1):
        profile = rest.flatten(1, axis - 1).amax(1)
        lower.insert(0, profile.argmax(1))
        upper.insert(0, profile.shape[1] - 1 - profile.flip(1).argmax(1))
        rest = rest.amax(axis)
    return torch.stack(lower, 1).float(), torch.stack(upper, 1).float()


def _half_extent(matrix: Tensor, displacement: Tensor | None, size: Sequence[int]) -> Tensor:
    """Half the edges (B, D), in input voxels, of the box around all that a view looks at."""
    half = torch.tensor([(edge - 1) / 2 for edge in size], device=matrix.device).expand(len(matrix), -1)
    if displacement is not None:
        half = half + displacement.abs().flatten(2).amax(2)
    return (matrix.abs() * half.unsqueeze(1)).sum(2)


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
    vectors = vectors * _columns(cells, dims)
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
