"""Jigsaw: tell in which order the cells of a crop were put.

A crop is cut into 3x3x3 cells (2D: 3x3); a smaller box at a random place in each is seen by the network on its own. The
boxes come in one of a hundred orders, which differ from one another in as many places as can be. A head says of each
box how well it fits every cell, and the order that fits best is named. To solve it, the network has to know which part
of the anatomy a box shows.

Papers: Noroozi and Favaro 2016 (arXiv:1603.09246); Taleb et al. 2020 (arXiv:2006.03829) for volumes. Other than there,
boxes are resampled to a size that the network takes; cells lie in the volume, so that no padding tells their place; all
boxes share one head, whose answers for an order are added up, where there one layer sees all features and has to learn
each order from its own examples; and it standardises features, since instance-normalised networks make them nearly the
same for all boxes.
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
from nnssl_ext.models.permutations import distant_permutations
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.cells import BOX_INTENSITY, box_size, boxes_in_cells, changed_boxes, grid_cells
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.sham import drawn_classes

CELLS_PER_AXIS = 3


@dataclass(frozen=True, kw_only=True)
class JigsawConfig:
    """Settings of the jigsaw."""

    permutations: int = 100
    """Orders to tell apart, 2 or more. Taleb et al. 2020."""
    hidden_width: int = 256
    """Of the head's hidden layer, 1 or more."""
    intensity: IntensityConfig = BOX_INTENSITY
    """How intensities change in training: brightness and contrast of each box on its own, the rest of the crop."""

    def __post_init__(self) -> None:
        at_least(self, permutations=2, hidden_width=1)


class Jigsaw(PretextTask):
    """Names the order of a crop's cells; see the module."""

    Config = JigsawConfig
    info = TaskInfo(
        idea="tell in which order the cells of a crop were put",
        paper="arXiv:2006.03829",
        choose="as a reference among the predictive methods, where crops show much of the anatomy: what is learned is "
        "where a piece belongs.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: JigsawConfig
    permutations: torch.Tensor
    """(permutations, cells), int64: the cell that comes at each place."""

    def __init__(self, config: JigsawConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's encoder and the head, and chooses the permutations.

        Raises:
            ValueError: Where there are not so many permutations, or the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.grid = (CELLS_PER_AXIS,) * configuration.dims
        self.size = box_size(configuration.patch_size, self.grid, self.encoder.strides[-1])
        self.head = PooledHead(self.encoder.channels[-1], prod(self.grid), config.hidden_width)
        self.register_buffer("permutations", distant_permutations(prod(self.grid), config.permutations))

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """The boxes of each crop, put in one of the orders; in training with changed intensities.

        Returns:
            `input` (B, C, *crop); `boxes` (B * cells, C, *size), those of a crop in a row; `order` (B,), the class.
        """
        data = batch.data.masked_fill(~batch.valid, 0)
        intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes) if train else None
        order = torch.from_numpy(random.integers("order", 0, len(self.permutations))).to(data.device)
        boxes = boxes_in_cells(grid_cells(batch.valid, self.grid), random.child("cells"))
        shown = boxes.of(self.permutations[order])
        seen = changed_boxes(data, batch.valid, shown, self.size, random.child("intensity"), intensity)
        return {"input": data, "boxes": seen, "order": order}

    def forward(self, views: Views) -> StepOutput:
        """The cross-entropy of the order, and how often it is told."""
        order = views["order"]
        logits = self._fit(self.head(descriptor(self.encoder(views["boxes"]))))
        metrics = {
            "accuracy": (logits.detach().argmax(1) == order).float().mean(),
            "accuracy_chance": torch.full((), 1 / len(self.permutations), device=order.device),
        }
        images = None if self.training else {"input": views["input"], "first": views["boxes"][:: prod(self.grid)]}
        return StepOutput(loss=functional.cross_entropy(logits, order), metrics=metrics, images=images)

    def _fit(self, votes: torch.Tensor) -> torch.Tensor:
        """How well each order fits, (B, permutations): the sum over places of what the box there says of its cell.

        Args:
            votes: (B * places, cells).
        """
        votes = votes.unflatten(0, (-1, prod(self.grid)))
        places = torch.arange(prod(self.grid), device=votes.device)
        return votes[:, places, self.permutations].sum(2)

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the features."""
        self.head.update()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Orders are drawn anew, whatever is seen; see `PretextTask.sham`."""
        return {**views, "order": drawn_classes(views["order"], len(self.permutations), random)}


@TRAINERS.register
class JigsawTrainer(PretrainTrainer):
    """Jigsaw with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders are trained here."""

    task = Jigsaw
    cost = StepCost(views=3.4, copies=1, decoder=False)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
