"""Inpainting with contrast: two damaged views of each crop are restored, and their features should agree.

Holes, or all but some windows, are filled with noise and some cubes are shuffled, twice for each crop. The network
restores both, and the pooled features of its encoder have to tell which two views belong together. Encoder and decoder
of a U-Net go to fine-tuning, of a transformer the encoder.

Recipe: MONAI's for ViTAutoEnc (arXiv:2211.02701). Other than there, the contrast is taken between features of the
encoder, not between whole reconstructions; its weight is fixed, not the reconstruction's own error; and crops of one
case, which there are the only negatives, are none here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from nnssl_ext.core.checks import above_zero, at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.optim import OptimConfig
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
from nnssl_ext.losses.mae import masked_l1
from nnssl_ext.losses.nt_xent import check_negatives, nt_xent
from nnssl_ext.losses.restoration import trivial_errors
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.models.queue import case_keys
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.corruptions import noise_by_boxes, on_rows
from nnssl_ext.views.sham import of_another_case, restore_another_case
from nnssl_ext.views.shuffles import scattered_windows, shuffle_within
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.tokens import whole_only


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Settings of inpainting with contrast. Shares are those that MONAI's voxels are of its crops of 96³."""

    windows: float = 0.5
    """Probability that boxes are spared and all else is filled, instead of the boxes."""
    boxes: int = 6
    """Boxes, 1 or more."""
    hole_sides: tuple[float, float] = (5 / 96, 32 / 96)
    """Shortest and longest edge of a box to fill, as a share of the crop's."""
    window_sides: tuple[float, float] = (20 / 96, 64 / 96)
    """Shortest and longest edge of a box that is spared, as a share of the crop's."""
    shuffle: float = 0.8
    """Probability that voxels are shuffled within cubes."""
    cubes: int = 10
    """Cubes, 1 or more."""
    cube_edge: int = 8
    """Edge of a cube in voxels, 1 or more."""
    contrast_weight: float = 0.1
    """Weight of the contrast beside the mean absolute error, 0 or more."""
    temperature: float = 0.05
    """Divides the cosines of the contrast, above 0."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training, before they are damaged."""

    def __post_init__(self) -> None:
        within(self, "[0, 1]", "windows", "shuffle")
        at_least(self, boxes=1, cubes=1, cube_edge=1, contrast_weight=0)
        rising(self, "(0, 1]", "hole_sides", "window_sides")
        above_zero(self, "temperature")


class Inpainting(PretextTask):
    """Restores two damaged views of a crop, whose features should agree; see the module."""

    Config = InpaintingConfig
    info = TaskInfo(
        idea="restore two damaged views of a crop, and let their features agree",
        paper="arXiv:2211.02701",
        choose="where one feature per crop is wanted beside reconstruction: one loss restores, the other contrasts, "
        "so a batch needs two crops or more.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
    )
    config: InpaintingConfig

    def __init__(self, config: InpaintingConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with one output per input channel.

        Raises:
            ValueError: Where the network cannot be built, or a contrast is wanted and the batch is a single crop.
        """
        super().__init__(config, configuration, num_cases)
        if config.contrast_weight:
            check_negatives(configuration.batch_size, "contrast_weight=0")
        self.encoder, self.decoder = build_dense(configuration, configuration.num_input_channels)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and two damaged views of each.

        Returns:
            `target` (B, C, *patch); `first` and `second`, likewise; `valid` (B, 1, *patch), bool, what is asked for;
            `case` (B,), a number for each case; `partner` (B,), the row of the second view that belongs to each first
            one; for a transformer also `kept`, the tokens without padding, and of these alone `valid`.
        """
        target, valid = training_view(batch, random, self.config.spatial, train)
        target = target.masked_fill(~valid, 0)
        views = {name: damaged(target, valid, random.child(name), self.config) for name in ("first", "second")}
        views |= {"target": target, "valid": valid, "case": case_keys(batch.cases, target.device)}
        views["partner"] = torch.arange(len(target), device=target.device)
        if is_transformer(self.encoder):
            views |= whole_only(valid, self.encoder.token_size)
        return views

    def forward(self, views: Views) -> StepOutput:
        """The absolute error over all real voxels and the contrast, each beside its chance."""
        image = torch.cat([views["first"], views["second"]])
        target, valid = (torch.cat([views[name]] * 2) for name in ("target", "valid"))
        kept = torch.cat([views["kept"]] * 2) if "kept" in views else None
        output, pooled = run_dense(self.encoder, self.decoder, image, valid, kept)
        first, second = pooled.chunk(2)
        error = masked_l1(output, target, valid, valid)
        contrast, chance = nt_xent(first, second[views["partner"]], self.config.temperature, views["case"])
        constant, untouched = trivial_errors(masked_l1, image, target, valid)
        metrics = {
            "l1": error.detach(),
            "l1_chance": constant,
            "l1_untouched": untouched,
            "contrast": contrast.detach(),
            "contrast_chance": chance,
        }
        pictures = {"input": target, "damaged": image, "output": output.detach()}
        return StepOutput(
            loss=error + self.config.contrast_weight * contrast,
            metrics=metrics,
            images=None if self.training else {name: picture[: len(first)] for name, picture in pictures.items()},
            embeddings=Embeddings(first=first.detach(), second=second.detach()),
        )

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Crop to restore and partner of the contrast are another case's; see `PretextTask.sham`."""
        return {**restore_another_case(views, asked="valid"), "partner": of_another_case(views["partner"])}


def damaged(image: torch.Tensor, valid: torch.Tensor, random: SampleRandom, config: InpaintingConfig) -> torch.Tensor:
    """Crops (B, C, *patch) with holes or around windows filled with noise, and cubes shuffled."""
    windows = random.bernoulli("windows", config.windows)
    holes = partial(noise_by_boxes, boxes=config.boxes, sides=config.hole_sides, around=False)
    spared = partial(noise_by_boxes, boxes=config.boxes, sides=config.window_sides, around=True)
    image = on_rows(image, valid, random.child("holes"), ~windows, holes)
    image = on_rows(image, valid, random.child("windows"), windows, spared)
    chosen = random.bernoulli("shuffle", config.shuffle)
    return on_rows(image, valid, random.child("shuffle"), chosen, partial(_shuffled, config=config))


def _shuffled(image: torch.Tensor, valid: torch.Tensor, random: SampleRandom, config: InpaintingConfig) -> torch.Tensor:
    return shuffle_within(image, scattered_windows(random, valid, config.cubes, config.cube_edge), random)


@TRAINERS.register
class InpaintingTrainer(PretrainTrainer):
    """Inpainting with contrast: AdamW at the recipe's 1e-4, on a transformer as masked autoencoders are trained here.

    Takes a batch of 2 or more over all ranks, for a crop alone has no negatives; without the contrast, of any size.
    """

    task = Inpainting
    cost = StepCost(views=2, copies=1, decoder=True)
    optim = OptimConfig(name="adamw", lr=1e-4, weight_decay=0.0, betas=(0.9, 0.999))
    vit = VIT_RECIPE
