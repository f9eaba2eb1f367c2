"""SimMIM: a transformer sees a learned token in place of the hidden ones and says, in one linear layer, what was there.

The encoder does all the work, so it learns at the places of hidden tokens as well, at the price of a full-length
sequence; there is no decoder to absorb what belongs into the features, and the error is absolute. Only hidden tokens
are asked for.

Paper: Xie et al. 2022 (arXiv:2111.09886); for volumes, Wald et al. 2024 (arXiv:2412.17041). Other than there, a token
that holds padding is never visible, and of its voxels only the real ones are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from nnssl_ext.core.checks import within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.mae import guess_error, hidden_share, masked_l1, masked_mse
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.targets import TargetConfig, restoration_target
from nnssl_ext.views.tokens import check_ratio, hidden_tokens, hidden_voxels, keep_tokens

if TYPE_CHECKING:
    from nnssl_ext.models.primus import PrimusEncoder

INITIAL_STD = 0.02
"""Spread of the mask token and of the linear decoder at the start, the paper's."""


@dataclass(frozen=True, kw_only=True)
class SimMIMConfig:
    """Settings of SimMIM."""

    mask_ratio: float = 0.75
    """Share of the real voxels that is hidden, in (0, 1), in whole tokens. Wald et al. 2024; the paper hides 0.6 of
    larger units."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What is asked for of the hidden voxels."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training."""

    def __post_init__(self) -> None:
        within(self, "(0, 1)", "mask_ratio")


class SimMIM(PretextTask):
    """Restores hidden tokens of a crop with the encoder and one linear layer; see the module."""

    Config = SimMIMConfig
    info = TaskInfo(
        idea="replace tokens of the image by a learned one and restore them in one linear layer",
        paper="arXiv:2111.09886",
        choose="for a transformer whose features should form at every token and not in a decoder; the whole grid is "
        "seen, so a step costs more than MAE's.",
        encoders={"vit"},
    )
    config: SimMIMConfig
    encoder: PrimusEncoder

    def __init__(self, config: SimMIMConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's transformer.

        Raises:
            ValueError: Where nothing of the patch would be hidden, or the network cannot be built.
        """
        from nnssl_ext.models.primus import build_primus

        super().__init__(config, configuration, num_cases)
        self.encoder = encoder = build_primus(configuration)
        self.grid, self.token_size, width = encoder.grid, encoder.token_size, encoder.channels[-1]
        check_ratio(prod(self.grid), config.mask_ratio)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.head = nn.Linear(width, configuration.num_input_channels * prod(self.token_size))
        for weight in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(weight, std=INITIAL_STD)
        nn.init.zeros_(self.head.bias)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and which of their tokens are hidden.

        Returns:
            `image` and `target` (B, C, *patch); `hidden_tokens` (B, tokens), bool; `hidden`, `valid` and `asked`
            (B, 1, *patch), bool: what the encoder does not see, what is real, and of that what is asked for.
        """
        image, valid = training_view(batch, random, self.config.spatial, train)
        kept = keep_tokens(random.child("mask"), valid, self.token_size, self.config.mask_ratio)
        return {
            "image": image,
            "hidden_tokens": hidden_tokens(kept, prod(self.grid)),
            "hidden": hidden_voxels(kept, self.token_size, image.shape[2:]),
            "valid": valid,
            **restoration_target(image, valid, self.token_size, self.config.target),
        }

    def forward(self, views: Views) -> StepOutput:
        """The absolute error on hidden voxels; the squared one is logged beside that of guessing the visible mean."""
        image, target, hidden, asked = (views[name] for name in ("image", "target", "hidden", "asked"))
        masked = image.masked_fill(hidden, 0)
        output = self._restore(masked, views["hidden_tokens"])
        metrics = {
            "mse": masked_mse(output.detach(), target, hidden, asked),
            "mse_chance": guess_error(target, hidden, asked),
            "hidden_share": hidden_share(hidden, views["valid"]),
            **self.config.target.metrics(hidden, asked, views["valid"]),
        }
        images = None if self.training else {"input": image, "masked": masked, "output": output.detach()}
        if images and self.config.target.normalize:
            images["target"] = target
        return StepOutput(loss=masked_l1(output, target, hidden, asked), metrics=metrics, images=images)

    def _restore(self, masked: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from nnssl_ext.models.mask_token import encode_masked
        from nnssl_ext.models.token_decoder import fold_tokens

        tokens = encode_masked(self.encoder, masked, hidden, self.mask_token)
        return fold_tokens(self.head(tokens), self.grid, self.token_size)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The voxels to restore are those of another case; see `PretextTask.sham`."""
        return restore_another_case(views)


@TRAINERS.register
class SimMIMTrainer(PretrainTrainer):
    """SimMIM with the recipe of Wald et al. 2024: AdamW with 50 epochs of warm-up, over 1000 x 250 steps."""

    task = SimMIM
    cost = StepCost(views=1, copies=1, decoder=False)
    vit = VIT_RECIPE
