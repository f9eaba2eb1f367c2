"""Agreement of views: against plain loops, and where gradients go."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from nnssl_ext.losses.siamese import agreements


def test_it_is_the_slow_version_and_features_are_not_moved():
    """Catches one direction alone, lengths that matter, partners that are ignored, and gradients into what is asked
    for, by which views agree at once: planted once, half the gradient came that way."""
    features, predictions = (torch.randn(3, 4, 5, requires_grad=True) for _ in range(2))
    partner = torch.tensor([2, 0, 3, 1])
    found = agreements(features, predictions, partner)
    for a in range(3):
        for b in range(3):
            for n in range(4):
                one = cosine_similarity(predictions[a, n], features[b, partner[n]], dim=0)
                other = cosine_similarity(predictions[b, n], features[a, partner[n]], dim=0)
                assert found[a, b, n].item() == pytest.approx((one + other).item() / 2, abs=1e-5)
    found.sum().backward()
    assert features.grad is None
    assert predictions.grad is not None
