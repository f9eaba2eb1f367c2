"""Registration without training: dense features of two images, their principal components, and a smooth match of both.

The moving image is laid into the fixed one's voxels by their scanner coordinates, so both are seen by the network in
one orientation, whatever their spacings and axes. The features of both get joint principal components, 12 as in
DINO-Reg (Song et al. 2024, arXiv:2402.15687), or are MIND's; they are interpolated onto cubes over the fixed image, and
`convex.match` finds the displacements. The moving image itself is sampled once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.downstream.convex import ConvexConfig, match
from nnssl_ext.downstream.features import dense_features, prepare
from nnssl_ext.downstream.fields import Deformation, Field, deformation, sample_moving, to_scanner_vectors
from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.grids import Grid, image_grid, index_to_scanner, interpolate, nearest
from nnssl_ext.downstream.mind import mind_ssc
from nnssl_ext.downstream.pca import fit_pca, project
from nnssl_ext.downstream.probing import dice
from nnssl_ext.fingerprint.foreground import foreground_mask
from nnssl_ext.imageio import Geometry, read_image

NUM_COMPONENTS = 12
LEAST_OVERLAP = 0.1
"""Share of the fixed image that the moving one must cover at the start."""
Start = Literal["scanner", "centre", "mass"]
STARTS: tuple[Start, ...] = ("scanner", "centre", "mass")
Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Image:
    """An image as it was read."""

    name: str
    voxels: Array
    """(C, Z, Y, X)."""
    geometry: Geometry


@dataclass(frozen=True)
class Pair:
    """Two images on the voxels of the fixed one."""

    fixed: Image
    moved: Image
    """The moving image where the start puts it, its outermost voxels going on."""
    seen: npt.NDArray[np.bool_]
    """(Z, Y, X): where the moving image really has voxels."""


@dataclass(frozen=True)
class Registered:
    """A registration of two images."""

    start: Field
    """The translation that it started from, as a field."""
    field: Field
    """See `fields`; the start is part of it."""
    deformation: Deformation
    seconds: float


Describe = Callable[[Pair, Grid], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Features of both images at the positions of a grid (C, Z, Y, X), and how much each place counts (Z, Y, X)."""


def read(files: Sequence[Path]) -> Image:
    """Reads an image with its channels."""
    voxels, geometry = read_image(files)
    return Image(Path(files[0]).name, voxels, geometry)


def register(
    moving: Image,
    fixed: Image,
    describe: Describe | None,
    spacing: float,
    start: Start = "scanner",
    config: ConvexConfig | None = None,
) -> Registered:
    """Registers two images.

    Args:
        moving: Is deformed.
        fixed: Stays.
        describe: Makes features of both, such as those of `network_features` or `mind_features`; None: only the start.
        spacing: Of the cubes on which the features are matched, in mm.
        start: Where the moving image is put first: where the `scanner` says, or moved so that the centres of both
            images (`centre`), or those of their foregrounds (`mass`), lie on each other.
        config: Of the match.

    Raises:
        ValueError: If the images share too little place at the start, or the start is unknown.
    """
    began = time.monotonic()
    shape = fixed.voxels.shape[1:]
    shift = _start(moving, fixed, start)
    at_start: Field = np.full((*shape, 3), shift, dtype=np.float32)
    total = at_start
    if describe is not None:
        pair = _pair(moving, fixed, at_start, start)
        grid = cubes(shape, fixed.geometry, spacing)
        first, second, weight = describe(pair, grid)
        first, second = _scaled(first, second, weight)
        found = match(first, second, weight, config or ConvexConfig())
        total = at_start + to_scanner_vectors(_on_image(found, grid, shape), fixed.geometry)
    return Registered(at_start, total, deformation(total, fixed.geometry), time.monotonic() - began)


def _start(moving: Image, fixed: Image, start: Start) -> npt.NDArray[np.float64]:
    """The translation (x, y, z) in mm from a point of the fixed image to one of the moving image."""
    if start not in STARTS:
        raise ValueError(f"start {start!r} is not known: use one of {', '.join(STARTS)}")
    if start == "scanner":
        return np.zeros(3)
    return _middle(moving, start) - _middle(fixed, start)


def _middle(image: Image, start: Start) -> npt.NDArray[np.float64]:
    index = (np.array(image.voxels.shape[1:]) - 1) / 2
    if start == "mass":
        places = np.nonzero(foreground_mask(image.voxels[0]))
        index = np.array([axis.mean() for axis in places]) if places[0].size else index
    return (index_to_scanner(image.geometry) @ np.array([*index, 1.0]))[:3]


def _pair(moving: Image, fixed: Image, field: Field, start: Start) -> Pair:
    voxels, seen = sample_moving(moving.voxels, moving.geometry, field, fixed.geometry)
    if seen.mean() < LEAST_OVERLAP:
        raise ValueError(
            f"{moving.name} covers {seen.mean():.0%} of {fixed.name} (start: {start}), too little to register. "
            f"Use --start {' or '.join(other for other in STARTS[1:] if other != start)}, or crop the fixed image"
        )
    return Pair(fixed, Image(moving.name, voxels.astype(np.float32), fixed.geometry), seen)


def cubes(shape: Sequence[int], geometry: Geometry, spacing: float) -> Grid:
    """Cubes of about `spacing` mm that fill an image; an axis of one voxel stays so."""
    extents = [size * edge for size, edge in zip(shape, geometry.spacing, strict=True)]
    number = [max(round(e / spacing), 2) if size > 1 else 1 for e, size in zip(extents, shape, strict=True)]
    steps = [size / count for size, count in zip(shape, number, strict=True)]
    return Grid(tuple(number), tuple(step / 2 - 0.5 for step in steps), tuple(steps))


def mean_spacing(spacing: Sequence[float]) -> float:
    """The edge of a cube of the same volume."""
    return float(np.exp(np.mean(np.log(spacing))))


def _scaled(fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both divided by one number, so that the variances of all channels sum to 1 where places count."""
    both = torch.cat([fixed[:, weight > 0], moving[:, weight > 0]], 1)
    scale = both.var(1, correction=0).sum().sqrt().clamp(min=torch.finfo(torch.float32).eps)
    return fixed / scale, moving / scale


def _on_image(field: torch.Tensor, grid: Grid, shape: Sequence[int]) -> Array:
    """A field on cubes as one on the image's voxels, its vectors counted in those."""
    steps = field.new_tensor(grid.step).view(3, 1, 1, 1)
    return interpolate(field * steps, grid, image_grid(shape)).cpu().numpy()


def network_features(frozen: Frozen, level: int | None = None) -> Describe:
    """Features of a checkpoint's network for `register`: joint principal components of both images.

    Args:
        frozen: The encoder.
        level: See `dense_features`.
    """

    def describe(pair: Pair, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fixed = prepare(frozen, pair.fixed.voxels, pair.fixed.geometry, pair.fixed.name)
        moved = prepare(frozen, pair.moved.voxels, pair.moved.geometry, pair.moved.name, ~pair.seen)
        maps = [dense_features(frozen, volume, level) for volume in (fixed, moved)]
        pca = fit_pca(maps, min(NUM_COMPONENTS, len(maps[0].values)))
        device = next(frozen.encoder.parameters()).device
        first, second = (interpolate(project(pca, m).to(device), m.grid, grid) for m in maps)
        return first, second, nearest(torch.ones(maps[0].grid.size), maps[0].grid, grid).to(device)

    return describe


def mind_features(device: torch.device) -> Describe:
    """MIND-SSC of the first channel of both images for `register`, computed on a device."""

    def describe(pair: Pair, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        source = image_grid(pair.fixed.voxels.shape[1:])
        images = (torch.from_numpy(image.voxels[:1]).to(device) for image in (pair.fixed, pair.moved))
        first, second = (mind_ssc(interpolate(image, source, grid)[0]) for image in images)
        return first, second, torch.ones(grid.size, device=device)

    return describe


def moved_labels(labels: Labels, labels_geometry: Geometry, field: Field, geometry: Geometry) -> Labels:
    """Labels (Z, Y, X) of the moving image on the voxels of the fixed one; 0 where the moving image has none."""
    values, seen = sample_moving(labels[None], labels_geometry, field, geometry, order=0)
    return np.where(seen, values[0], 0).astype(labels.dtype)


def overlaps(moved: Labels, fixed: Labels) -> dict[int, float]:
    """Dice of each label that one of two label maps of the same voxels has, background aside."""
    classes = sorted({int(value) for labels in (moved, fixed) for value in np.unique(labels)} - {0})
    first, second = (torch.from_numpy(labels.astype(np.int64)) for labels in (moved, fixed))
    return dict(zip(classes, dice(first, second, classes), strict=True))
