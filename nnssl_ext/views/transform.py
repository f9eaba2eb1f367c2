"""The one resampling of a view: where its voxels look in the input, which it is kept inside of, and what is valid.

A view is an affine map about its centre, composed with a smooth displacement. A voxel of the view is valid only when
everything that was interpolated for it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-6
_MOST_SHRUNK = 0.25
"""No view is shrunk further to lie inside: of a volume of a few slices hardly a point would be left."""
_ROUNDING = 1e-3
"""How far, in voxels, a point may seem to be outside, and how much of its interpolation weight, by rounding alone."""


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

    def of(self, rows: slice | Sequence[int]) -> SpatialTransform:
        """The transform of some rows of the batch, all to be interpolated."""
        displacement = None if self.displacement is None else self.displacement[rows]
        return SpatialTransform(self.size, self.matrix[rows], self.centre[rows], displacement)

    def coordinates(self) -> Tensor:
        """Input voxel coordinates of every voxel of the view: (B, D, *size)."""
        dims = len(self.size)
        total = columns(self.centre, dims)
        for axis, edge in enumerate(self.size):
            offset = (torch.arange(edge, device=total.device) - (edge - 1) / 2).view(-1, *[1] * (dims - 1 - axis))
            if self.displacement is not None:
                offset = offset + self.displacement[:, axis : axis + 1]
            total = total + columns(self.matrix[:, :, axis], dims) * offset
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


def place_view(
    valid: Tensor,
    matrix: Tensor,
    displacement: Tensor | None,
    size: Sequence[int],
    inside: bool = False,
    place: Tensor | None = None,
) -> SpatialTransform:
    """Gives a view a centre such that it looks at real voxels, as far as it fits between them.

    Args:
        valid: (B, 1, *crop), bool.
        matrix: (B, D, D), crop voxels per voxel of the view.
        displacement: (B, D, *size), in voxels of the view, or None.
        size: Voxels of the view per axis.
        inside: Whether to shrink the view until it fits. Along an axis with a single real voxel, that one is shown
            throughout.
        place: (B, D), from 0 (at the first real voxels) to 1 (at the last ones); None: at the middle of the crop, moved
            by what it takes.
    """
    lower, upper = valid_box(valid)
    flat = inside & (upper == lower)
    matrix = matrix * torch.where(flat, _TINY, 1).unsqueeze(2)  # not 0: a map that can be inverted
    half = half_extent(matrix, displacement, size)
    if inside:
        fitting = (upper - lower) / 2 / half.clamp(min=_TINY)
        shrink = fitting.masked_fill(flat, 1).amin(1, keepdim=True).clamp(_MOST_SHRUNK, 1)
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
    """Resamples data (linearly) and validity (strictly) in one pass.

    A CPU takes one sample after another: validity is interpolated for those only that hold padding.
    """
    sampled = data.new_empty(*data.shape[:2], *transform.size)
    inside = valid.new_empty(len(valid), 1, *transform.size)
    for row, flipped in transform.unmoved.items():
        axes = [axis + 1 for axis in flipped]
        sampled[row] = _cut(data[row], transform, row).flip(axes)
        inside[row] = _cut(valid[row], transform, row).flip(axes)
    moved = [row for row in range(len(data)) if row not in transform.unmoved]
    alone = [slice(row, row + 1) for row in moved]  # of which, other than of rows by number, nothing is copied
    for rows in alone if data.device.type == "cpu" else [moved] * bool(moved):
        sampled[rows], inside[rows] = _interpolate(data[rows], valid[rows], transform.of(rows))
    return SpatialView(sampled.masked_fill_(~inside, 0), inside, transform)


def _interpolate(data: Tensor, valid: Tensor, transform: SpatialTransform) -> tuple[Tensor, Tensor]:
    real = data.device.type == "cpu" and bool(valid.all())  # a GPU would have to be waited for
    half = [max((full - 1) / 2, _ROUNDING) for full in data.shape[2:]]
    scale = torch.tensor(half, device=data.device)  # to grid_sample's coordinates, -1 and 1 at the outermost voxels
    matrix, centre = transform.matrix / scale.unsqueeze(1), (transform.centre - scale) / scale
    grid = replace(transform, matrix=matrix.flip(1), centre=centre.flip(1)).coordinates()
    inside = torch.ones_like(grid[:, :1], dtype=torch.bool)
    for axis, extent in enumerate(reversed(half)):
        inside &= grid[:, axis : axis + 1].abs() <= 1 + _ROUNDING / extent
    if real:
        return _sample(data, grid), inside
    view = _sample(torch.cat([data, valid.to(data.dtype)], dim=1), grid)
    return view[:, :-1], inside & (view[:, -1:] > 1 - _ROUNDING)


def _sample(data: Tensor, grid: Tensor) -> Tensor:
    """Linear interpolation of data (B, C, *crop) at a grid (B, D, *size), where torch gives a sample a single thread.

    So one sample on a CPU is cut into slabs, as many as there are threads, or nearly.
    """
    threads = torch.get_num_threads() if len(data) == 1 and data.device.type == "cpu" else 1
    slabs = max(number for number in range(1, threads + 1) if grid.shape[2] % number == 0)
    points = grid.movedim(1, -1)
    if slabs > 1:
        data, points = data.expand(slabs, *data.shape[1:]), points[0].unflatten(0, (slabs, -1))
    view = F.grid_sample(data, points, mode="bilinear", padding_mode="zeros", align_corners=True)
    return view.movedim(0, 1).flatten(1, 2).unsqueeze(0) if slabs > 1 else view


def _cut(sample: Tensor, transform: SpatialTransform, row: int) -> Tensor:
    """The voxels (C, *size) of a sample (C, *crop) that an unmoved view looks at."""
    for axis, edge in enumerate(transform.size):
        if edge != sample.shape[axis + 1]:
            start = (transform.centre[row, axis] - (edge - 1) / 2).round().long()
            sample = sample.index_select(axis + 1, start + torch.arange(edge, device=sample.device))
    return sample


def columns(values: Tensor, dims: int) -> Tensor:
    """Values (B, D) as (B, D, 1, ...), to meet tensors of `dims` spatial dimensions."""
    return values.view(*values.shape, *[1] * dims)


def valid_box(valid: Tensor) -> tuple[Tensor, Tensor]:
    """First and last valid voxel per axis, each (B, D) float; the whole crop where nothing is valid."""
    lower: list[Tensor] = []
    upper: list[Tensor] = []
    rest = valid.view(torch.uint8)
    for axis in range(valid.dim() - 1, 1, -1):
        profile = rest.flatten(1, axis - 1).amax(1)
        lower.insert(0, profile.argmax(1))
        upper.insert(0, profile.shape[1] - 1 - profile.flip(1).argmax(1))
        rest = rest.amax(axis)
    return torch.stack(lower, 1).float(), torch.stack(upper, 1).float()


def half_extent(matrix: Tensor, displacement: Tensor | None, size: Sequence[int]) -> Tensor:
    """Half the edges (B, D), in input voxels, of the box around all that a view looks at."""
    half = torch.tensor([(edge - 1) / 2 for edge in size], device=matrix.device).expand(len(matrix), -1)
    if displacement is not None:
        half = half + displacement.abs().flatten(2).amax(2)
    return (matrix.abs() * half.unsqueeze(1)).sum(2)
