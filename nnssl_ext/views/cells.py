"""A crop as a grid of cells, and boxes in them, each resampled to a size that the network takes.

Boxes of neighbouring cells keep a gap and lie at random places in their cells. Where they touched, or overlapped, the
texture at their faces would tell which ones are neighbours, and nothing would have to be known of the anatomy. In
training each box has a brightness and a contrast of its own as well, but where values are measured; validation shows
images as they are.

On noise smoothed by 2, 3 and 4 voxels the most alike faces name the right one of four neighbours in .30, .38 and .51 of
160 crops in training and in .30, .40 and .54 in validation, but in .92 or more where cells touch. That is the limit:
faces of very smooth images are alike at any gap, and faces that are standardised first, as by instance normalisation,
tell as much in training as in validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.transform import valid_box

MIN_POSITIONS = 2
"""Positions per axis that the deepest feature map has at least: of a single one, instance normalisation leaves 0."""
SHARE = 6 / 7
"""Largest edge of a box as a share of its cell's; 36 of 42 voxels (Taleb et al. 2020, arXiv:2006.03829)."""
GAP = 2.0
"""Least number of voxels between boxes of neighbouring cells; in cells of few voxels less, see `boxes_in_cells`."""
BOX_INTENSITY = IntensityConfig(
    blur=0, low_resolution=0, brightness=1, brightness_range=(0.5, 1.5), contrast=1, contrast_range=(0.5, 1.5)
)
"""Of boxes of cells: brightness and contrast are drawn for every box, twice as far from 1 as usual, since rare or small
changes leave faces as alike as they were; blur and low resolution are off, since they would mix voxels over the gap."""
_TINY = 1e-4
"""Voxels between the first and the last real one where these are the same."""
_MIN_WEIGHT = 1 - 1e-3
"""Interpolation weight on real voxels from which a voxel is valid: 1 but for rounding of coordinates."""


@dataclass(frozen=True)
class Boxes:
    """Boxes in each of B crops, in voxels of the crop; voxel i reaches from i to i + 1."""

    lower: Tensor
    """(B, n, D): first corner."""
    edges: Tensor
    """(B, n, D)."""

    def of(self, index: Tensor) -> Boxes:
        """Some of each crop's boxes, by their numbers (B, m)."""
        where = index.unsqueeze(2).expand(-1, -1, self.lower.shape[2])
        return Boxes(self.lower.gather(1, where), self.edges.gather(1, where))


def grid_cells(valid: Tensor, grid: Sequence[int]) -> Boxes:
    """The cells of a regular grid: they tile what lies between the middles of the first and last real voxels.

    So whatever is interpolated in them is real.

    Args:
        valid: (B, 1, *crop), bool.
        grid: Cells per axis.

    Returns:
        The last axis fastest.
    """
    lower, upper = valid_box(valid)
    axes = [torch.arange(number, device=valid.device) for number in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    edges = (upper - lower).clamp(min=_TINY) / torch.tensor(grid, device=valid.device)
    edges = edges.unsqueeze(1).expand(-1, prod(grid), -1)
    return Boxes(lower.unsqueeze(1) + 0.5 + places * edges, edges)


def boxes_in_cells(cells: Boxes, random: SampleRandom) -> Boxes:
    """A box at a random place in each cell, none nearer to a neighbour's than `GAP`.

    An edge is the share `SHARE` of the cell's, or shorter, so that there is as much room to move as the gap is wide,
    but half the cell's at least: in a cell of less than four gaps the gap shrinks with it.

    Args:
        cells: Of a grid.
        random: Keyed by sample.
    """
    edges = torch.minimum(SHARE * cells.edges, torch.maximum(cells.edges - 2 * GAP, cells.edges / 2))
    slack = cells.edges - edges
    margin = (slack / 4).clamp(max=GAP / 2)
    draw = torch.from_numpy(random.uniform("place", shape=tuple(edges.shape[1:]))).to(edges)
    return Boxes(cells.lower + margin + draw * (slack - 2 * margin), edges)


def box_size(patch_size: Sequence[int], grid: Sequence[int], stride: Sequence[int], share: float = SHARE) -> list[int]:
    """Voxels that boxes in the cells of a whole patch are resampled to: about as many as they have, in whole strides.

    Args:
        patch_size: Voxels per axis.
        grid: Cells per axis.
        stride: Voxels per position of the deepest feature map, per axis; each axis gets two positions or more.
        share: Edge of a box as a share of the cell's.
    """
    edges = [share * size / number for size, number in zip(patch_size, grid, strict=True)]
    return [step * max(MIN_POSITIONS, round(edge / step)) for edge, step in zip(edges, stride, strict=True)]


def resample_boxes(data: Tensor, valid: Tensor, boxes: Boxes, size: Sequence[int]) -> Tensor:
    """The voxels of boxes, interpolated linearly.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        boxes: n in each crop.
        size: Voxels per axis to resample to.

    Returns:
        (B * n, C, *size), those of a crop in a row; 0 where what was interpolated is not all real.
    """
    return _resample(data, valid, boxes, size)[0]


def changed_boxes(
    data: Tensor,
    valid: Tensor,
    boxes: Boxes,
    size: Sequence[int],
    random: SampleRandom,
    config: IntensityConfig | None,
) -> Tensor:
    """The voxels of boxes with changed intensities: brightness and contrast of each box, all else of the whole crop.

    Args:
        data: (B, C, *crop).
        valid: (B, 1, *crop), bool.
        boxes: n in each crop.
        size: Voxels per axis to resample to.
        random: Keyed by sample.
        config: What may happen; the probabilities of brightness and contrast are per box. None: nothing.

    Returns:
        As `resample_boxes`.
    """
    if config is None:
        return resample_boxes(data, valid, boxes, size)
    data = intensity_view(data, valid, random, replace(config, brightness=0, contrast=0))
    sampled, real = _resample(data, valid, boxes, size)
    each = (boxes.lower.shape[1], data.shape[1])
    gain, stretch = (
        torch.from_numpy(_factors(random.child(name), getattr(config, name), getattr(config, f"{name}_range"), each))
        .to(sampled)
        .view(len(sampled), -1, *[1] * len(size))
        for name in ("brightness", "contrast")
    )
    return _brighten_and_stretch(sampled, real, gain, stretch)


def _factors(
    random: SampleRandom, probability: float, limits: tuple[float, float], shape: tuple[int, int]
) -> np.ndarray:
    """Factors of so many boxes and channels of each crop, (B, *shape), float32; 1 for boxes that are not drawn."""
    drawn = random.bernoulli("apply", probability, (shape[0], 1))
    return np.where(drawn, random.uniform("strength", *limits, shape), np.float32(1))


def _brighten_and_stretch(boxes: Tensor, real: Tensor, gain: Tensor, stretch: Tensor) -> Tensor:
    """Boxes stretched about their means within the range of values they had, and multiplied.

    All at once, since there are many and small ones.

    Args:
        boxes: (N, C, *size), 0 where not real; their memory is used.
        real: (N, 1, *size), bool.
        gain: (N, C, 1...), what is multiplied by, above 0.
        stretch: (N, C, 1...), above 0.
    """
    axes = tuple(range(2, boxes.dim()))
    mean = boxes.sum(axes, keepdim=True) / real.sum(axes, keepdim=True).clamp(min=1)
    values = boxes.sub_(mean).mul_(real)
    low, high = (edge(axes, keepdim=True).mul_(gain) for edge in (values.amin, values.amax))
    values.mul_(stretch * gain)
    torch.minimum(torch.maximum(values, low, out=values), high, out=values)
    return values.add_(mean * gain).mul_(real)


def _resample(data: Tensor, valid: Tensor, boxes: Boxes, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See `resample_boxes`; and where all that was interpolated is real, (B * n, 1, *size), bool."""
    dims, num_boxes, crop = len(size), boxes.lower.shape[1], data.shape[2:]
    places = []
    for axis, edge in enumerate(size):
        steps = (torch.arange(edge, device=data.device) + 0.5) / edge
        place = boxes.lower[:, :, axis, None] + boxes.edges[:, :, axis, None] * steps - 0.5
        shape = [1] * dims
        shape[axis] = edge
        normal = (2 * place + 1) / crop[axis] - 1  # grid_sample counts from -1 to 1 across the crop's edges
        places.append(normal.view(*place.shape[:2], *shape).expand(-1, -1, *size))
    grid = torch.stack(places[::-1], -1).flatten(1, 2)
    both = torch.cat([data.masked_fill(~valid, 0), valid.to(data.dtype)], 1)
    sampled = functional.grid_sample(both, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = sampled.unflatten(2, (num_boxes, -1)).transpose(1, 2).flatten(0, 1)
    real = sampled[:, -1:] >= _MIN_WEIGHT
    return sampled[:, :-1].masked_fill(~real, 0), real


def overlaps(boxes: Boxes, others: Boxes) -> Tensor:
    """Which share of each box lies in each other box.

    Args:
        boxes: n in each crop.
        others: m in each crop.

    Returns:
        (B, n, m), in [0, 1].
    """
    lower, edges = boxes.lower.unsqueeze(2), boxes.edges.unsqueeze(2)
    end = torch.minimum(lower + edges, (others.lower + others.edges).unsqueeze(1))
    shared = (end - torch.maximum(lower, others.lower.unsqueeze(1))).clamp(min=0)
    return (shared / edges).prod(3)
