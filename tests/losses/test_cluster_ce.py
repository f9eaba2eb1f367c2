"""The loss of clusters: softmax over clusters, weights by hand, and what is not asked for has no part."""

import math

import pytest
import torch

from nnssl_ext.losses.cluster_ce import cluster_cross_entropy, cluster_metrics, cluster_weights


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 2, 5, 3, generator=generator)
    classes = torch.randint(4, (3, 1, 2, 5, 3), generator=generator)
    asked = torch.rand(3, 1, 2, 5, 3, generator=generator) < 0.6
    asked[1] = False
    return logits, classes, asked, torch.tensor([0.5, 1.0, 2.0, 4.0])


def test_weights_by_hand():
    """Four clusters; 1/(4 * 1/4) is 1, and the rest is bounded. Catches weights that are not the inverse of a share, or
    without limits: an empty cluster would weigh infinitely."""
    shares = torch.tensor([0.25, 0.74, 0.01, 0.0])
    expected = torch.tensor([1.0, 1 / (4 * 0.74), 10.0, 10.0])
    torch.testing.assert_close(cluster_weights(shares, (0.1, 10.0)), expected)
    torch.testing.assert_close(cluster_weights(shares, (0.5, 2.0)), expected.clamp(0.5, 2))


def test_cross_entropy_by_plain_loops():
    """Catches a softmax over an axis of the image, weights of the predicted cluster, voxels that are not asked for, and
    samples that count by their number of voxels, or without any."""
    logits, classes, asked, weights = case()
    means = []
    for sample in (0, 2):
        total, count = 0.0, 0
        for z, y, x in asked[sample, 0].nonzero().tolist():
            scores = logits[sample, :, z, y, x].tolist()
            true = int(classes[sample, 0, z, y, x])
            total += weights[true].item() * (math.log(sum(map(math.exp, scores))) - scores[true])
            count += 1
        means.append(total / count)
    loss = cluster_cross_entropy(logits, classes, asked, weights)
    assert loss.item() == pytest.approx(sum(means) / 2, rel=1e-5)
    assert cluster_cross_entropy(logits, classes, torch.zeros_like(asked), weights) == 0


def test_chance_is_what_the_best_constant_reaches():
    """No constant prediction is better, and one reaches it. Catches a chance without the weights."""
    logits, classes, asked, weights = case()
    metrics = cluster_metrics(logits, classes, asked, weights, torch.full((4,), 0.25))
    constant = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([constant], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cluster_cross_entropy(constant.view(1, 4, 1, 1, 1).expand_as(logits), classes, asked, weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert metrics["cross_entropy_chance"].item() == pytest.approx(closure().item(), abs=1e-4)


def test_metrics_of_a_right_and_of_a_constant_prediction():
    """Catches an accuracy of all voxels together: telling the commonest cluster would beat chance."""
    classes = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]).view(1, 1, 8)
    asked = torch.ones(1, 1, 8, dtype=torch.bool)
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    right = 20 * torch.nn.functional.one_hot(classes[:, 0], 4).transpose(1, 2).float()
    metrics = cluster_metrics(right, classes, asked, torch.ones(4), shares)
    assert metrics["accuracy"] == 1
    assert metrics["accuracy_chance"].item() == pytest.approx(1 / 3)
    assert metrics["assignment_entropy"].item() == pytest.approx(0, abs=1e-5)
    entropy = -(0.75 * math.log(0.75) + 2 * 0.125 * math.log(0.125))
    for name in ("clusters_in_use", "clusters_predicted"):
        assert metrics[name].item() == pytest.approx(math.exp(entropy), rel=1e-5)
    assert metrics["largest_cluster"] == 0.75
    assert metrics["cluster_drift"].item() == pytest.approx((0.25 + 0.125 + 0 + 0.125) / 2)
    constant = cluster_metrics(
        torch.tensor([2.0, 1, 1, 1]).view(1, 4, 1).expand(1, 4, 8), classes, asked, torch.ones(4), shares
    )
    assert constant["accuracy"].item() == pytest.approx(1 / 3)
    assert constant["clusters_predicted"] == 1
