"""MultiMAE: hide most of several co-registered modalities, and restore each from what is left of all.

Every modality (a channel of the case: CT and MR, or contrasts of MR) is cut into tokens of its own. A fixed number of
them all stays visible, shared among the modalities at random; one transformer encodes them beside a global token, and
for every modality a light decoder, whose tokens look at all visible ones, predicts the hidden tokens. So the encoder
learns what one contrast says about another. Background is not asked for.

Paper: Bachmann et al. 2022 (arXiv:2204.01678). Other than there, each block of a decoder looks at the visible tokens,
the encoder's modality embedding alone tells it of which modality they are, and positions are Primus' (learned and
rotary); the global token has none.

What goes to fine-tuning is a stock Primus on all channels, with a token per place instead of one per place and
modality. Its token is the mean of the modalities' tokens there: where these agree, attention to the mean is attention
to all of them. A stock stem sums over channels, `sum_c V_c x_c + b`, so that mean is had by projecting modality c of M
with `M V_c` and adding `b` and an embedding whose mean over modalities is 0. These weights are the stem's own: nothing
is converted on export, and `encoder` is the fine-tuned network at every step. The global token stays behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.core.checks import at_least, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.losses.mae import guess_error, masked_mse
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.modalities import keep_modalities, of_modality
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.targets import TargetConfig, restoration_target
from nnssl_ext.views.tokens import check_ratio, hidden_voxels

if TYPE_CHECKING:
    from nnssl_ext.models.primus import PrimusEncoder

STEM = "encoder.down_projection.proj.weight"
INITIAL_STD = 0.02
"""Spread of the embeddings at the start, as of all of Primus'."""


@dataclass(frozen=True, kw_only=True)
class MultiMAEConfig:
    """Settings of multi-modal masked autoencoders."""

    mask_ratio: float = 5 / 6
    """Share of the tokens of all modalities together that is hidden, in (0, 1). Bachmann et al. 2022 hide 5/6 of three
    modalities and 3/4 of two. A crop with padding shows as many as one without, so a smaller share of it is hidden."""
    decoder_depth: int = 2
    """Blocks of each modality's decoder, 1 or more. Bachmann et al. 2022."""
    decoder_width: int = 256
    """Most features of a decoder's token, 1 or more, in whole heads as wide as the encoder's; never more of them than
    the encoder has, and at least one. Bachmann et al. 2022."""
    target: TargetConfig = field(default_factory=lambda: TargetConfig(normalize=True, background_std=0.05))
    """What is asked for of the hidden voxels, for each modality on its own."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training."""

    def __post_init__(self) -> None:
        within(self, "(0, 1)", "mask_ratio")
        at_least(self, decoder_depth=1, decoder_width=1)


class MultiMAE(PretextTask):
    """Restores hidden tokens of several modalities from all of them; see the module."""

    Config = MultiMAEConfig
    info = TaskInfo(
        idea="hide most of several co-registered modalities and restore each from what is left of all",
        paper="arXiv:2204.01678",
        choose="where cases hold two or more co-registered modalities, such as MR contrasts, that one encoder should "
        "serve.",
        encoders={"vit"},
        needs=DataNeeds(channels=2),
    )
    config: MultiMAEConfig
    encoder: PrimusEncoder

    def __init__(self, config: MultiMAEConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's transformer and a decoder for every modality.

        Raises:
            ValueError: With a single modality, where no token would be hidden, or the network cannot be built.
        """
        from nnssl_ext.models.cross_decoder import CrossDecoder
        from nnssl_ext.models.primus import build_primus

        super().__init__(config, configuration, num_cases)
        self.num_modalities = configuration.num_input_channels
        if self.num_modalities < self.info.needs.channels:
            raise ValueError(
                f"MultiMAE restores modalities from one another, and configuration {configuration.name!r} has "
                f"{self.num_modalities}: use a dataset of 2 or more co-registered channels, or -tr MAETrainer"
            )
        self.encoder = build_primus(configuration)
        self.num_tokens = prod(self.encoder.grid)
        check_ratio(self.num_modalities * self.num_tokens, config.mask_ratio)
        with torch.no_grad():  # each modality's projection begins as a stem of one channel would
            self.encoder.down_projection.proj.weight.div_(self.num_modalities**0.5)
        width = self.encoder.channels[-1]
        self.modality = nn.Parameter(INITIAL_STD * torch.randn(self.num_modalities, 1, width))
        self.global_token = nn.Parameter(INITIAL_STD * torch.randn(1, 1, width))
        num_heads = min(max(1, config.decoder_width // self.encoder.head_width), self.encoder.num_heads)
        self.decoders = nn.ModuleList(
            CrossDecoder(self.encoder, 1, config.decoder_depth, num_heads) for _ in range(self.num_modalities)
        )

    def lr_scale(self, name: str) -> float:
        """The stem's slower, so that each projection, M times the stem's, moves at the recipe's rate."""
        return 1 / self.num_modalities if name == STEM else 1.0

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and which of their tokens are visible.

        Returns:
            `image` and `target` (B, M, *patch); `kept` (B, n), the visible tokens, and -1 at the end where there are
            fewer; `hidden` and `asked` (B, M, *patch), bool, and `valid` (B, 1, *patch).
        """
        image, valid = training_view(batch, random, self.config.spatial, train)
        token_size = self.encoder.token_size
        kept = keep_modalities(random.child("mask"), valid, token_size, self.num_modalities, self.config.mask_ratio)
        hidden = [
            hidden_voxels(of_modality(kept, number, self.num_tokens), token_size, image.shape[2:])
            for number in range(self.num_modalities)
        ]
        alone = valid.repeat_interleave(self.num_modalities, 0)
        wanted = restoration_target(_each(image), alone, token_size, self.config.target)
        return {
            "image": image,
            "valid": valid,
            "kept": kept,
            "hidden": torch.cat(hidden, 1),
            **{name: value.view(image.shape) for name, value in wanted.items()},
        }

    def forward(self, views: Views) -> StepOutput:
        """The error on hidden tokens, a mean over samples and modalities, beside that of guessing a constant."""
        image, hidden, kept = views["image"], views["hidden"], views["kept"]
        masked = torch.where(hidden, 0, image)
        tokens = self.encode(masked, kept)
        places = torch.where(kept >= 0, kept % self.num_tokens, -1)
        outputs = [
            decoder(tokens, of_modality(kept, number, self.num_tokens), tokens, places)
            for number, decoder in enumerate(self.decoders)
        ]
        output = torch.cat(outputs, 1)
        target, counted = _each(views["target"]), (_each(hidden), _each(views["asked"]))
        loss = masked_mse(_each(output), target, *counted)
        metrics = {
            "mse": loss.detach(),
            "mse_chance": guess_error(target, *counted),
            "visible_share": (kept >= 0).float().mean() * kept.shape[1] / (self.num_modalities * self.num_tokens),
            **self.config.target.metrics(hidden, views["asked"], views["valid"]),
        }
        if self.training:
            return StepOutput(loss=loss, metrics=metrics)
        images = {"input": image, "masked": masked, "target": views["target"], "output": output.detach()}
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def encode(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Encodes the visible tokens of all modalities beside the global token.

        Args:
            x: Images (B, M, *patch).
            kept: (B, n), as `views` gives it.

        Returns:
            (B, n, D), without the global token.
        """
        from nnssl_ext.models.primus import pick, rotary_table

        tokens = torch.cat([self.global_token.expand(len(x), -1, -1), pick(self.embed(x), kept)], 1)
        table = rotary_table(self.encoder.eva.rope, self.encoder.grid, self.encoder.grid)
        unturned = torch.arange(table.shape[1], device=table.device).ge(table.shape[1] // 2).to(table)  # sines, cosines
        rope = torch.cat([unturned.expand(len(x), 1, -1), table[kept.clamp(min=0) % self.num_tokens]], 1)
        return self.encoder.attend(tokens, rope, functional.pad(kept >= 0, (1, 0), value=True))[:, 1:]

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Every modality's tokens with their positions, whose mean over modalities is the stock network's token.

        Args:
            x: Images (B, M, *patch).

        Returns:
            (B, M x tokens, D), modality by modality.
        """
        stem, number = self.encoder.down_projection.proj, self.num_modalities
        project = functional.conv3d if x.ndim == 5 else functional.conv2d
        weight = (number * stem.weight).transpose(0, 1).flatten(0, 1).unsqueeze(1)  # (M x D, 1, *token)
        embedded = project(x, weight, stride=self.encoder.token_size, groups=number)
        tokens = embedded.unflatten(1, (number, -1)).flatten(3).transpose(2, 3)
        embedding = self.modality - self.modality.mean(0) + stem.bias
        return (tokens + embedding + self.encoder.positions(self.encoder.grid)).flatten(1, 2)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The tokens to restore are those of another case; see `PretextTask.sham`."""
        return restore_another_case(views)


def _each(values: torch.Tensor) -> torch.Tensor:
    """Every modality as a sample of its own: (B, M, *patch) to (B x M, 1, *patch)."""
    return values.flatten(0, 1).unsqueeze(1)


@TRAINERS.register
class MultiMAETrainer(PretrainTrainer):
    """Multi-modal masked autoencoders: the optimiser and schedule of Bachmann et al. 2022 over 1000 x 250 steps.

    The rate is that of `MAETrainer` on a transformer; the paper's is for steps of 2048 samples.
    """

    task = MultiMAE
    cost = StepCost(views=1, copies=1, decoder=True, tokens=0.6)
    optim = OptimConfig(name="adamw", lr=3e-4, weight_decay=5e-2, betas=(0.9, 0.95), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=40 * 250)
