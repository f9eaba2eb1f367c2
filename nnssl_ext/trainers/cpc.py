"""Contrastive predictive coding: predict the codes of cells from those of the cells before them.

A crop is cut into 4x4x4 cells (2D: 4x4), and the network gives a box in each a code of its own. Along every axis a
recurrent layer reads the first two slabs at each position; linear maps then predict the codes of the third and fourth
slab at that position, which have to be found among all codes of the batch.

Papers: van den Oord et al. 2018 (arXiv:1807.03748); Taleb et al. 2020 (arXiv:2006.03829) for volumes. Other than there,
boxes do not overlap and keep a gap, since what they share would tell the answer; every axis is predicted along; codes
have length 1; and features are standardised by running moments, since instance-normalised networks make them nearly the
same for all boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.core.checks import above_zero, at_least
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
from nnssl_ext.models.backbone import build_encoder, descriptor
from nnssl_ext.models.perceptron import PooledHead
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.cells import BOX_INTENSITY, box_size, boxes_in_cells, changed_boxes, grid_cells
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.sham import of_another_case

SLABS = 4
SEEN = 2
"""Slabs that are read; the others are predicted."""


@dataclass(frozen=True, kw_only=True)
class CPCConfig:
    """Settings of contrastive predictive coding."""

    temperature: float = 0.1
    """Divides the cosines, above 0. Not published; a usual value."""
    width: int = 128
    """Of the codes and of the recurrent layers, 1 or more."""
    intensity: IntensityConfig = BOX_INTENSITY
    """How intensities change in training: brightness and contrast of each box on its own, the rest of the crop."""

    def __post_init__(self) -> None:
        above_zero(self, "temperature")
        at_least(self, width=1)


class CPC(PretextTask):
    """Predicts codes of cells; see the module."""

    Config = CPCConfig
    info = TaskInfo(
        idea="predict the codes of a crop's cells from those of the cells before them, along every axis",
        paper="arXiv:2006.03829",
        choose="among the predictive methods where crops are large and a step may cost several passes: it does not "
        "saturate, since candidates are all cells of the batch.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: CPCConfig
    halves: torch.Tensor
    """(2, cells / 2), int64: the cells as on a chequerboard, so that both halves lie alike in the crop."""

    def __init__(self, config: CPCConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's encoder, and for every axis a recurrent layer and the linear maps.

        Raises:
            ValueError: Where the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.grid = (SLABS,) * configuration.dims
        self.size = box_size(configuration.patch_size, self.grid, self.encoder.strides[-1])
        self.head = PooledHead(self.encoder.channels[-1], config.width, num_layers=1)
        self.readers = nn.ModuleList(nn.GRU(config.width, config.width, batch_first=True) for _ in self.grid)
        ahead = (SLABS - SEEN) * config.width
        self.predictors = nn.ModuleList(nn.Linear(config.width, ahead, bias=False) for _ in self.grid)
        colour = torch.cartesian_prod(*[torch.arange(SLABS)] * configuration.dims).sum(1) % 2
        self.register_buffer("halves", colour.argsort(stable=True).view(2, -1), persistent=False)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """The boxes of each crop; in training with changed intensities.

        Returns:
            `input` (B, C, *crop); `boxes` (B * cells, C, *size), those of a crop in a row; `partner` (B,), the crop
            whose codes are predicted: its own.
        """
        data = batch.data.masked_fill(~batch.valid, 0)
        intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes) if train else None
        boxes = boxes_in_cells(grid_cells(batch.valid, self.grid), random.child("cells"))
        return {
            "input": data,
            "boxes": changed_boxes(data, batch.valid, boxes, self.size, random.child("intensity"), intensity),
            "partner": torch.arange(len(data), device=data.device),
        }

    def forward(self, views: Views) -> StepOutput:
        """The cross-entropy of the predicted codes among all, beside the logarithm of their number; how often found."""
        codes = self.head(descriptor(self.encoder(views["boxes"])))
        num_codes = len(codes)
        with torch.autocast(codes.device.type, enabled=False):
            predicted, asked = self._predict(codes.unflatten(0, (-1, *self.grid)), views["partner"])
            candidates = functional.normalize(codes, dim=1)
            logits = functional.normalize(predicted, dim=1) @ candidates.T / self.config.temperature
        loss = functional.cross_entropy(logits, asked)
        metrics = {
            "contrast": loss.detach(),
            "contrast_chance": torch.full_like(loss.detach(), log(num_codes)),
            "accuracy": (logits.detach().argmax(1) == asked).float().mean(),
            "accuracy_chance": torch.full_like(loss.detach(), 1 / num_codes),
        }
        images = None if self.training else {"input": views["input"], "first": views["boxes"][:: prod(self.grid)]}
        first, second = candidates.detach().unflatten(0, (-1, prod(self.grid)))[:, self.halves].mean(2).unbind(1)
        embeddings = Embeddings(first=first, second=second)
        return StepOutput(loss=loss, metrics=metrics, images=images, embeddings=embeddings)

    def _predict(self, codes: torch.Tensor, partner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions of all axes.

        Args:
            codes: (B, *grid, D).
            partner: (B,), the crop whose codes are asked for.

        Returns:
            (N, D), and which of all codes each should be, (N,).
        """
        numbers = torch.arange(codes[..., 0].numel(), device=codes.device).view(codes.shape[:-1])
        predicted, asked = [], []
        for axis, (reader, predictor) in enumerate(zip(self.readers, self.predictors, strict=True), start=1):
            columns = codes.movedim(axis, -2).flatten(0, -3)
            _, context = reader(columns[:, :SEEN])
            predicted.append(predictor(context[0]).unflatten(1, (SLABS - SEEN, -1)).flatten(0, 1))
            asked.append(numbers[partner].movedim(axis, -1)[..., SEEN:].flatten())
        return torch.cat(predicted), torch.cat(asked)

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the features."""
        self.head.update()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The codes to predict are another case's; see `PretextTask.sham`."""
        return {**views, "partner": of_another_case(views["partner"])}


@TRAINERS.register
class CPCTrainer(PretrainTrainer):
    """CPC with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders are trained here."""

    task = CPC
    cost = StepCost(views=8, copies=1, decoder=False)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
