"""Quarter turns in a plane, of which nothing but what is shown tells: neither size, nor sharpness, nor padding.

Padding does tell where a crop is so thin in that plane that the view is not shrunk far enough to lie in it;
`only_shown` finds these.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, compress

import torch
from torch import Tensor

from nnssl_ext.views.transform import SpatialTransform, SpatialView, apply_transform, valid_box

NUM_TURNS = 4
_MOST_SHRUNK = 0.25
"""No window is shrunk further to fit between real voxels, as for other views."""
_TINY = 1e-6


def square_planes(spacing: Sequence[float], max_anisotropy: float) -> list[tuple[int, int]]:
    """All planes whose voxels are square, the first axes first.

    Args:
        spacing: In mm per axis.
        max_anisotropy: Largest ratio of spacings in a plane; beyond, anatomy would be seen to be stretched.

    Raises:
        ValueError: If there is none.
    """
    planes = list(combinations(range(len(spacing)), 2))
    square = are_square(torch.tensor([spacing]), planes, max_anisotropy)[0].tolist()
    if not any(square):
        raise ValueError(
            f"no two axes of the spacing {tuple(spacing)} differ by a factor of {max_anisotropy} or less, so the "
            "stretch would tell the turn. Plan equal spacings: nnssl_plan_experiment -d DATASET -spacing iso"
        )
    return list(compress(planes, square))


def are_square(spacing: Tensor, planes: Sequence[tuple[int, int]], max_anisotropy: float) -> Tensor:
    """Whether each case's voxels are square in planes: (B, planes), bool, of spacings (B, D)."""
    edges = spacing[:, torch.tensor(planes, device=spacing.device)]
    return edges.amax(2) <= max_anisotropy * (1 + _TINY) * edges.amin(2)


def turning_plane(patch_size: Sequence[int], spacing: Sequence[float], max_anisotropy: float) -> tuple[int, int]:
    """The two axes to turn in: those of the most equal edges, and of equals the last ones.

    Args:
        patch_size: Voxels per axis.
        spacing: In mm per axis.
        max_anisotropy: As in `square_planes`, and raises as that does.
    """

    def ratio(plane: tuple[int, int]) -> float:
        return max(patch_size[axis] for axis in plane) / min(patch_size[axis] for axis in plane)

    return min(reversed(square_planes(spacing, max_anisotropy)), key=ratio)


def quarter_turned(
    data: Tensor, valid: Tensor, turns: Tensor, plane: tuple[int, int], size: Sequence[int]
) -> SpatialView:
    """Each sample turned by so many times 90°, as `torch.rot90` turns, looked at in a window of fixed size.

    The window lies at the middle of the real voxels and shows as much as fits between them in each of the four
    positions, whichever is drawn, but no less than a quarter of its edges: where fewer voxels are real along an axis,
    it shows padding. The two axes of the plane are interpolated alike.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        turns: (B,), int64, from 0 to 3.
        plane: The two axes.
        size: Voxels of the window per axis.
    """
    a, b = plane
    half = torch.tensor([(edge - 1) / 2 for edge in size], device=valid.device)
    phase = half % 1
    phase[b] = phase[a]
    needed = half.clone()
    needed[[a, b]] = max((size[a] - 1) / 2, (size[b] - 1) / 2)
    centre, zoom = between_real(valid, needed, phase)
    cos, sin = _sine((turns + 1) % NUM_TURNS), _sine(turns)
    matrix = torch.eye(len(size), device=valid.device).repeat(len(valid), 1, 1)
    matrix[:, a, a], matrix[:, a, b], matrix[:, b, a], matrix[:, b, b] = cos, sin, -sin, cos
    return apply_transform(data, valid, SpatialTransform(tuple(size), matrix * zoom, centre))


def between_real(valid: Tensor, needed: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Where a window lies at the middle of the real voxels, and how far it is shrunk to lie between them.

    Args:
        valid: (B, 1, *crop), bool.
        needed: (D,), how far it reaches from its middle.
        phase: (D,), in [0, 1), fraction of a voxel at which its middle lies.

    Returns:
        The middle (B, D), in voxels, and the factor (B, 1, 1), from a quarter to 1.
    """
    lower, upper = valid_box(valid)
    centre = ((lower + upper) / 2 - phase).floor() + phase
    reach = torch.minimum(centre - lower, upper - centre)
    zoom = ((reach + _TINY) / (needed + _TINY)).amin(1).clamp(_MOST_SHRUNK, 1)
    return centre, zoom.view(-1, 1, 1)


def only_shown(valid: Tensor, plane: tuple[int, int]) -> Tensor:
    """Whether views are without padding along the two axes of the plane; along others it is there in every turn alike.

    Args:
        valid: (B, 1, *window), bool.
        plane: The two axes that they were turned in.

    Returns:
        (B,), bool.
    """
    others = [axis + 2 for axis in range(valid.ndim - 2) if axis not in plane]
    return (valid.amax(others) if others else valid).flatten(1).all(1)


def _sine(quarter: Tensor) -> Tensor:
    """The sine of so many quarter turns from 0 to 3: 0, 1, 0, -1, exactly."""
    return (2 - quarter).float() * (quarter % 2).float()
