"""Patch-level clustering: the tokens of a volume are assigned to prototypes, and one view predicts the other's.

Two overlapping crops are cut from one place, each moved and recoloured on its own. At places that both show, features
of either are compared with a small set of learned prototypes. Each view's tokens are assigned to prototypes such that
all prototypes get about the same share (Sinkhorn), and the other view has to predict these assignments.

Papers: Caron et al. 2020 (arXiv:2006.09882) for images, and for patches of volumes the thesis of Gogou (2024). Other
than there, places are drawn from the intersection of the crops in scanner coordinates; flat background neither takes
part in the balance nor in the loss; a token's features are those of its own map and all deeper ones, less what all
images have in common; and where a batch has few tokens those of earlier steps join in the balance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch.nn import functional

from nnssl_ext.core.checks import above_zero, at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.ranks import num_ranks, rank
from nnssl_ext.engine.alarms import Response
from nnssl_ext.engine.monitors import token_spread
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import (
    TRAINERS,
    VIT_RECIPE,
    Embeddings,
    PretextTask,
    PretrainTrainer,
    StepOutput,
    TaskInfo,
    Views,
)
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.sinkhorn import sinkhorn
from nnssl_ext.losses.swav import assignment_metrics, swapped_prediction
from nnssl_ext.models.backbone import build_encoder, token_level
from nnssl_ext.models.heads import PrototypeHead
from nnssl_ext.models.queue import EMPTY, FeatureQueue, all_rows, case_keys
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.models.targets import Targets
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import UNMOVED, place_pair
from nnssl_ext.views.intensity import IntensityConfig, recoloured
from nnssl_ext.views.masks import upsample_blocks
from nnssl_ext.views.occupancy import occupied_cells
from nnssl_ext.views.overlap import place_in
from nnssl_ext.views.overlapping import with_overlap
from nnssl_ext.views.places import across, picked, read_at, shared_places, unmoved
from nnssl_ext.views.sham import of_another_case
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.transform import apply_transform


@dataclass(frozen=True, kw_only=True)
class PatchClusteringConfig:
    """Settings of patch-level clustering."""

    prototypes: int = 50
    """Clusters, 2 or more."""
    width: int = 64
    """Of the projected tokens, 1 or more; at most twice that of the features."""
    places: int = 256
    """Tokens that are compared in each sample, 1 or more; fewer where the views share fewer."""
    temperature: float = 0.1
    """Divides the cosines of predictions, above 0. Caron et al. 2020."""
    target_temperature: float = 0.05
    """Divides those of assignments, above 0. Caron et al. 2020."""
    tokens_per_prototype: int = 16
    """Tokens for each prototype that the balance runs over, 0 or more; where a batch has fewer, those of earlier steps
    join in, never more than the cases outside the batch have."""
    freeze_share: float = 0.05
    """Share of the run, at its start, in which prototypes rest, in [0, 1)."""
    parent_scale: float = 1.4
    """Edge of the crop that both views are cut from, as a multiple of the patch's, 1 or more."""
    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Smallest and largest edge of a view as a share of the largest that fits into that crop, in (0, 1]."""
    shift: float = 0.15
    """Longest way along each axis that the second view is moved away from where the two lie within one another, as a
    share of its edge, in [0, 1)."""
    least_overlap: float = 0.3
    """Least intersection over union of the two views, in [0, 1]; a pair with less is cut at one place."""
    background_std: float = 0.05
    """Voxels around which intensities deviate by less are background, 0 or more."""
    least_occupancy: float = 0.5
    """Share of a token's voxels that are not background, in [0, 1], below which it is left out."""
    spatial: SpatialConfig = field(default_factory=lambda: SpatialConfig(rotation=0.5, scaling=0))
    """How each view is moved in training, without elastic deformation."""
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    """How each view's intensities change in training. Where values are measured (CT), brightness, contrast and gamma
    stay as they are."""

    def __post_init__(self) -> None:
        at_least(self, prototypes=2, width=1, places=1, tokens_per_prototype=0, parent_scale=1, background_std=0)
        above_zero(self, "temperature", "target_temperature")
        within(self, "[0, 1]", "least_overlap", "least_occupancy")
        within(self, "[0, 1)", "shift", "freeze_share")
        rising(self, "(0, 1]", "crop_scale")
        if self.spatial.elastic:
            raise ValueError(f"spatial.elastic={self.spatial.elastic} must be 0: its inverse is not known.")


class PatchClustering(PretextTask):
    """Predicts the clusters that another view's tokens are assigned to; see the module."""

    Config = PatchClusteringConfig
    info = TaskInfo(
        idea="assign the tokens of a volume to clusters, and predict from another view which ones",
        paper="arXiv:2006.09882",
        choose="where a map of recurring tissue patterns is wanted, or dense features from an encoder alone. It "
        "pretrains no decoder.",
        encoders={"cnn", "vit"},
    )
    config: PatchClusteringConfig
    before: torch.Tensor
    """(K, width): the prototypes before the last step."""
    drift: torch.Tensor
    """Mean distance that they moved in it, on the sphere of radius 1."""

    def __init__(self, config: PatchClusteringConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds encoder, projector and prototypes, and the queue where the balance needs one.

        Raises:
            ValueError: Where the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.parent_scale = config.parent_scale
        self.num_clusters = config.prototypes
        size = configuration.patch_size
        self.level = token_level(self.encoder.strides, size)
        self.cell = self.encoder.strides[self.level]
        self.places = min(config.places, prod(size) // 2)
        width = sum(self.encoder.channels[self.level :])
        self.standard = Standardise(width)
        self.head = PrototypeHead(width, config.prototypes, bottleneck_width=config.width, num_layers=2)
        self.targets = Targets(config.prototypes, config.target_temperature, sinkhorn)
        volumes = configuration.batch_size * num_ranks()
        missing = config.tokens_per_prototype * config.prototypes - volumes * self.places
        self.queue = FeatureQueue(min(missing, (num_cases - volumes) * self.places), self.head.bottleneck_width)
        self.register_buffer("before", functional.normalize(self.head.weight.detach(), dim=-1))
        self.register_buffer("drift", torch.zeros(()))

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two overlapping views and places that both show; in validation they are crops of random size and place.

        Returns:
            `first` and `second` (B, C, *patch); `here` and `there` (B, P, D), the places in either view, from -1 to 1
            across it; `counted` (B, P), bool; `partner` (B,), which second view belongs to each first one; `case`
            (B,), a number for each case. In validation also, for pictures, `cells_there` (B, N, D), where the second
            view shows the first one's cells, `cells_shown` (B, N), bool, whether it does, and `cells_occupied` alike.
        """
        config, size = self.config, self.configuration.patch_size
        moves = config.spatial if train else UNMOVED
        crops = random.child("crops")
        pair = place_pair(batch.valid, batch.spacing, crops, config.crop_scale, size, moves, config.shift)
        pair = with_overlap(*pair, config.least_overlap)
        first, second = (apply_transform(batch.data, batch.valid, place) for place in pair)
        where = place_in(pair[1], pair[0])
        occupied = occupied_cells(first.data, first.valid, self.cell, config.background_std, config.least_occupancy)
        asked = first.valid & upsample_blocks(occupied, self.cell, size)
        chosen, counted = shared_places(asked, where, size, random.child("places"), self.places)
        views = {
            "here": across(picked(unmoved(pair[0]).expand_as(where), chosen), size),
            "there": across(picked(where, chosen), size),
            "counted": counted,
            "partner": torch.arange(len(chosen), device=chosen.device),
            "case": case_keys(batch.cases, chosen.device),
        }
        if train:
            intensity = config.intensity.suited_to(self.configuration.normalization_schemes)
            first, second = recoloured(first, second, random, intensity)
        else:
            there = across(where.movedim(1, -1), size).movedim(-1, 1)
            cells = functional.interpolate(there, size=list(occupied.shape[2:]), mode="area").flatten(2)
            views["cells_there"] = cells.transpose(1, 2)
            views["cells_shown"] = (cells.abs() <= 1).all(1)
            views["cells_occupied"] = occupied.flatten(1)
        return {"first": first.data, "second": second.data, **views}

    def forward(self, views: Views) -> StepOutput:
        """Swapped prediction, beside what it is without looking; see `assignment_metrics`."""
        maps = self.encoder(torch.cat([views["first"], views["second"]]))[self.level :]
        ours, theirs = zip(*(features.chunk(2) for features in maps), strict=True)
        theirs = tuple(features[views["partner"]] for features in theirs)
        features = torch.stack([features_at(ours, views["here"]), features_at(theirs, views["there"])])
        counted, temperature = views["counted"], self.config.temperature
        embedded = self.head.embed(self.standard(features))
        scores = self.head.scores(embedded)
        targets = self.assign(scores.detach(), counted)
        if self.training:
            self.standard.collect(features, counted.expand(2, -1, -1))
            keys = torch.where(counted, views["case"][:, None], EMPTY)
            self.queue.push(all_rows(embedded[0].flatten(0, 1)), all_rows(keys.flatten()))
        metrics = assignment_metrics(scores.detach(), targets, counted, temperature)
        return StepOutput(
            loss=swapped_prediction(scores, targets, counted, temperature),
            metrics={**metrics, "prototype_drift": self.drift.clone()},
            images=self._pictures(views, ours, theirs) if "cells_there" in views else None,
            embeddings=Embeddings(
                first=embedded[0, :, 0].detach(),
                second=embedded[1, :, 0].detach(),
                targets=targets[0, :, 0],
                token_spread=token_spread(embedded[0].detach(), counted),
            ),
        )

    def assign(self, scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Balanced assignments of each view's tokens, together with those of earlier steps.

        Args:
            scores: (views, B, P, K), without gradient.
            counted: (B, P), bool; False on tokens that take no part in the balance.

        Returns:
            (views, B, P, K) in float32; rows sum to 1.
        """
        mine = slice(rank(), None, num_ranks())  # the queue is the same on all ranks, the balance runs over them
        earlier = self.head.scores(self.queue.rows[mine]).detach(), self.queue.keys[mine] != EMPTY
        return torch.stack([self.targets(view, counted, earlier) for view in scores])

    def _pictures(
        self, views: Views, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The first view, the clusters its tokens are assigned to, and those that the second view predicts there.

        Clusters are numbered from 1; 0 is background, and what the second view does not show.
        """
        size, occupied = self.configuration.patch_size, views["cells_occupied"]
        grid = ours[0].shape[2:]
        here = middles(grid, occupied.device).expand_as(views["cells_there"])
        both = torch.stack([features_at(ours, here), features_at(theirs, views["cells_there"])])
        with torch.no_grad():
            scores = self.head(self.standard(both))
            assigned = self.assign(scores[:1], occupied)[0].argmax(-1) + 1
        predicted = scores[1].argmax(-1) + 1
        shown = occupied & views["cells_shown"]
        maps = {"assignment": assigned * occupied, "prediction": predicted * shown}
        cells = {name: labels.view(-1, 1, *grid) for name, labels in maps.items()}
        return {
            "input": views["first"],
            **{name: upsample_blocks(labels, self.cell, size) for name, labels in cells.items()},
        }

    def scores(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Cosines of every token with the prototypes over the temperature: (B, K, *cells).

        Args:
            image: (B, C, *patch).
            valid: (B, 1, *patch), bool, False on padding.
        """
        maps = self.encoder(torch.where(valid, image, 0))[self.level :]
        grid = maps[0].shape[2:]
        here = middles(grid, image.device).expand(len(image), -1, -1)
        scores = self.head(self.standard(features_at(maps, here)))
        return scores.transpose(1, 2).unflatten(2, grid) / self.config.temperature

    def predictor(self) -> Mapping[str, torch.Tensor]:
        """What leads from the encoder to the prototypes; see `PretextTask`."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if name.startswith(("standard.", "head."))}

    def after_step(self, step: int, total: int) -> None:
        """Brings prototypes back to length 1, and says whether they move in the next step."""
        self.head.weight.copy_(functional.normalize(self.head.weight, dim=-1))
        self.drift.copy_((self.head.weight - self.before).norm(dim=-1).mean())
        self.before.copy_(self.head.weight)
        self.head.moving.fill_(float(step + 1 >= self.config.freeze_share * total))
        self.standard.update()
        self.targets.update(0, self.config.target_temperature)

    def respond(self, response: Response) -> str:
        """Softens assignments; flat ones are balance's own, and no temperature helps; see `PretextTask`."""
        return self.targets.soften() if response == "soften" else ""

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The second view is another case's; see `PretextTask.sham`."""
        return {**views, "partner": of_another_case(views["partner"])}


def features_at(maps: Sequence[torch.Tensor], place: torch.Tensor) -> torch.Tensor:
    """Features of maps (B, C, *size) at places (B, P, D) from -1 to 1 across them: (B, P, sum of C), float32."""
    return torch.cat([read_at(features.float(), place) for features in maps], 2)


def middles(grid: Sequence[int], device: torch.device) -> torch.Tensor:
    """The middle of every cell of a map, from -1 to 1 across it, the last axis fastest: (1, cells, D)."""
    axes = [2 * (torch.arange(edge, device=device) + 0.5) / edge - 1 for edge in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)[None]


@TRAINERS.register
class PatchClusteringTrainer(PretrainTrainer):
    """Patch-level clustering with SGD at 2e-3 and a cosine; on a transformer as masked autoencoders."""

    task = PatchClustering
    cost = StepCost(views=2, copies=1, decoder=False)
    optim = OptimConfig(name="sgd", lr=2e-3, weight_decay=1e-4, momentum=0.9, nesterov=False)
    schedule = ScheduleConfig(name="cosine")
    num_epochs = 240
    vit = VIT_RECIPE
