"""Dense features of whole images, and attention maps, on the image that they are of.

An image is prepared as the checkpoint's plans say and runs through the network in overlapping windows of its patch,
which start at whole cells of the feature map, so that maps add up without interpolation; each window counts by a
Gaussian around its middle, as in nnU-Net's prediction. What is finished leaves the working memory as float16, a slab
at a time.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.grids import Grid, coarser, prepared_grid
from nnssl_ext.downstream.windows import Window, batches, crop_window, window_size, windows
from nnssl_ext.imageio import Geometry
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.preprocessing.case import preprocess_array

logger = logging.getLogger(__name__)

LEAST_COVER = 0.5
"""Share of the patch that an image must fill along every axis: beyond that the network would see mostly padding."""
DENSE_STRIDE = 4
"""Voxels of the cells of the feature map that is taken where none is asked for: deep, and still dense."""
SIGMA = 1 / 8
"""Spread of a window's Gaussian as a share of its edge, nnU-Net's."""
LARGEST = float(np.finfo(np.float16).max)
"""Features beyond this become it."""

What = Literal["features", "attention"]
Extract = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Crops (n, C, *patch) and their real voxels (n, 1, *patch) to maps (n, K, *patch / stride)."""


@dataclass(frozen=True)
class Place:
    """How a prepared volume lies on the image that was read. Axes are the image's."""

    name: str
    shape: tuple[int, ...]
    """(Z, Y, X) of the image."""
    geometry: Geometry
    """Of the image."""
    grid: Grid
    """Where the prepared voxels lie on the image."""
    known: torch.Tensor
    """Prepared voxels (Z, Y, X), bool: False on what was altered to make the subject unrecognisable."""
    foreground: torch.Tensor
    """Prepared voxels (Z, Y, X), bool: by the rule of the fingerprint."""


@dataclass(frozen=True)
class Volume:
    """An image as a network wants it."""

    data: torch.Tensor
    """(C, Z, Y, X), float32, axes in the plan's order. 0 where it was altered."""
    place: Place


@dataclass(frozen=True)
class FeatureMap:
    """Features of a whole image."""

    place: Place
    values: npt.NDArray[np.float16]
    """(D, Z, Y, X), axes in the image's order; a memory map where a folder for it was given."""
    known: torch.Tensor
    """(Z, Y, X), bool: cells that hold neither padding nor altered voxels."""
    foreground: torch.Tensor
    """(Z, Y, X), bool: cells that are foreground by half or more."""
    grid: Grid
    """Where the cells lie on the image."""


def prepare(
    frozen: Frozen,
    image: npt.NDArray[np.float32],
    geometry: Geometry,
    name: str,
    altered: npt.NDArray[np.bool_] | None = None,
) -> Volume:
    """Prepares an image as the checkpoint's plans say.

    Args:
        frozen: The encoder with its plans.
        image: (C, Z, Y, X), as it was read.
        geometry: Of the image.
        name: For messages.
        altered: (Z, Y, X), what was altered to make the subject unrecognisable.

    Raises:
        ValueError: If channels or dimensions differ from the checkpoint's, the image fills less than half of the patch
            along an axis, or it cannot be prepared.
    """
    configuration = frozen.configuration
    wanted = configuration.num_input_channels
    if len(image) != wanted:
        raise ValueError(
            f"{name} has {len(image)} channels, and the checkpoint's network takes {wanted}. Give one file per "
            "channel, joined by commas and in the order of the pretraining: T1.nii.gz,T2.nii.gz"
        )
    if configuration.dims == 3 and image.shape[1] == 1:
        raise ValueError(f"{name} is a picture of one slice, and the checkpoint's network is 3D: use one of a 2d plan")
    result = preprocess_array(image, geometry.spacing, frozen.plan, configuration, altered=altered)
    data = torch.from_numpy(result.data)
    patch = window_size(frozen)
    short = [axis for axis in range(3) if data.shape[axis + 1] < LEAST_COVER * patch[axis]]
    if short:
        raise ValueError(
            f"{name} has {tuple(data.shape[1:])} voxels at the checkpoint's spacing, less than half of the patch "
            f"{patch} that its network was trained on: what it would see is mostly padding. Use an image of more "
            "surroundings, or a checkpoint with a smaller patch"
        )
    if any(have < edge for have, edge in zip(data.shape[1:], patch, strict=True)):
        logger.info("%s, %s voxels, is smaller than the patch %s and padded.", name, tuple(data.shape[1:]), patch)
    known = torch.ones(data.shape[1:], dtype=torch.bool)
    if result.altered is not None:
        known = ~torch.from_numpy(result.altered)
        data = data * known
    order = configuration.transpose_backward
    masks = (mask.permute(order) for mask in (known, torch.from_numpy(result.foreground)))
    grid = prepared_grid(result.properties, data.shape[1:], order)
    return Volume(data, Place(name, image.shape[1:], geometry, grid, *masks))


def default_level(frozen: Frozen) -> int:
    """The deepest feature map whose cells are 4 voxels or less along every axis, else the finest."""
    dense = [level for level, stride in enumerate(frozen.encoder.strides) if max(stride) <= DENSE_STRIDE]
    return dense[-1] if dense else 0


def dense_features(
    frozen: Frozen, volume: Volume, level: int | None = None, what: What = "features", scratch: Path | None = None
) -> FeatureMap:
    """The features of a whole image, or what a transformer's last block attends to.

    Args:
        frozen: The encoder; it works on its own device.
        volume: Of `prepare`.
        level: Which feature map, 0 is the finest; None: `default_level`.
        what: `features`; or `attention`, whose channels are the mean over the heads and then each head, 1 being the
            even share of a window's tokens.
        scratch: A folder for a file that holds the result, so that memory does not; it leaves nothing behind.

    Raises:
        ValueError: If there is no such level, or a network without attention is asked for it.
    """
    encoder = frozen.encoder
    level = default_level(frozen) if level is None else level
    if not 0 <= level < len(encoder.strides):
        raise ValueError(f"level {level} is not there: this network has 0 (finest) to {len(encoder.strides) - 1}")
    return dense_map(frozen, _extractor(frozen, level, what), volume, encoder.strides[level], scratch)


def dense_map(
    frozen: Frozen, extract: Extract, volume: Volume, stride: Sequence[int], scratch: Path | None = None
) -> FeatureMap:
    """A map of a whole image, of whatever is made of each window.

    Args:
        frozen: Whose patch is the window, on whose device it works.
        extract: Makes a map of each window.
        volume: Of `prepare`.
        stride: Voxels of a cell of the map, an entry per axis of the patch.
        scratch: A folder for a file that holds the result, as in `dense_features`.
    """
    stride = (1,) * (3 - frozen.configuration.dims) + tuple(stride)
    cells = [-(-full // edge) for full, edge in zip(volume.data.shape[1:], stride, strict=True)]
    values: npt.NDArray[np.float16] | None = None
    for start, block in blend(frozen, extract, volume.data, stride):
        if values is None:
            values = storage((len(block), *cells), scratch)
        values[:, start : start + block.shape[1]] = block.clamp(-LARGEST, LARGEST).half().cpu().numpy()
    assert values is not None, "an image has voxels"
    return feature_map(volume.place, values, stride, frozen.configuration.transpose_backward)


def feature_map(
    place: Place, values: npt.NDArray[np.float16], stride: Sequence[int], order: Sequence[int]
) -> FeatureMap:
    """Values of cells, brought to the image's order of axes, with where they lie.

    Args:
        place: Of the prepared volume.
        values: (D, Z, Y, X), axes in the plan's order.
        stride: Voxels (z, y, x) of a cell, in the plan's order.
        order: The plan's `transpose_backward`.
    """
    step = [stride[axis] for axis in order]
    return FeatureMap(
        place,
        values.transpose(0, *(axis + 1 for axis in order)),
        known=cell_shares(place.known, step) == 1,
        foreground=cell_shares(place.foreground, step) >= 0.5,
        grid=coarser(place.grid, step),
    )


def storage(shape: tuple[int, ...], folder: Path | None) -> npt.NDArray[np.float16]:
    """Room for values: in memory, or in a nameless file in a folder, which ends when it is no longer used."""
    if folder is None:
        return np.empty(shape, dtype=np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=np.float16, mode="w+", shape=shape)


def cell_shares(mask: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The share of each cell of `stride` voxels where a mask (Z, Y, X) is True; beyond the mask it is False."""
    gaps = [-size % edge for size, edge in zip(mask.shape, stride, strict=True)]
    padded = functional.pad(mask.float(), [side for gap in reversed(gaps) for side in (0, gap)])
    return functional.avg_pool3d(padded[None], tuple(stride))[0]


def _extractor(frozen: Frozen, level: int, what: What) -> Extract:
    encoder = frozen.encoder
    if is_transformer(encoder):
        token = encoder.token_size

        def of_tokens(crops: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            kept, grid = shown_tokens(real, token), [n // e for n, e in zip(crops.shape[2:], token, strict=True)]
            if what == "features":
                found = encoder.tokens(crops, kept).float().transpose(1, 2)
            else:
                from nnssl_ext.downstream.attention import last_attention

                found = last_attention(encoder, crops, kept)
                found = torch.cat([found.mean(1, keepdim=True), found], 1)
            return put_back(found, kept).unflatten(2, grid)

        return of_tokens
    if what == "attention":
        raise ValueError("this checkpoint's network is a U-Net, which has no attention to show")
    return lambda crops, _: encoder.feature_maps(crops)[level].float()


def shown_tokens(real: torch.Tensor, token: Sequence[int]) -> torch.Tensor:
    """The tokens that hold anything real: those of pure padding are not shown to a transformer.

    Args:
        real: (n, 1, *patch), bool.
        token: Voxels per axis.

    Returns:
        (n, tokens), int64: indices in rising order, then -1.
    """
    pool = functional.max_pool3d if real.ndim == 5 else functional.max_pool2d
    some = pool(real.float(), tuple(token)).flatten(1) > 0
    number = some.shape[1]
    places = torch.where(some, torch.arange(number, device=real.device), number).sort(1).values
    return torch.where(places < number, places, -1)


def put_back(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Values (n, K, tokens) of kept tokens at their places, 0 elsewhere."""
    spare = torch.zeros(*values.shape[:2], kept.shape[1] + 1, device=values.device)  # what is empty goes to the end
    places = torch.where(kept >= 0, kept, kept.shape[1])[:, None].expand_as(values)
    return spare.scatter(2, places, values)[..., :-1]


@torch.no_grad()
def blend(
    frozen: Frozen, extract: Extract, data: torch.Tensor, stride: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The maps of overlapping windows as one, in slabs along the first axis, as they are finished.

    Args:
        frozen: Whose patch is the window.
        extract: Makes a map of each window.
        data: (C, Z, Y, X).
        stride: Voxels (z, y, x) of a cell of the map.

    Yields:
        First cell of the slab, and its maps (K, z, y, x) in float32 on the encoder's device.
    """
    size = window_size(frozen)
    every = windows(data.shape[1:], size, multiple=stride)
    depth, *edges = (edge // step for edge, step in zip(size, stride, strict=True))
    wide = [max(w.lower[axis] // stride[axis] for w in every) + edges[axis - 1] for axis in (1, 2)]
    cells = [-(-full // step) for full, step in zip(data.shape[1:], stride, strict=True)]
    weight = gaussian((depth, *edges)).to(next(frozen.encoder.parameters()).device)
    rows = [list(group) for _, group in groupby(every, key=lambda window: window.lower[0])]
    carried: torch.Tensor | None = None
    for here, following in zip_longest(rows, rows[1:]):
        first = here[0].lower[0] // stride[0]
        total: torch.Tensor | None = None
        for window, found in _extracted(frozen, extract, data, here):
            if total is None:
                total = weight.new_zeros(len(found) + 1, depth, *wide)
                if carried is not None:
                    total[:, : carried.shape[1]] = carried
            y, x = (slice(low := window.lower[a] // stride[a], low + edges[a - 1]) for a in (1, 2))
            total[:-1, :, y, x] += found.reshape(len(found), *weight.shape) * weight
            total[-1, :, y, x] += weight
        assert total is not None, "a row holds windows"
        ready = (following[0].lower[0] // stride[0] if following else cells[0]) - first
        finished, carried = total[:, :ready, : cells[1], : cells[2]], total[:, ready:]
        yield first, finished[:-1] / finished[-1]


def _extracted(
    frozen: Frozen, extract: Extract, data: torch.Tensor, some: Sequence[Window]
) -> Iterator[tuple[Window, torch.Tensor]]:
    inside = torch.ones(1, *data.shape[1:], dtype=torch.bool)
    for group, crops in batches(frozen, data, some):
        real = torch.stack([crop_window(inside, window, window_size(frozen)) for window in group])
        maps = extract(crops, real.reshape(len(group), 1, *crops.shape[2:]).to(crops.device))
        yield from zip(group, maps, strict=True)


def gaussian(size: Sequence[int]) -> torch.Tensor:
    """Weights that fall off from the middle of a window of so many cells, (*size), all above 0."""
    axes = []
    for edge in size:
        distance = (torch.arange(edge) + 0.5) / edge - 0.5
        axes.append(torch.exp(-((distance / SIGMA) ** 2) / 2))
    z, y, x = axes
    return z[:, None, None] * y[:, None] * x
