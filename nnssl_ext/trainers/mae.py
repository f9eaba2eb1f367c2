"""Masked autoencoders: hide most of a volume, let the network restore it, count the error where it could not look.

On a U-Net, random blocks are set to 0, which is the mean after z-scoring, and the whole network (encoder, skips,
decoder) predicts the voxels; encoder and decoder both go to fine-tuning. On a transformer, most tokens are left out,
the encoder sees the rest alone, and a light decoder predicts the others' voxels; the encoder goes to fine-tuning.

Papers: He et al. 2022 (arXiv:2111.06377); for volumes, Wald et al. 2024 (arXiv:2410.23132, arXiv:2412.17041). The
U-Net sees hidden blocks as zeros, since a convolution cannot leave them out. Other than in all three, padding of
volumes smaller than the patch is neither seen nor counted: a token that holds any is never visible, and of its voxels
only the real ones are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from nnssl_ext.core.checks import above_zero, at_least, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.mae import guess_error, hidden_share, masked_mse
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.masks import block_mask
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.targets import TargetConfig, restoration_target
from nnssl_ext.views.tokens import check_ratio, hidden_voxels, keep_tokens


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Settings of masked autoencoders."""

    mask_ratio: float = 0.75
    """Share of the real voxels that is hidden, in (0, 1), in whole blocks or tokens. He et al. 2022."""
    block_size: int = 16
    """Edge of a hidden block in voxels, 1 or more; blocks at the far border are clipped. Wald et al. 2024. On a
    transformer the token is hidden instead."""
    decoder_depth: int = 2
    """Blocks of a transformer's decoder, 1 or more. A U-Net has its own decoder."""
    decoder_heads: float = 0.5
    """Attention heads of a transformer's decoder as a share of the encoder's, above 0; at least one, and as wide."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What is asked for of the hidden voxels."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training."""

    def __post_init__(self) -> None:
        within(self, "(0, 1)", "mask_ratio")
        at_least(self, block_size=1, decoder_depth=1)
        above_zero(self, "decoder_heads")


class MAE(PretextTask):
    """Restores hidden blocks of a crop; see the module."""

    Config = MAEConfig
    info = TaskInfo(
        idea="hide blocks of the image and restore them",
        paper="arXiv:2111.06377",
        choose="first: it asks for nothing but volumes, a step is cheap, and a U-Net's decoder is pretrained as well.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
    )
    config: MAEConfig

    def __init__(self, config: MAEConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with one output per input channel.

        Raises:
            ValueError: Where all or nothing of the patch would be hidden, or the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        channels = configuration.num_input_channels
        self.encoder, self.decoder = build_dense(configuration, channels, config.decoder_depth, config.decoder_heads)
        if is_transformer(self.encoder):
            check_ratio(prod(self.encoder.grid), config.mask_ratio)
        else:
            _check_block(config.block_size, configuration.patch_size)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and which of their voxels are hidden.

        Returns:
            `image` and `target` (B, C, *patch); `hidden`, `valid` and `asked` (B, 1, *patch), bool: what is hidden,
            what is real, and of that what is asked for; for a transformer also `kept` (B, n), the visible tokens, and
            -1 at the end where there are fewer.
        """
        image, valid = training_view(batch, random, self.config.spatial, train)
        shape, ratio, mask = image.shape[2:], self.config.mask_ratio, random.child("mask")
        block = self.encoder.token_size if is_transformer(self.encoder) else (self.config.block_size,) * len(shape)
        views = {"image": image, "valid": valid, **restoration_target(image, valid, block, self.config.target)}
        if is_transformer(self.encoder):
            kept = keep_tokens(mask, valid, block, ratio)
            return {**views, "hidden": hidden_voxels(kept, block, shape), "kept": kept}
        return {**views, "hidden": block_mask(mask, shape, block, ratio, valid=valid)}

    def forward(self, views: Views) -> StepOutput:
        """The error on hidden voxels, beside that of guessing each crop's visible mean."""
        image, target, hidden, asked = (views[name] for name in ("image", "target", "hidden", "asked"))
        masked = torch.where(~hidden & views["valid"], image, 0)
        output = self._restore(masked, views)
        loss = masked_mse(output, target, hidden, asked)
        metrics = {
            "mse": loss.detach(),
            "mse_chance": guess_error(target, hidden, asked),
            "hidden_share": hidden_share(hidden, views["valid"]),
            **self.config.target.metrics(hidden, asked, views["valid"]),
        }
        images = None if self.training else {"input": image, "masked": masked, "output": output.detach()}
        if images and self.config.target.normalize:
            images["target"] = target
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def _restore(self, masked: torch.Tensor, views: Views) -> torch.Tensor:
        if is_transformer(self.encoder):
            return self.decoder(self.encoder.tokens(masked, views["kept"]), views["kept"])
        return self.decoder(self.encoder(masked))

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The voxels to restore are those of another case; see `PretextTask.sham`."""
        return restore_another_case(views)


def _check_block(block_size: int, patch_size: tuple[int, ...]) -> None:
    if all(size <= block_size for size in patch_size):
        raise ValueError(
            f"block_size={block_size} covers the whole patch {patch_size}: all or nothing would be hidden. Set a "
            f"smaller one: --set block_size={min(patch_size) // 2}"
        )


@TRAINERS.register
class MAETrainer(PretrainTrainer):
    """Masked autoencoders with the recipes of Wald et al. 2024 over 1000 x 250 steps.

    On a U-Net nnU-Net's SGD, on a transformer AdamW with warm-up.
    """

    task = MAE
    cost = StepCost(views=1, copies=1, decoder=True, tokens=0.25)
    vit = VIT_RECIPE
