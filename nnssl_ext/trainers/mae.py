"""Masked autoencoders: hide most of a volume, let the network restore it, count the error where it could not look.

Random blocks are set to 0, which is the mean after z-scoring, and the whole U-Net (encoder, skips, decoder) predicts
the voxels. What it learns of anatomy on the way serves segmentation; encoder and decoder both go to fine-tuning.

Papers: He et al. 2022 (arXiv:2111.06377); for the 3D U-Net, Wald et al. 2024 (arXiv:2410.23132). As in the latter and
other than in the former, the encoder sees hidden blocks as zeros, since a convolution cannot leave them out. Other than
in both, padding of volumes smaller than the patch is neither hidden nor counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.mae import masked_mse
from nnssl_ext.models.resenc import build_unet, export_unet
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.masks import block_mask
from nnssl_ext.views.spatial import SpatialConfig, spatial_view


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Settings of masked autoencoders."""

    mask_ratio: float = 0.75
    """Share of the voxels that is hidden, in (0, 1). He et al. 2022."""
    block_size: int = 16
    """Edge of a hidden block in voxels, 1 or more; blocks at the far border are clipped. Wald et al. 2024."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must lie in (0, 1).")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 or more.")


class MAE(PretextTask):
    """Restores hidden blocks of a crop; see the module."""

    Config = MAEConfig
    info = TaskInfo(
        idea="hide blocks of the image and restore them",
        paper="arXiv:2111.06377",
        encoders={"cnn"},
        trains_decoder=True,
    )
    config: MAEConfig

    def __init__(self, config: MAEConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's U-Net with one output per input channel.

        Raises:
            ValueError: Where one block covers the whole patch, or the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        if all(size <= config.block_size for size in configuration.patch_size):
            raise ValueError(
                f"block_size={config.block_size} covers the whole patch {configuration.patch_size}: all or nothing "
                f"would be hidden. Set a smaller one: --set block_size={min(configuration.patch_size) // 2}"
            )
        self.encoder, self.decoder = build_unet(configuration, configuration.num_input_channels)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and which of their voxels are hidden.

        Returns:
            `target` (B, C, *patch); `hidden` and `valid` (B, 1, *patch), bool.
        """
        target, valid = batch.data, batch.valid
        if train:
            moved = spatial_view(target, valid, batch.spacing, random.child("spatial"), self.config.spatial)
            target, valid = moved.data, moved.valid
        shape, config = target.shape[2:], self.config
        hidden = block_mask(random.child("mask"), shape, config.block_size, config.mask_ratio, valid=valid)
        return {"target": target, "hidden": hidden, "valid": valid}

    def forward(self, views: Views) -> StepOutput:
        """The error on hidden voxels, beside that of guessing each crop's visible mean."""
        target, hidden, valid = views["target"], views["hidden"], views["valid"]
        visible = ~hidden & valid
        masked = torch.where(visible, target, 0)
        output = self.decoder(self.encoder(masked))
        loss = masked_mse(output, target, hidden, valid)
        metrics = {
            "mse": loss.detach(),
            "mse_chance": masked_mse(_visible_mean(target, visible), target, hidden, valid),
            "hidden_share": (hidden & valid).sum() / valid.sum().clamp(min=1),
        }
        images = None if self.training else {"input": target, "masked": masked, "output": output.detach()}
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def export_network(self) -> torch.nn.Module:
        """The whole U-Net, encoder and decoder as trained; see `PretextTask.export_network`."""
        return export_unet(self.configuration, self.encoder, self.decoder)


def _visible_mean(target: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The mean of the visible voxels per sample and channel, at every voxel: (B, C, *patch)."""
    count = visible.flatten(1).sum(1).clamp(min=1)
    mean = torch.where(visible, target, 0).flatten(2).sum(2) / count[:, None]
    return mean.view(*mean.shape, *[1] * (target.ndim - 2)).expand_as(target)


@TRAINERS.register
class MAETrainer(PretrainTrainer):
    """Masked autoencoders with the recipe of Wald et al. 2024 for the U-Net: nnU-Net's SGD over 1000 x 250 steps."""

    task = MAE
    cost = StepCost(views=1, copies=1, decoder=True)
