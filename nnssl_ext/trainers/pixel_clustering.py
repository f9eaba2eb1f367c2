"""Pixel-level clustering: voxels are clustered by simple features, and a network predicts the cluster of each.

The clusters are found once, by k-means over foreground voxels of many cases, and then stay. In training every crop is
labelled by them as it is, clean and with its surroundings; then it is moved, with its labels, and its intensities
change: the network has to tell the clusters all the same. It has no skip connections, so that they have to pass through
its deepest features.

Papers: Caron et al. 2018 (arXiv:1807.05520) for images, and for voxels the thesis of Gogou (2024). Other than there,
features are the image under several Gaussians, or those of a checkpoint; the clusters of the whole run are those of one
fit; rare clusters weigh more; padding and flat background are not asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from nnssl_ext.core.checks import at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.cluster_ce import cluster_cross_entropy, cluster_metrics, cluster_weights
from nnssl_ext.models.backbone import build_encoder, is_transformer
from nnssl_ext.models.cluster_model import ClusterModel, check_crops, load_clusters
from nnssl_ext.models.clusters import Clusters
from nnssl_ext.models.gaussian_scales import GaussianScales
from nnssl_ext.models.queue import all_rows, case_keys
from nnssl_ext.models.skipless import CONVS, SkiplessDecoder
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import UNMOVED, place_pair
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.labels import NOTHING, labels_in_view, labels_of_other_view
from nnssl_ext.views.occupancy import occupied_cells
from nnssl_ext.views.overlapping import with_overlap
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, draw_transform
from nnssl_ext.views.tokens import whole_only, whole_places
from nnssl_ext.views.transform import SpatialTransform, SpatialView, apply_transform

_HALF = 0.5
"""Share of a cell that has to be textured; here cells are voxels."""


@dataclass(frozen=True, kw_only=True)
class PixelClusteringConfig:
    """Settings of pixel-level clustering."""

    clustering: Path | None = None
    """File of `nnssl_cluster fit` whose clusters are predicted, needed again on resuming; None: clusters of Gaussian
    scales, found at the start of the run in crops of the cases that it trains on."""
    num_clusters: int = 10
    """Clusters, 2 or more; as many as in the file where there is one."""
    fit_cases: int = 500
    """Training cases that clusters are found in, 1 or more; fewer where there are fewer."""
    per_case: int = 200
    """Foreground voxels of each that are looked at, 1 or more."""
    weight_limits: tuple[float, float] = (0.1, 10.0)
    """Least and greatest weight of a cluster in the loss, above 0: it is `1 / (K * share)`."""
    border: int = 6
    """Voxels that are read and labelled beyond the patch on every side, along its shortest edge, 0 or more: features at
    the border of a crop miss what lies beyond."""
    background_std: float = 0.05
    """Voxels around which intensities deviate by less are background, 0 or more."""
    swapped: bool = False
    """Whether two views are labelled, each as it was moved, and each one's labels are predicted from the other, where
    both look."""
    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Where swapped: smallest and largest edge of a view as a share of the largest that fits, in (0, 1]."""
    shift: float = 0.15
    """Where swapped: longest way along each axis that the second view is moved away, as a share of its edge, in [0,
    1)."""
    least_overlap: float = 0.3
    """Where swapped: least intersection over union of the two views, in [0, 1]; else they are cut at one place."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How views are moved in training, labels and all; without scaling and elastic deformation where swapped."""
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    """How intensities change in training, after labels were made. Where values are measured (CT), brightness, contrast
    and gamma stay as they are."""

    def __post_init__(self) -> None:
        at_least(self, num_clusters=2, fit_cases=1, per_case=1, border=0, background_std=0)
        rising(self, "(0, inf)", "weight_limits")
        within(self, "[0, 1]", "least_overlap")
        within(self, "[0, 1)", "shift")
        rising(self, "(0, 1]", "crop_scale")
        if self.swapped and self.spatial.elastic:
            raise ValueError(f"spatial.elastic={self.spatial.elastic} must be 0 where swapped: its inverse is unknown.")


class PixelClustering(PretextTask):
    """Predicts the cluster of every voxel; see the module."""

    Config = PixelClusteringConfig
    info = TaskInfo(
        idea="cluster voxels by simple features, and predict the cluster of each from a changed image",
        paper="arXiv:1807.05520",
        choose="where intensities alone tell tissues apart, as in MR of one protocol or CT; its maps can be looked at "
        "before anything is trained. It hands on no decoder.",
        encoders={"cnn", "vit"},
    )
    config: PixelClusteringConfig

    def __init__(self, config: PixelClusteringConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds encoder and decoder, and takes up the clusters or makes room for them.

        Raises:
            FileNotFoundError: If there is no such file of clusters.
            ValueError: Where the network cannot be built, or the file's clusters do not fit.
        """
        super().__init__(config, configuration, num_cases)
        self.cell, self.num_clusters = (1,) * configuration.dims, config.num_clusters
        self.encoder = build_encoder(configuration)
        self.decoder = SkiplessDecoder(self.encoder)
        self.output = CONVS[configuration.dims](self.decoder.channels[-1], config.num_clusters, 1)
        self.labels = _clusters(config, configuration)
        self.parent_scale = 1 + 2 * config.border / min(configuration.patch_size)
        self.first_look = 0 if config.clustering else config.fit_cases

    def begin(self, batches: Iterable[tuple[Batch, SampleRandom]]) -> None:
        """Finds the clusters, from the first crop of every case; see `PretextTask`."""
        per_case, found = self.config.per_case, []
        for batch, random in batches:
            image = torch.where(batch.valid, batch.data, 0)
            features = self.labels.features(image, batch.valid).flatten(2).transpose(1, 2)
            may = self._foreground(image, batch.valid).flatten(1)
            draw = torch.from_numpy(random.uniform("draw", shape=(may.shape[1],))).to(may.device)
            best, chosen = torch.where(may, draw, -1).topk(min(per_case, may.shape[1]), dim=1)
            rows = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))
            keys = case_keys(batch.cases, may.device)
            found.append([all_rows(each) for each in (rows, best >= 0, keys)])
        rows, drawn, keys = (torch.cat(parts) for parts in zip(*found, strict=True))
        first = (keys == keys[:, None]).int().argmax(1) == torch.arange(len(keys), device=keys.device)
        self.labels.clusters.fit(rows[drawn & first[:, None]], random.seed)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops that were moved and changed in training, with the cluster of each voxel; in validation as they are.

        In validation a crop is cut anywhere from what was read. Where swapped, there are two views of each crop, the
        first ones of all crops before the second ones.

        Returns:
            `image` (B, C, *patch); `classes` (B, 1, *patch), int64, 0 where it is not asked for; `asked` and `valid`
            (B, 1, *patch), bool; for a transformer also `kept`, the tokens without padding.
        """
        seen, labels = self._swapped(batch, random, train) if self.config.swapped else self._plain(batch, random, train)
        images, valid = [each.data for each in seen], torch.cat([each.valid for each in seen])
        classes = torch.cat(labels)
        if train:
            intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes)
            images = [
                intensity_view(each.data, each.valid, random.child(f"intensity{number}"), intensity, inplace=True)
                for number, each in enumerate(seen)
            ]
        known = whole_only(valid, self.encoder.token_size) if is_transformer(self.encoder) else {"valid": valid}
        asked = known["valid"] & (classes != NOTHING)
        return {"image": torch.cat(images), "classes": torch.where(asked, classes, 0), "asked": asked, **known}

    def _plain(self, batch: Batch, random: SampleRandom, train: bool) -> tuple[list[SpatialView], list[torch.Tensor]]:
        """One view, and the labels of the crop it was taken from."""
        config, size = self.config, self.configuration.patch_size
        if train:
            where = draw_transform(batch.valid, batch.spacing, random.child("spatial"), config.spatial, size)
        else:
            where = _somewhere(batch, random.child("place"), size)
        labels = self._labelled(torch.where(batch.valid, batch.data, 0), batch.valid)
        return [apply_transform(batch.data, batch.valid, where)], [labels_in_view(labels, where)]

    def _swapped(self, batch: Batch, random: SampleRandom, train: bool) -> tuple[list[SpatialView], list[torch.Tensor]]:
        """Two overlapping views, and for each the labels of the other one."""
        config = self.config
        moves = replace(config.spatial, scaling=0) if train else UNMOVED
        size, crops = self.configuration.patch_size, random.child("crops")
        pair = place_pair(batch.valid, batch.spacing, crops, config.crop_scale, size, moves, config.shift)
        pair = with_overlap(*pair, config.least_overlap)
        seen = [apply_transform(batch.data, batch.valid, place) for place in pair]
        own = [self._labelled(view.data, view.valid) for view in seen]
        first, second = pair
        return seen, [labels_of_other_view(own[1], second, first), labels_of_other_view(own[0], first, second)]

    def _labelled(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The cluster of every voxel, `NOTHING` on background: (B, 1, *size), of images that are 0 where not valid."""
        return torch.where(self._foreground(image, valid), self.labels(image, valid), NOTHING)

    def _foreground(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return occupied_cells(image, valid, (1,) * (image.ndim - 2), self.config.background_std, _HALF)

    @property
    def weights(self) -> torch.Tensor:
        """Of the clusters in the loss, (K,)."""
        return cluster_weights(self.labels.clusters.shares, self.config.weight_limits)

    def forward(self, views: Views) -> StepOutput:
        """Cross-entropy of the clusters; see `cluster_metrics`."""
        classes, asked = views["classes"], views["asked"]
        logits = self._logits(views["image"], views.get("kept"))
        metrics = cluster_metrics(logits.detach(), classes, asked, self.weights, self.labels.clusters.shares)
        images = None
        if not self.training:
            maps = {"assignment": classes, "prediction": logits.detach().argmax(1, keepdim=True)}
            images = {"input": views["image"], **{name: (each + 1) * asked for name, each in maps.items()}}
        loss = cluster_cross_entropy(logits, classes, asked, self.weights)
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def _logits(self, image: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if is_transformer(self.encoder):
            assert kept is not None
            deepest = put_back(self.encoder.tokens(image, kept), kept, self.encoder.grid)
        else:
            deepest = self.encoder(image)[-1]
        return self.output(self.decoder(deepest)[-1])

    def scores(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Logits of every voxel's cluster, (B, K, *patch), of images (B, C, *patch), valid (B, 1, *patch), bool."""
        kept = whole_places(valid, self.encoder.token_size) if is_transformer(self.encoder) else None
        return self._logits(torch.where(valid, image, 0), kept).float()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The clusters are those of another case's voxels; see `PretextTask.sham`."""
        return restore_another_case(views, target="classes")

    def predictor(self) -> Mapping[str, torch.Tensor]:
        """The decoder and its output; see `PretextTask`."""
        return {name: value for name, value in self.state_dict().items() if name.startswith(("decoder.", "output."))}


def _clusters(config: PixelClusteringConfig, configuration: Configuration) -> ClusterModel:
    if config.clustering is None:
        scales = GaussianScales(configuration.dims, configuration.num_input_channels)
        return ClusterModel(scales, Clusters(*scales.channels, config.num_clusters))
    model, origin = load_clusters(config.clustering)
    if model.num_clusters != config.num_clusters:
        raise ValueError(
            f"{config.clustering} has {model.num_clusters} clusters and num_clusters={config.num_clusters}: add "
            f"--set num_clusters={model.num_clusters}"
        )
    check_crops(model, origin, configuration)
    return model


def put_back(tokens: torch.Tensor, kept: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Tokens (B, n, D) as a map (B, D, *grid), 0 where none was kept; `kept` (B, n) has their places, -1 for none."""
    number = prod(grid)
    spare = tokens.new_zeros(len(tokens), number + 1, tokens.shape[2])  # what is empty goes to the end
    places = torch.where(kept >= 0, kept, number)[..., None].expand_as(tokens)
    return spare.scatter(1, places, tokens)[:, :number].transpose(1, 2).unflatten(2, tuple(grid))


def _somewhere(batch: Batch, random: SampleRandom, size: tuple[int, ...]) -> SpatialTransform:
    """Whole voxels of a crop, cut anywhere within what is real, as far as it fits."""
    full = torch.tensor(batch.valid.shape[2:], device=batch.valid.device)
    edges = torch.tensor(size, device=batch.valid.device)
    place = torch.from_numpy(random.uniform("place", shape=(len(size),))).to(batch.valid.device)
    drawn = draw_transform(batch.valid, batch.spacing, random, UNMOVED, size, place=place)
    start = (drawn.centre - (edges - 1) / 2).round().clamp(min=0)
    centre = torch.minimum(start, full - edges) + (edges - 1) / 2
    return replace(drawn, centre=centre, unmoved=dict.fromkeys(range(len(centre)), ()))


@TRAINERS.register
class PixelClusteringTrainer(PretrainTrainer):
    """Pixel-level clustering with the recipe that masked autoencoders have here, so that the two can be compared.

    On a U-Net nnU-Net's SGD, on a transformer AdamW with warm-up.
    """

    task = PixelClustering
    cost = StepCost(views=1, copies=1, decoder=True)
    vit = VIT_RECIPE
