"""SparK: a convolutional network restores hidden cells, and really sees nothing where they are.

A masked U-Net blurs what is visible into the holes and, through its normalisation, knows how much is hidden. Here
activations and the statistics of normalisation are kept to visible positions at every scale, so the encoder meets the
same distribution as on whole images. What is hidden is a cell of the deepest feature map; a learned token and one
convolution per scale fill the holes before the U-Net's own decoder, which is transferred too.

Papers: Tian et al. 2023 (arXiv:2301.03580); for volumes, as S3D, Wald et al. 2024 (arXiv:2410.23132). Other than
there, visible features reach the decoder as they are, so that with nothing hidden this is the stock network; and a cell
that holds padding is never visible, while of its voxels only the real ones are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from nnssl_ext.core.checks import within
from nnssl_ext.core.random import SampleRandom, generator
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.mae import guess_error, hidden_share, masked_mse
from nnssl_ext.models.resenc import build_unet
from nnssl_ext.models.visible import Densify, check_visible_only, scale_masks, visible_feature_maps
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.targets import TargetConfig, restoration_target
from nnssl_ext.views.tokens import check_ratio, hidden_voxels, keep_tokens


@dataclass(frozen=True, kw_only=True)
class SparkConfig:
    """Settings of SparK."""

    mask_ratio: float = 0.75
    """Share of the real voxels that is hidden, in (0, 1), in whole cells; a cell is one position of the deepest feature
    map."""
    mask_ratio_max: float | None = None
    """If given, the share is drawn anew for each step, uniformly from `mask_ratio` to this, in (0, 1). S3D draws from
    0.6 to 0.9. Validation hides the mean of both."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What is asked for of the hidden voxels."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training."""

    def __post_init__(self) -> None:
        within(self, "(0, 1)", "mask_ratio")
        within(self, f"[{self.mask_ratio}, 1)", "mask_ratio_max", note=": not below mask_ratio")


class Spark(PretextTask):
    """Restores hidden cells of a crop from features of the visible ones; see the module."""

    Config = SparkConfig
    info = TaskInfo(
        idea="hide cells of the image from every layer of the encoder and restore them",
        paper="arXiv:2301.03580",
        choose="for a U-Net where masked crops should look to the encoder as whole ones do, at the price of a longer "
        "step.",
        encoders={"cnn"},
        trains_decoder=True,
    )
    config: SparkConfig

    def __init__(self, config: SparkConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with one output per input channel, and what fills holes at each scale.

        Raises:
            ValueError: Where nothing of the patch would be hidden, or the network is no U-Net with instance norm.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder, self.decoder = build_unet(configuration, configuration.num_input_channels)
        check_visible_only(self.encoder)
        self.cell = self.encoder.strides[-1]
        grid = [size // edge for size, edge in zip(configuration.patch_size, self.cell, strict=True)]
        check_ratio(prod(grid), config.mask_ratio)
        self.densify = nn.ModuleList(Densify(channels, configuration.dims) for channels in self.encoder.channels)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and which of their voxels are hidden.

        Returns:
            `image` and `target` (B, C, *patch); `hidden`, `valid` and `asked` (B, 1, *patch), bool: what the encoder
            does not see, what is real, and of that what is asked for. No visible voxel is padding.
        """
        image, valid = training_view(batch, random, self.config.spatial, train)
        kept = keep_tokens(random.child("mask"), valid, self.cell, self._draw_ratio(random, train))
        hidden = hidden_voxels(kept, self.cell, image.shape[2:])
        asked = restoration_target(image, valid, self.cell, self.config.target)
        return {"image": image, "hidden": hidden, "valid": valid, **asked}

    def _draw_ratio(self, random: SampleRandom, train: bool) -> float:
        """The share to hide: one for all samples of a step, and in validation the expected one."""
        least, most = self.config.mask_ratio, self.config.mask_ratio_max
        if most is None:
            return least
        return generator(random.seed, random.step, "mask ratio").uniform(least, most) if train else (least + most) / 2

    def forward(self, views: Views) -> StepOutput:
        """The squared error on hidden voxels, beside that of guessing each crop's visible mean."""
        image, target, hidden, asked = (views[name] for name in ("image", "target", "hidden", "asked"))
        output = self._restore(image, ~hidden)
        loss = masked_mse(output, target, hidden, asked)
        metrics = {
            "mse": loss.detach(),
            "mse_chance": guess_error(target, hidden, asked),
            "hidden_share": hidden_share(hidden, views["valid"]),
            **self.config.target.metrics(hidden, asked, views["valid"]),
        }
        masked = image.masked_fill(hidden, 0)
        images = None if self.training else {"input": image, "masked": masked, "output": output.detach()}
        if images and self.config.target.normalize:
            images["target"] = target
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def _restore(self, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        maps = visible_feature_maps(self.encoder, image, visible)
        masks = scale_masks(visible, self.encoder.strides)
        return self.decoder([fill(*pair) for fill, *pair in zip(self.densify, maps, masks, strict=True)])

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The voxels to restore are those of another case; see `PretextTask.sham`."""
        return restore_another_case(views)


@TRAINERS.register
class SparkTrainer(PretrainTrainer):
    """SparK with the recipe of Wald et al. 2024: nnU-Net's SGD over 1000 x 250 steps."""

    task = Spark
    cost = StepCost(views=1.5, copies=1, decoder=True)  # measured: 1.35 times what MAE keeps for the gradient
