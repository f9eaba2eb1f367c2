"""Relative patch location: tell where a cell lies, seen from the one in the middle.

A crop is cut into 3x3x3 cells (2D: 3x3). The network sees a box of the middle cell and one of another cell, each on its
own, and a head that is shown both features names which of the 26 (8) neighbours the other one is.

Papers: Doersch et al. 2015 (arXiv:1505.05192); Taleb et al. 2020 (arXiv:2006.03829) for volumes. Other than there,
boxes are resampled to a size that the network takes, cells lie in the volume, so that no padding tells their place, and
the head standardises features, since instance-normalised networks make them nearly the same for all boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.nn import functional

from nnssl_ext.core.checks import at_least
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.backbone import build_encoder, descriptor
from nnssl_ext.models.perceptron import PooledHead
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.cells import BOX_INTENSITY, box_size, boxes_in_cells, changed_boxes, grid_cells
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.sham import drawn_classes

CELLS_PER_AXIS = 3
NUM_SHOWN = 2
"""Boxes of a crop that are seen: the middle one and another."""


@dataclass(frozen=True, kw_only=True)
class RelativePatchLocationConfig:
    """Settings of relative patch location."""

    hidden_width: int = 256
    """Of the head's hidden layer, 1 or more."""
    intensity: IntensityConfig = BOX_INTENSITY
    """How intensities change in training: brightness and contrast of each box on its own, the rest of the crop."""

    def __post_init__(self) -> None:
        at_least(self, hidden_width=1)


class RelativePatchLocation(PretextTask):
    """Names the place of a cell beside the middle one; see the module."""

    Config = RelativePatchLocationConfig
    info = TaskInfo(
        idea="tell where a cell of a crop lies, seen from the one in the middle",
        paper="arXiv:2006.03829",
        choose="as a cheap reference among the predictive methods: a step sees two cells of each crop.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: RelativePatchLocationConfig

    def __init__(self, config: RelativePatchLocationConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's encoder and the head.

        Raises:
            ValueError: Where the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.grid = (CELLS_PER_AXIS,) * configuration.dims
        self.middle = prod(self.grid) // 2
        self.num_classes = prod(self.grid) - 1
        self.size = box_size(configuration.patch_size, self.grid, self.encoder.strides[-1])
        self.head = PooledHead(self.encoder.channels[-1], self.num_classes, config.hidden_width, crops=NUM_SHOWN)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """A box of the middle cell of each crop and one of another; in training with changed intensities.

        Returns:
            `input` (B, C, *crop); `boxes` (2 B, C, *size), those of a crop in a row, the middle one first; `place`
            (B,), the class: the other cell's number, the last axis fastest, the middle one not counted.
        """
        data = batch.data.masked_fill(~batch.valid, 0)
        intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes) if train else None
        place = torch.from_numpy(random.integers("place", 0, self.num_classes)).to(data.device)
        other = place + (place >= self.middle)
        shown = torch.stack([torch.full_like(other, self.middle), other], 1)
        boxes = boxes_in_cells(grid_cells(batch.valid, self.grid), random.child("cells")).of(shown)
        seen = changed_boxes(data, batch.valid, boxes, self.size, random.child("intensity"), intensity)
        return {"input": data, "boxes": seen, "place": place}

    def forward(self, views: Views) -> StepOutput:
        """The cross-entropy of the place, and how often it is told."""
        place = views["place"]
        features = descriptor(self.encoder(views["boxes"])).unflatten(0, (-1, NUM_SHOWN))
        logits = self.head(features)
        metrics = {
            "accuracy": (logits.detach().argmax(1) == place).float().mean(),
            "accuracy_chance": torch.full((), 1 / self.num_classes, device=place.device),
        }
        shown = {"middle": views["boxes"][::NUM_SHOWN], "other": views["boxes"][1::NUM_SHOWN]}
        images = None if self.training else {"input": views["input"], **shown}
        return StepOutput(loss=functional.cross_entropy(logits, place), metrics=metrics, images=images)

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the features."""
        self.head.update()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Places are drawn anew, whatever is seen; see `PretextTask.sham`."""
        return {**views, "place": drawn_classes(views["place"], self.num_classes, random)}


@TRAINERS.register
class RelativePatchLocationTrainer(PretrainTrainer):
    """Relative patch location with AdamW at 1e-3, warm-up and a cosine; a transformer as masked autoencoders."""

    task = RelativePatchLocation
    cost = StepCost(views=0.25, copies=1, decoder=False)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
