"""Whole volumes through a network that was trained on patches: windows that overlap, each answering for its middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch
from torch.nn import functional

from nnssl_ext.downstream.frozen import Frozen

WINDOWS_AT_ONCE = 8
VOXELS_AT_ONCE = 1 << 21
"""Windows go through the network together while they hold no more voxels than this; one does in any case."""
INTERPOLATION = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Window:
    """A patch-sized part of a volume."""

    lower: tuple[int, ...]
    """Its first voxel, one entry per axis of the volume."""
    own: tuple[slice, ...]
    """The voxels of the volume that it answers for; those of all windows tile the volume."""


def windows(
    shape: Sequence[int], size: Sequence[int], overlap: float = 0.5, multiple: Sequence[int] = (1, 1, 1)
) -> list[Window]:
    """Windows over a volume, evenly spaced, as few as overlap by at least a given share.

    Every voxel belongs to the window whose middle is nearest along each axis, where features know most of what is
    around them.

    Args:
        shape: Of the volume.
        size: Of a window.
        overlap: Least share of an edge that neighbours have in common, in [0, 1).
        multiple: Windows start at multiples of these numbers of voxels, which divide the window's edges; the last ones
            may end beyond the volume.
    """
    axes = [_along_axis(*axis, overlap) for axis in zip(shape, size, multiple[-len(shape) :], strict=True)]
    return [Window(tuple(low for low, _ in sides), tuple(own for _, own in sides)) for sides in product(*axes)]


def _along_axis(full: int, edge: int, multiple: int, overlap: float) -> list[tuple[int, slice]]:
    room = max(-(-full // multiple) - edge // multiple, 0)
    steps = -(-room // max(int(edge * (1 - overlap)) // multiple, 1))
    starts = [round(room * number / steps) * multiple for number in range(steps + 1)] if steps else [0]
    borders = [(a + b + edge) // 2 for a, b in pairwise(starts)]
    return [(low, slice(*ends)) for low, *ends in zip(starts, [0, *borders], [*borders, full], strict=True)]


def crop_window(volume: torch.Tensor, window: Window, size: Sequence[int]) -> torch.Tensor:
    """The voxels (C, *size) of a window; where the volume (C, *shape) is smaller, zeros follow."""
    for axis, (low, edge) in enumerate(zip(window.lower, size, strict=True), start=1):
        volume = volume.narrow(axis, low, min(edge, volume.shape[axis] - low))
    missing = [edge - have for have, edge in zip(volume.shape[1:], size, strict=True)]
    return functional.pad(volume, [side for gap in reversed(missing) for side in (0, gap)])


@torch.no_grad()
def scan(frozen: Frozen, data: torch.Tensor) -> Iterator[tuple[Window, list[torch.Tensor]]]:
    """Every window of a volume with its feature maps.

    Args:
        frozen: The encoder; windows have the size of its patch. A 2D encoder sees slice after slice.
        data: (C, Z, Y, X).

    Yields:
        The window, and maps (1, channels, *size) of its `dims` spatial dimensions.
    """
    for some, crops in batches(frozen, data, windows(data.shape[1:], window_size(frozen))):
        maps = [features.float() for features in frozen.encoder.feature_maps(crops)]
        for number, window in enumerate(some):
            yield window, [features[number : number + 1] for features in maps]


def batches(
    frozen: Frozen, data: torch.Tensor, every: Sequence[Window]
) -> Iterator[tuple[Sequence[Window], torch.Tensor]]:
    """Windows of a volume (C, Z, Y, X), some at a time, with their voxels (n, C, *patch) on the encoder's device."""
    size, device = window_size(frozen), next(frozen.encoder.parameters()).device
    together = min(max(VOXELS_AT_ONCE // prod(size), 1), WINDOWS_AT_ONCE)
    for start in range(0, len(every), together):
        some = every[start : start + together]
        crops = torch.stack([crop_window(data, window, size) for window in some])
        yield some, crops.reshape(*crops.shape[:2], *frozen.configuration.patch_size).to(device)


def window_size(frozen: Frozen) -> tuple[int, ...]:
    """Voxels (z, y, x) of a window: the patch, of a 2D encoder one slice of it."""
    patch = frozen.configuration.patch_size
    return (1,) * (3 - len(patch)) + tuple(patch)


def features_at(frozen: Frozen, data: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The features of some voxels of a volume.

    Args:
        frozen: The encoder.
        data: (C, Z, Y, X).
        places: (n, 3), voxels.

    Returns:
        (n, D) on the CPU, the maps' channels one after another, finest map first.
    """
    result = torch.zeros(len(places), sum(frozen.encoder.channels))
    for window, maps in scan(frozen, data):
        inside = owned(window, places)
        result[inside] = pick(maps, relative(window, places[inside], frozen)).cpu()
    return result


def owned(window: Window, places: torch.Tensor) -> torch.Tensor:
    """Which voxels (n, 3) a window answers for, (n,)."""
    low = torch.tensor([side.start for side in window.own])
    high = torch.tensor([side.stop for side in window.own])
    return ((places >= low) & (places < high)).all(1)


def relative(window: Window, places: torch.Tensor, frozen: Frozen) -> torch.Tensor:
    """Voxels as `grid_sample` wants them: in [-1, 1] between the outer faces of the window, x first; (n, dims)."""
    dims = frozen.configuration.dims
    inside = (places - torch.tensor(window.lower))[:, 3 - dims :]
    return ((2 * inside + 1) / torch.tensor(frozen.configuration.patch_size) - 1).flip(1)


def pick(maps: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """The features of all maps of a window at places (n, dims) of `relative`, interpolated linearly: (n, D)."""
    num, dims = places.shape
    grid = places.float().view(1, *[1] * (dims - 1), num, dims).to(maps[0].device)
    picked = [functional.grid_sample(m, grid, padding_mode="border", align_corners=False) for m in maps]
    return torch.cat([features.reshape(features.shape[1], num) for features in picked]).T
