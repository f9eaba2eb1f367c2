"""Agreement of views without negatives (Chen and He 2021, SimSiam, arXiv:2011.10566, equation 2)."""

from __future__ import annotations

import torch
from torch.nn import functional


def agreements(features: torch.Tensor, predictions: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """How well each view predicts each other one, both ways.

    Args:
        features: (V, B, D), of V views of each sample; no gradient goes this way.
        predictions: (V, B, D), what a predictor makes of each.
        partner: (B,), the sample whose features each sample has to predict: itself, save in a sham.

    Returns:
        (V, V, B) in float32, symmetric: half the sum of both cosines, of one's prediction with the other's features.
    """
    with torch.autocast(features.device.type, enabled=False):
        wanted = functional.normalize(features.detach().float(), dim=-1)[:, partner]
        found = functional.normalize(predictions.float(), dim=-1)
        cosines = (found[:, None] * wanted).sum(-1)
    return (cosines + cosines.transpose(0, 1)) / 2
