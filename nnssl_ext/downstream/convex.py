"""Displacements that bring two sets of dense features onto each other: a global search, then gradient descent.

1. Discrete: the distance of features under every displacement within reach, on coarse cells. A displacement for each
   cell and a smooth field are found in turns, drawn together more and more strongly (coupled convex optimisation;
   Heinrich et al. 2014, WBIR). Both directions are searched and made inverses of each other.
2. Continuous: Adam on a finer field, kept smooth by a B-spline-like average and by its gradients (diffusion).

That is ConvexAdam (Siebert, Hansen, Heinrich, IEEE TMI 2024, doi:10.1109/TMI.2024.3462248), written anew, for any
features. Different here: borders go on instead of ending in zeros, coarse cells fill the volume whatever its size, and
the whole is 2D where an axis has one voxel.

Fields are (3, Z, Y, X), in voxels along (z, y, x): a place x of the fixed image shows what is at x + field(x) of the
moving one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from nnssl_ext.downstream.mind import box_mean, continued
from nnssl_ext.models import fields

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""How strongly matches and smooth field are drawn together, one round each. Heinrich et al. 2014."""
REST = 1e-3
"""Cost of a squared displacement of one cell where nothing is known."""
INVERSE_ROUNDS = 15
SMOOTHINGS = 3
"""Averages over 3 positions that a field goes through: nearly a cubic B-spline."""
ADAM_EPS = 1e-3
"""Gradients of a cell below this, which images that fit already have, move it less and less."""
COARSEST = 6
CELLS_PER_AXIS = 12


@dataclass(frozen=True, kw_only=True)
class ConvexConfig:
    """How two sets of features are matched."""

    cell: int = 0
    """Voxels per axis of a cell of the search; 0: a twelfth of the shortest axis, from 2 to 6 (6 in the paper)."""
    reach: int = 4
    """Cells that the search looks away from each cell, in each direction. The paper's."""
    fine: int = 2
    """Voxels per axis of a cell of the refined field. The paper's."""
    steps: int = 80
    """Of Adam; 0 leaves it out. The paper's."""
    lr: float = 0.1
    """Of Adam, in fine cells."""
    regularization: float = 0.1
    """Weight of the squared gradients of the displacement beside the squared distance of features."""

    def __post_init__(self) -> None:
        if min(self.cell, self.steps) < 0 or min(self.reach, self.fine) < 1:
            raise ValueError(
                f"cell={self.cell} and steps={self.steps} must be 0 or more, reach={self.reach} and fine={self.fine} "
                "1 or more"
            )
        if not (self.lr > 0 and self.regularization >= 0):
            raise ValueError(f"lr={self.lr} must be above 0, regularization={self.regularization} 0 or more")


def match(fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, config: ConvexConfig) -> torch.Tensor:
    """The displacements between two sets of features on the same voxels, cubes all of them.

    Args:
        fixed: (C, Z, Y, X), float32, scaled to a total variance of about 1.
        moving: (C, Z, Y, X).
        weight: (Z, Y, X), how much each place of the fixed one counts, 0 where nothing is known.
        config: How.

    Returns:
        The field (3, Z, Y, X).
    """
    shape = fixed.shape[1:]
    cell = config.cell or min(max(min(size for size in shape if size > 1) // CELLS_PER_AXIS, 2), COARSEST)
    with torch.no_grad():
        one, other, counts = (pooled(values, cell) for values in (fixed, moving, weight[None]))
        forward = search(one, other, counts, config.reach)
        backward = search(other, one, torch.ones_like(counts), config.reach)
        field = resized(consistent(forward, backward), shape)
    return refine(fixed, moving, weight, field, config) if config.steps else field


def pooled(values: torch.Tensor, cell: int) -> torch.Tensor:
    """Means over cells of about that many voxels per axis, which fill the volume: (C, Z, Y, X) to fewer positions."""
    z, y, x = (max(round(size / cell), 1) for size in values.shape[1:])
    return functional.adaptive_avg_pool3d(values, (z, y, x))


def search(fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, reach: int) -> torch.Tensor:
    """The coupled convex optimisation, in cells.

    Args:
        fixed: (C, Z, Y, X).
        moving: (C, Z, Y, X).
        weight: (1, Z, Y, X).
        reach: Displacements along each axis, in each direction.

    Returns:
        The field (3, Z, Y, X).
    """
    shape = fixed.shape[1:]
    sides = [reach if size > 1 else 0 for size in shape]
    axes = [torch.arange(-side, side + 1, device=fixed.device) for side in sides]
    steps = torch.cartesian_prod(*axes).view(-1, 3)
    cost = _costs(fixed, moving, weight, steps, sides)
    field = box_mean(steps.T.to(fixed)[:, cost.argmin(0)])
    for strength in STRENGTHS:
        apart = [(axis.view(-1, 1, 1, 1) - part) ** 2 for axis, part in zip(axes, field, strict=True)]
        penalty = apart[0][:, None, None] + apart[1][None, :, None] + apart[2][None, None, :]
        best = torch.add(cost, penalty.flatten(0, 2), alpha=strength).argmin(0)
        field = box_mean(steps.T.to(fixed)[:, best])
    return field


def _costs(
    fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor, sides: Sequence[int]
) -> torch.Tensor:
    """The squared distance of features under each displacement, averaged over neighbours, (displacements, Z, Y, X).

    Where nothing is known, small displacements cost less.
    """
    around = continued(moving, sides)
    costs = []
    for low in (steps + torch.tensor(sides, device=steps.device)).tolist():
        there = around[(slice(None), *(slice(a, a + size) for a, size in zip(low, fixed.shape[1:], strict=True)))]
        costs.append(((fixed - there) ** 2).sum(0) * weight[0])
    summed, norm = (box_mean(box_mean(values)) for values in (torch.stack(costs), weight))
    known = norm > torch.finfo(torch.float32).eps
    rest = REST * (steps**2).sum(1).view(-1, 1, 1, 1)
    return torch.where(known, summed / norm.where(known, 1), rest)


def consistent(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """The forward field, after both have been drawn to being inverses of each other."""
    for _ in range(INVERSE_ROUNDS):
        forward, backward = (
            (forward - warp(backward, forward)) / 2,
            (backward - warp(forward, backward)) / 2,
        )
    return forward


def refine(
    fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, field: torch.Tensor, config: ConvexConfig
) -> torch.Tensor:
    """Adam on the displacements of fine cells, from a first field; arguments and result as of `match`."""
    goal, source, counts = (pooled(values, config.fine) for values in (fixed, moving, weight[None]))
    counts = counts / counts.mean().clamp(min=torch.finfo(torch.float32).eps)
    knots = resized(field, goal.shape[1:]).requires_grad_()
    optimiser = torch.optim.Adam([knots], lr=config.lr, eps=ADAM_EPS)
    with torch.enable_grad():
        for _ in range(config.steps):
            optimiser.zero_grad()
            smooth = _smoothed(knots)
            distance = (counts * ((warp(source, smooth) - goal) ** 2).sum(0)).mean()
            loss = distance + config.regularization * diffusion(smooth)
            (loss * goal[0].numel()).backward()  # so that a cell's gradient does not depend on how many there are
            optimiser.step()
    return resized(_smoothed(knots.detach()), fixed.shape[1:])


def _smoothed(field: torch.Tensor) -> torch.Tensor:
    for _ in range(SMOOTHINGS):
        field = box_mean(field)
    return field


def diffusion(field: torch.Tensor) -> torch.Tensor:
    """The mean over positions of the squared gradients of all components."""
    axes = [axis for axis in (1, 2, 3) if field.shape[axis] > 1]
    return torch.stack([(field.diff(dim=axis) ** 2).sum(0).mean() for axis in axes]).sum()


def resized(field: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A field on another number of positions over the same extent, its vectors counted in those."""
    return fields.resized(field[None], shape)[0]


def warp(values: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """Values (C, Z, Y, X) at x + field(x), interpolated linearly, the border going on."""
    return fields.warp(values[None], field[None])[0]
