"""Exemplar: a changed crop should be nearer to the crop itself than to those of other cases.

Each crop is flipped, turned, magnified and recoloured. One network and one head embed what came of it and the crop as
it is; the first should be nearer to the second than to the crops of other cases in the batch, by a margin.

Papers: Dosovitskiy et al. 2014 (arXiv:1406.6909); Taleb et al. 2020 (arXiv:2006.03829) for volumes and triplets. Other
than there, embeddings have length 1, so that the margin means the same whatever their width; all crops of other cases
in the batch are negatives, and those of the same case none; and both views lie in the volume.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nnssl_ext.core.checks import at_least, rising, within
from nnssl_ext.core.random import SampleRandom
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
from nnssl_ext.losses.triplet import triplet_loss
from nnssl_ext.models.backbone import build_encoder, descriptor
from nnssl_ext.models.perceptron import PooledHead
from nnssl_ext.models.queue import case_keys
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import random_crop
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.sham import drawn_classes
from nnssl_ext.views.spatial import SpatialConfig

CHANCE = 0.5
"""Of a positive to be nearer than a negative."""


@dataclass(frozen=True, kw_only=True)
class ExemplarConfig:
    """Settings of exemplar."""

    margin: float = 0.2
    """By how much a positive should be nearer, in squared distance, in (0, 4). That of Schroff et al. 2015."""
    crop_scale: tuple[float, float] = (0.6, 1.0)
    """Smallest and largest edge of what is changed, as a share of the largest crop that fits, in (0, 1]."""
    spatial: SpatialConfig = field(default_factory=lambda: SpatialConfig(rotation=1.0, scaling=0.0))
    """How it is flipped and turned."""
    intensity: IntensityConfig = field(default_factory=lambda: IntensityConfig(brightness=0.5, contrast=0.5, gamma=0.5))
    """How its intensities change."""
    hidden_width: int = 256
    """Of the head's hidden layer, 1 or more."""
    width: int = 128
    """Of the embeddings, 1 or more."""

    def __post_init__(self) -> None:
        within(self, "(0, 4)", "margin", note=": so far apart can embeddings of length 1 be")
        rising(self, "(0, 1]", "crop_scale")
        at_least(self, hidden_width=1, width=1)


class Exemplar(PretextTask):
    """Knows a changed crop again; see the module."""

    Config = ExemplarConfig
    info = TaskInfo(
        idea="know a crop again that was moved and recoloured, beside crops of other cases",
        paper="arXiv:2006.03829",
        choose="as a reference among the predictive methods. It is soon solved where cases differ at a glance, and "
        "then teaches nothing more; the log says so.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: ExemplarConfig

    def __init__(self, config: ExemplarConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's encoder and the head that all views share.

        Raises:
            ValueError: Where the batch is a single crop, or the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        if configuration.batch_size < 2:
            raise ValueError("a batch of 1 has no other case to tell a crop from: use a -batch_size of 2 or more")
        self.encoder = build_encoder(configuration)
        self.head = PooledHead(self.encoder.channels[-1], config.width, config.hidden_width)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """The largest part of each crop that lies in the volume, and a changed one.

        To see through the change is the task, so there is one in validation too.

        Returns:
            `changed` and `plain` (B, C, *patch); `case` (B,), a number for each case; `order` (B,), 1 where a sham
            wants the negatives to be nearer, else 0.
        """
        config, size = self.config, self.configuration.patch_size
        draws = random.child("changed")
        plain = random_crop(batch.data, batch.valid, batch.spacing, random.child("plain"), (1, 1), size)
        moved = random_crop(batch.data, batch.valid, batch.spacing, draws, config.crop_scale, size, config.spatial)
        case = case_keys(batch.cases, batch.data.device)
        intensity = config.intensity.suited_to(self.configuration.normalization_schemes)
        changed = intensity_view(moved.data, moved.valid, draws.child("intensity"), intensity, inplace=True)
        return {"changed": changed, "plain": plain.data, "case": case, "order": torch.zeros_like(case)}

    def forward(self, views: Views) -> StepOutput:
        """The triplet loss beside the margin, which it is where all embeddings are the same, and how often it holds."""
        case = views["case"]
        features = descriptor(self.encoder(torch.cat([views["changed"], views["plain"]])))
        anchors, positives = self.head(features).chunk(2)
        compared = case[:, None] != case
        loss, accuracy = triplet_loss(anchors, positives, compared, self.config.margin, views["order"].bool())
        metrics = {
            "accuracy": accuracy.detach(),
            "accuracy_chance": torch.full_like(accuracy, CHANCE),
            "triplet": loss.detach(),
            "triplet_chance": torch.full_like(accuracy, self.config.margin),
        }
        return StepOutput(
            loss=loss,
            metrics=metrics,
            images=None if self.training else {name: views[name] for name in ("plain", "changed")},
            embeddings=Embeddings(first=anchors.detach(), second=positives.detach()),
        )

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the features."""
        self.head.update()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """A coin says of each crop whether it or the others should be nearer; see `PretextTask.sham`."""
        return {**views, "order": drawn_classes(views["order"], 2, random)}


@TRAINERS.register
class ExemplarTrainer(PretrainTrainer):
    """Exemplar with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders are trained here.

    Takes a batch of 2 or more on each rank, for a crop alone has no negatives.
    """

    task = Exemplar
    cost = StepCost(views=2, copies=1, decoder=False)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
