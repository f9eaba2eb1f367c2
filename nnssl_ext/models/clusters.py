"""Clusters of features that are found once and then stay where they are."""

from __future__ import annotations

import torch
from torch import nn

from nnssl_ext.core.random import seed_of

COMPONENTS = 32
"""Principal components that are kept, at most."""
RESTARTS = 10
"""Starts of k-means++, of which the one with the least inertia is taken."""
_TINY = 1e-6
"""Least deviation of a feature that tells anything."""


class Clusters(nn.Module):
    """Features are standardised and brought to their principal components; the nearest centroid names the cluster.

    All of it lies in buffers and nothing but `fit` changes any. Until then they are random, as a network's weights are
    before it has learned.

    Args:
        width: Of the features.
        num_clusters: 2 or more.
        num_components: Principal components that are kept, at most.
    """

    mean: torch.Tensor
    """(width,), of the features."""
    deviation: torch.Tensor
    """(width,), likewise, above 0."""
    components: torch.Tensor
    """(components, width), orthonormal, of standardised features."""
    centroids: torch.Tensor
    """(K, components), the largest cluster first."""
    shares: torch.Tensor
    """(K,), of the clusters in what they were fitted to."""

    def __init__(self, width: int, num_clusters: int, num_components: int = COMPONENTS) -> None:
        super().__init__()
        kept = min(num_components, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("components", torch.eye(kept, width))
        self.register_buffer("centroids", torch.randn(num_clusters, kept))
        self.register_buffer("shares", torch.full((num_clusters,), 1 / num_clusters))

    @torch.no_grad()
    def fit(self, sample: torch.Tensor, seed: int, restarts: int = RESTARTS) -> None:
        """Finds the clusters: k-means++, the best of several starts.

        Args:
            sample: (n, width), the features of as many places.
            seed: Of the starts.
            restarts: Their number.

        Raises:
            ValueError: If the sample has fewer different places than there are clusters.
        """
        values = sample.double().cpu()
        num, different = len(self.centroids), len(values.unique(dim=0))
        if different < num:
            raise ValueError(
                f"{num} clusters of {different} different foreground voxels are not possible: ask for fewer clusters, "
                "or give more images"
            )
        self.mean.copy_(values.mean(0))
        self.deviation.copy_(values.std(0, correction=0).clamp(min=_TINY))
        standard = (values - self.mean.cpu()) / self.deviation.cpu()
        directions = torch.linalg.eigh(standard.T @ standard)[1].flip(1)[:, : len(self.components)].T
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.components.copy_(directions * largest.sign())
        labels, centroids = _kmeans(standard @ self.components.double().cpu().T, num, seed, restarts)
        sizes = torch.bincount(labels, minlength=num)
        order = sizes.argsort(descending=True, stable=True)
        self.centroids.copy_(centroids[order])
        self.shares.copy_(sizes[order] / len(values))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Principal components (B, components, *size) of features (B, width, *size), float32."""
        standard = (features.float() - _column(self.mean, features)) / _column(self.deviation, features)
        return torch.einsum("kd,bd...->bk...", self.components, standard)

    def nearest(self, projected: torch.Tensor) -> torch.Tensor:
        """The nearest centroid of each place: (B, 1, *size), int64, from 0, of components (B, components, *size)."""
        likeness = torch.einsum("kc,bc...->bk...", self.centroids, projected)  # half of |c|² less the distance's square
        return (likeness - _column(self.centroids.square().sum(1) / 2, projected)).argmax(1, keepdim=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The cluster of each place: (B, 1, *size), int64, from 0, of features (B, width, *size)."""
        return self.nearest(self.project(features))


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 2))


def _kmeans(values: torch.Tensor, num: int, seed: int, restarts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (n,) and centroids (num, k) of values (n, k), on the CPU."""
    from sklearn.cluster import KMeans

    state = seed_of(seed, "kmeans") % 2**32
    found = KMeans(num, init="k-means++", n_init=restarts, random_state=state).fit(values.numpy())
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_)
