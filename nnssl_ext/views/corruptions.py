"""Damage that a network learns to undo: boxes painted over, and intensities bent.

Damage is done to some rows of a batch and to real voxels alone. Noise and curves span the usual range of each channel's
real values, whatever their scale; nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from math import gcd, prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.transform import columns, valid_box

_CURVE_NODES = 512
"""Points that a curve is tabulated at."""
_MOST_SORTED = 2**17
"""Voxels of a crop, about, from which the usual range of its values is taken."""
_RARE = 0.005
"""Share of the values on either side that the usual range leaves out."""
_SEEDS = 2**62
_TINY = 1e-6
Change = Callable[[Tensor, Tensor, SampleRandom], Tensor]
"""(data, valid, random) of some rows -> their new data."""


def on_rows(data: Tensor, valid: Tensor, random: SampleRandom, chosen: npt.NDArray[np.bool_], change: Change) -> Tensor:
    """A copy of the batch with some rows changed. Which those are is known on the CPU, so no device is waited for.

    Args:
        data: (B, C, *patch).
        valid: (B, 1, *patch), bool.
        random: Keyed by sample.
        chosen: (B,), the rows to change.
        change: Is given these rows alone.

    Returns:
        (B, C, *patch), 0 on the padding of changed rows.
    """
    rows = np.flatnonzero(chosen)
    if not rows.size:
        return data
    own = replace(random, samples=tuple(random.samples[row] for row in rows))
    index = torch.from_numpy(rows).to(data.device)
    kept = valid[index]
    return data.index_copy(0, index, change(data[index], kept, own).masked_fill(~kept, 0))


def paint_boxes(
    random: SampleRandom, valid: Tensor, number: tuple[int, int], sides: Sequence[tuple[float, float]]
) -> Tensor:
    """Boxes of random size and place among the real voxels, painted one after the other.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool.
        number: Least and greatest number of boxes.
        sides: Shortest and longest edge along each axis as a share of the patch; a voxel or more, and no more
            than what is real.

    Returns:
        (B, 1, *patch), int64: the number, from 1, of the last box over a voxel; 0 where there is none.
    """
    size, most, device = valid.shape[2:], number[1], valid.device
    lower, upper = (corner.unsqueeze(1) for corner in valid_box(valid))
    extent = upper - lower + 1

    def draw(name: str) -> Tensor:
        return torch.from_numpy(random.uniform(name, shape=(most, len(size)))).to(device)

    low, high = torch.tensor(sides, device=device).T
    edges = ((low + draw("sides") * (high - low)) * torch.tensor(size, device=device)).round().clamp(min=1)
    edges = torch.minimum(edges, extent)
    first = lower + torch.minimum((draw("places") * (extent - edges + 1)).floor(), extent - edges)
    drawn = torch.from_numpy(random.integers("number", number[0], most + 1)).to(device)
    edges = edges * (torch.arange(most, device=device) < drawn.unsqueeze(1)).unsqueeze(2)
    voxels = [torch.arange(edge, device=device) for edge in size]
    within = [
        (voxel >= start.unsqueeze(2)) & (voxel < (start + edge).unsqueeze(2))
        for voxel, start, edge in zip(voxels, first.unbind(2), edges.unbind(2), strict=True)
    ]
    painted = torch.zeros(valid.shape, dtype=torch.int64, device=device)
    for box in range(most):
        painted = painted.masked_fill(_box([axis[:, box] for axis in within]), box + 1)
    return painted


def _box(within: Sequence[Tensor]) -> Tensor:
    """The voxels (B, 1, *size) that are within along every axis, each (B, edge)."""
    box = within[0].unsqueeze(1)
    for axis in within[1:]:
        box = box.unsqueeze(-1) & axis.view(len(axis), *[1] * (box.dim() - 1), -1)
    return box


def cut_out(
    random: SampleRandom, valid: Tensor, max_share: float, boxes: int, sides: Sequence[tuple[float, float]]
) -> Tensor:
    """Voxels under as many of a number of random boxes as hide no more than a share of the real voxels.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool.
        max_share: The largest hidden share, in (0, 1).
        boxes: Greatest number of boxes.
        sides: See `paint_boxes`.

    Returns:
        (B, 1, *patch), bool; padding may be hidden too, but does not count.
    """
    painted = paint_boxes(random, valid, (boxes, boxes), sides)
    counted = valid.flatten(1).double()
    last = torch.zeros(len(valid), boxes + 1, dtype=torch.float64, device=valid.device)
    last = last.scatter_add(1, painted.flatten(1), counted)
    together = last.flip(1).cumsum(1).flip(1)  # real voxels under box n or a later one
    few = together <= max_share * counted.sum(1, keepdim=True)
    few[:, 0] = False  # those under no box
    return painted >= columns((boxes + 1 - few.sum(1)).unsqueeze(1), valid.dim() - 2)


def fill_with_noise(data: Tensor, valid: Tensor, hidden: Tensor, random: SampleRandom) -> Tensor:
    """Uniform noise over the usual range of each channel, where hidden.

    Args:
        data: (B, C, *patch).
        valid: (B, 1, *patch), bool.
        hidden: (B, 1, *patch), bool.
        random: Keyed by sample.
    """
    low, high = usual_range(data, valid)
    return torch.where(hidden, low + random_voxels(data, random) * (high - low), data)


def noise_by_boxes(
    data: Tensor, valid: Tensor, random: SampleRandom, *, boxes: int, sides: tuple[float, float], around: bool
) -> Tensor:
    """Noise, as `fill_with_noise` draws it, in random boxes or around them.

    Args:
        data: (B, C, *patch).
        valid: (B, 1, *patch), bool.
        random: Keyed by sample.
        boxes: Their number.
        sides: Shortest and longest edge as a share of the patch's; see `paint_boxes`.
        around: Whether the boxes are spared and all else is filled.
    """
    painted = paint_boxes(random, valid, (boxes, boxes), [sides] * (data.ndim - 2))
    return fill_with_noise(data, valid, (painted > 0) ^ around, random)


def usual_range(data: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The range that holds all but the lowest and the highest half percent of each channel's real values.

    A few bright vessels may lie at ten standard deviations, and a range that reaches there is empty for the most part.
    Of large crops evenly spaced voxels are looked at, as often in every plane across any axis.

    Returns:
        Its ends, each (B, C, 1, ...); 0 and 1 where no real voxel is looked at.
    """
    step = _sparse_step(valid.shape[2:])
    real = valid.flatten(2)[..., ::step]
    values = data.flatten(2)[..., ::step].masked_fill(~real, torch.inf).sort(2).values
    number = real.sum(2, keepdim=True)
    last = (number - 1).clamp(min=0).expand(-1, data.shape[1], -1)
    ends = [
        values.gather(2, (last * share).round().long()).masked_fill(number == 0, empty)
        for share, empty in ((_RARE, 0), (1 - _RARE, 1))
    ]
    low, high = (end.view(*end.shape, *[1] * (data.dim() - 3)) for end in ends)
    return low, high


def _sparse_step(size: Sequence[int]) -> int:
    """Every how many-th voxel is looked at: a number without a factor in common with an edge, so no place is missed."""
    total = prod(size)
    return next(step for step in count(max(1, total // _MOST_SORTED)) if gcd(step, total) == 1)


def random_voxels(like: Tensor, random: SampleRandom) -> Tensor:
    """Uniform numbers in [0, 1) of the shape of a batch, made on its device from one seed per row."""
    numbers = torch.empty_like(like)
    for row, seed in zip(numbers, random.integers("voxels", 0, _SEEDS), strict=True):
        row.uniform_(generator=torch.Generator(like.device).manual_seed(int(seed)))
    return numbers


def bend_intensities(data: Tensor, valid: Tensor, random: SampleRandom) -> Tensor:
    """Every channel through a random cubic Bézier curve from its usual range onto itself, inverted half of the time.

    The non-linear transformation of Models Genesis (Zhou et al. 2019, arXiv:1908.06912). Its curves are made for values
    in [0, 1]: each channel's usual range is brought there and mapped back afterwards. What lies beyond either end stays
    as far beyond it, or beyond the other one where the channel is inverted, so no two values become one.

    Args:
        data: (B, C, *patch), on any scale.
        valid: (B, 1, *patch), bool.
        random: Keyed by sample.
    """
    channels = data.shape[1]
    low, high = usual_range(data, valid)
    unit = (data - low) / (high - low).clamp(min=_TINY)
    controls = torch.from_numpy(random.uniform("controls", shape=(channels, 2, 2))).to(data.device)
    inverted = torch.from_numpy(random.bernoulli("inverted", 0.5, (channels,))).to(data.device)
    inside = unit.clamp(0, 1)
    bent = bezier(inside.flatten(2), controls).view_as(unit) + (unit - inside)
    return low + torch.where(columns(inverted, data.dim() - 2), 1 - bent, bent) * (high - low)


def bezier(values: Tensor, controls: Tensor) -> Tensor:
    """A cubic Bézier curve from (0, 0) to (1, 1) as a function of its first coordinate.

    With both control points in the unit square either coordinate rises along the curve, so it is a function, and a
    rising one.

    Args:
        values: (..., N), in [0, 1].
        controls: (..., 2, 2): two control points, each (x, y) in the unit square.

    Returns:
        (..., N), in [0, 1].
    """
    t = torch.linspace(0, 1, _CURVE_NODES, device=values.device)
    weights = torch.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2])  # of the control points; that of the end is t³
    x, y = (controls.unsqueeze(-1) * weights.unsqueeze(1)).sum(-3).add(t**3).unbind(-2)
    after = torch.searchsorted(x.contiguous(), values.contiguous()).clamp(1, _CURVE_NODES - 1)
    x0, x1, y0, y1 = (nodes.gather(-1, index) for nodes in (x, y) for index in (after - 1, after))
    risen = torch.lerp(y0, y1, ((values - x0) / (x1 - x0).clamp(min=_TINY)).clamp(0, 1))
    return risen.masked_fill(values >= 1, 1)  # where the curve ends upright, several nodes share its last x
