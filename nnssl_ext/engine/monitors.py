"""Health of the features, for every method alike, measured on validation crops.

The loss alone does not show a collapse: published runs collapsed at a loss near zero and at the loss of chance. Three
numbers do, and each has a known floor: the effective rank of pooled features over crops, the spread of the tokens
within one crop, and how often a crop's nearest neighbour is another crop of the same case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from nnssl_ext.models.backbone import token_level
from nnssl_ext.models.encoder import Encoder

MIN_VALID_SHARE = 0.5
"""A token counts where at least this share of its cell lies inside the volume."""
MIN_CROPS_FOR_RANK = 3
"""With fewer crops the centred features span at most one direction, whatever they are."""


def effective_rank(features: torch.Tensor) -> float | None:
    """How many directions the features use, as a share of those they could: 0 one direction, 1 all alike.

    `(e^H - 1) / (min(N - 1, D) - 1)` with H the entropy of the normalised singular values of the centred features
    (Roy and Vetterli 2007, rescaled).

    Args:
        features: (N, D).

    Returns:
        A number in [0, 1]; 0 where all features are equal; None for fewer than `MIN_CROPS_FOR_RANK` rows or 2 columns.
    """
    num, width = features.shape
    if num < MIN_CROPS_FOR_RANK or width < 2:
        return None
    centred = (features - features.mean(0)).double()
    values = torch.linalg.svdvals(centred)
    scale = features.double().norm()
    if values.sum() <= torch.finfo(features.dtype).eps * scale * math.sqrt(num):
        return 0.0
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return float((entropy.exp() - 1) / (min(num - 1, width) - 1))


def token_spread(tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of a crop's unit-length tokens from their mean: 0 all equal, 1 pointing everywhere.

    Args:
        tokens: (B, N, D).
        valid: (B, N), False on tokens of padding, which are left out.

    Returns:
        (B,), each in [0, 1].
    """
    unit = functional.normalize(tokens, dim=-1)
    weight = valid.to(unit.dtype)[..., None]
    count = weight.sum(1).clamp(min=1)
    mean = (unit * weight).sum(1) / count
    squares = ((unit - mean[:, None]).square().sum(-1, keepdim=True) * weight).sum(1) / count
    return squares.squeeze(-1).sqrt()


def same_case_retrieval(features: torch.Tensor, cases: Sequence[str]) -> tuple[float, float] | None:
    """How often a crop's nearest neighbour (cosine, centred features) is another crop of the same case, and chance.

    Args:
        features: (N, D).
        cases: The case of every row.

    Returns:
        Accuracy and its chance level over the rows whose case has another row and that have a row of another case;
        None where there is no such row.
    """
    same = torch.tensor([[a == b for b in cases] for a in cases]).fill_diagonal_(False)
    others = len(cases) - 1
    counts = same.sum(1)
    askable = (counts > 0) & (counts < others)
    if not askable.any():
        return None
    unit = functional.normalize(features - features.mean(0), dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-math.inf).argmax(1)
    hits = same[torch.arange(len(cases)), nearest]
    return float(hits[askable].float().mean()), float((counts[askable] / others).mean())


def valid_share(valid: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The share of every cell that lies inside the volume.

    Args:
        valid: (B, 1, *patch), False on padding.
        size: Positions of a feature map along each axis.

    Returns:
        (B, positions), each in [0, 1].
    """
    return functional.interpolate(valid.float(), size=list(size), mode="area").flatten(1)


class FeatureMonitor:
    """Collects features of validation crops and turns them into the monitors of an epoch."""

    def __init__(self) -> None:
        self.pooled: list[torch.Tensor] = []
        self.spread: list[torch.Tensor] = []
        self.cases: list[str] = []

    def add(self, encoder: Encoder, data: torch.Tensor, valid: torch.Tensor, cases: Sequence[str]) -> None:
        """Add a batch of crops.

        Args:
            encoder: The backbone, in eval mode.
            data: (B, C, *patch).
            valid: (B, 1, *patch), False on padding.
            cases: The case of every crop.
        """
        maps = encoder.feature_maps(data)
        tokens, deepest = maps[token_level(encoder.strides, data.shape[2:])].float(), maps[-1].float()
        inside = valid_share(valid, tokens.shape[2:]) >= MIN_VALID_SHARE
        weight = valid_share(valid, deepest.shape[2:])
        pooled = (deepest.flatten(2) * weight[:, None]).sum(2) / weight.sum(1, keepdim=True).clamp(
            min=torch.finfo(weight.dtype).tiny
        )
        self.spread.append(token_spread(tokens.flatten(2).transpose(1, 2), inside).cpu())
        self.pooled.append(pooled.cpu())
        self.cases.extend(cases)

    def state(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Pooled features (N, D), token spreads (N,) and cases, on the CPU, for gathering over ranks."""
        return torch.cat(self.pooled), torch.cat(self.spread), self.cases


def summarise(states: Sequence[tuple[torch.Tensor, torch.Tensor, list[str]]]) -> dict[str, float]:
    """The monitors of the crops of all ranks; one that cannot be computed from so few crops is absent."""
    pooled = torch.cat([state[0] for state in states])
    spread = torch.cat([state[1] for state in states])
    cases = [case for state in states for case in state[2]]
    monitors = {"token_spread": float(spread.mean())}
    rank = effective_rank(pooled)
    if rank is not None:
        monitors["effective_rank"] = rank
    retrieval = same_case_retrieval(pooled, cases)
    if retrieval is not None:
        monitors["same_case_retrieval"], monitors["same_case_retrieval_chance"] = retrieval
    return monitors
