"""CroCo: restore a nearly hidden view of some anatomy by looking at another view of it.

Two overlapping crops are cut from one place, each moved, deformed and changed in intensity on its own (or they are two
co-registered images of one session). Nine in ten tokens of the first are hidden. One transformer encodes what is left
of it and all of the second; a decoder then predicts the hidden tokens, and its cross-attention has to find in the
second view what the first one hides. So the encoder learns what corresponds, not only what is likely.

Papers: Weinzaepfel et al. 2022 (arXiv:2210.10716) and 2023 (arXiv:2211.10408, rotary positions). Other than there,
images are volumes, positions are Primus' (learned and rotary), the target is normalised per token and channel, views
are not mirrored against one another, and a token that holds padding is seen in neither view. The encoder goes to
fine-tuning; the decoder stays in the checkpoint, as its `predictor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from nnssl_ext.core.checks import above_zero, at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.losses.mae import guess_error, masked_mse
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import UNMOVED, place_pair
from nnssl_ext.views.intensity import IntensityConfig, recoloured
from nnssl_ext.views.overlap import shown_by
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.targets import TargetConfig, restoration_target
from nnssl_ext.views.tokens import check_ratio, hidden_voxels, keep_tokens
from nnssl_ext.views.transform import SpatialView, apply_transform

if TYPE_CHECKING:
    from nnssl_ext.models.primus import PrimusEncoder

SESSION = DataNeeds(images=2, same="session")


@dataclass(frozen=True, kw_only=True)
class CroCoConfig:
    """Settings of cross-view completion."""

    mask_ratio: float = 0.9
    """Share of the first view's real voxels that is hidden, in (0, 1), in whole tokens. Weinzaepfel et al. 2022."""
    pair: Literal["crop", "session"] = "crop"
    """What the two views are of: one image, or two co-registered images of one session, such as two contrasts."""
    parent_scale: float = 1.4
    """Edge of the crop that both views are cut from, as a multiple of the patch's, 1 or more."""
    crop_scale: tuple[float, float] = (0.6, 0.9)
    """Smallest and largest edge of a view as a share of the largest that fits into that crop, in (0, 1]."""
    shift: float = 0.25
    """Longest way along each axis that the second view is moved away from where the two lie within one another, as a
    share of its edge, in [0, 1)."""
    spatial: SpatialConfig = field(default_factory=lambda: SpatialConfig(flip=0, rotation=0.5, scaling=0, elastic=0.5))
    """How each view is moved and deformed in training. A flip would show mirrored anatomy beside the true one."""
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    """How the intensities of each view change in training."""
    target: TargetConfig = field(default_factory=lambda: TargetConfig(normalize=True))
    """What is asked for of the hidden voxels. Weinzaepfel et al. 2022 normalise every token."""
    decoder_depth: int = 8
    """Blocks of the decoder, 1 or more. Weinzaepfel et al. 2022."""
    decoder_heads: float = 0.5
    """Attention heads of the decoder as a share of the encoder's, above 0; at least one, and as wide."""
    decoder_rotary: bool = True
    """Whether the decoder's attention rotates by position along every axis, as CroCo v2's does, besides the learned
    positions."""

    def __post_init__(self) -> None:
        within(self, "(0, 1)", "mask_ratio")
        if self.pair not in ("crop", "session"):
            raise ValueError(f"pair={self.pair!r} must be 'crop' or 'session'.")
        at_least(self, parent_scale=1, decoder_depth=1)
        rising(self, "(0, 1]", "crop_scale")
        within(self, "[0, 1)", "shift", note=": the two views must overlap")
        above_zero(self, "decoder_heads")


class CroCo(PretextTask):
    """Restores a hidden view from another one; see the module."""

    Config = CroCoConfig
    info = TaskInfo(
        idea="restore hidden parts of a view by looking at another view of the same anatomy",
        paper="arXiv:2210.10716",
        choose="where correspondence matters, as in registration and follow-up scans, or where sessions hold "
        "co-registered images.",
        encoders={"vit"},
        needs_if="with pair=session: two co-registered images a session",
    )
    config: CroCoConfig
    encoder: PrimusEncoder

    def __init__(self, config: CroCoConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's transformer and the decoder.

        Raises:
            ValueError: Where none of the patch's tokens would be hidden, or the network cannot be built.
        """
        from nnssl_ext.models.cross_decoder import CrossDecoder
        from nnssl_ext.models.primus import build_primus

        super().__init__(config, configuration, num_cases)
        self.parent_scale = config.parent_scale
        self.encoder = build_primus(configuration)
        check_ratio(prod(self.encoder.grid), config.mask_ratio)
        num_heads = max(1, round(config.decoder_heads * self.encoder.num_heads))
        self.decoder = CrossDecoder(
            self.encoder, configuration.num_input_channels, config.decoder_depth, num_heads, config.decoder_rotary
        )

    @property
    def needs(self) -> DataNeeds:
        """Two images of a session, where the config pairs them; see `PretextTask.needs`."""
        return SESSION if self.config.pair == "session" else self.info.needs

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two overlapping views, which tokens of each are seen, and what is asked for.

        In validation they are crops of random size and place, and nothing else.

        Returns:
            `first` and `second` (B, C, *patch); `kept` (B, n) and `second_kept` (B, tokens), the tokens seen of each,
            -1 at the end where there are fewer; `target` (B, C, *patch), of the first view; `valid` and `asked`
            (B, 1, *patch), of the first view; `shown` (B, 1, *patch), its voxels that the second shows as well.
        """
        random = replace(random, samples=random.samples[:: self.needs.images])
        first, second = self._pair(batch, random, train)
        if train:
            intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes)
            first, second = recoloured(first, second, random, intensity)
        token_size, mask = self.encoder.token_size, random.child("mask")
        return {
            "first": first.data,
            "second": second.data,
            "kept": keep_tokens(mask, first.valid, token_size, self.config.mask_ratio),
            "second_kept": keep_tokens(mask, second.valid, token_size, 0),
            "valid": first.valid,
            **restoration_target(first.data, first.valid, token_size, self.config.target),
            "shown": shown_by(second.transform, first.transform),
        }

    def _pair(self, batch: Batch, random: SampleRandom, train: bool) -> tuple[SpatialView, SpatialView]:
        """Cut from one image, or from the two in consecutive rows, which show the same place."""
        config, images = self.config, self.needs.images
        first, second = (slice(number % images, None, images) for number in (0, 1))
        real = batch.valid[first] & batch.valid[second]
        moves = config.spatial if train else UNMOVED
        places = place_pair(
            real,
            batch.spacing[first],
            random.child("crops"),
            config.crop_scale,
            self.configuration.patch_size,
            moves,
            config.shift,
        )
        a, b = (
            apply_transform(batch.data[rows], batch.valid[rows], place)
            for rows, place in zip((first, second), places, strict=True)
        )
        return a, b

    def forward(self, views: Views) -> StepOutput:
        """The error on hidden tokens, beside that of guessing a constant.

        Validation adds `mse_other_case`, the error where the second view is of another sample: it is higher as far as
        the decoder looks at the second view.
        """
        first, target, asked = views["first"], views["target"], views["asked"]
        kept, places = views["kept"], views["second_kept"]
        hidden = hidden_voxels(kept, self.encoder.token_size, first.shape[2:])
        masked = torch.where(hidden, 0, first)
        visible, context = self.encoder.tokens(masked, kept), self.encoder.tokens(views["second"], places)
        output = self.decoder(visible, kept, context, places)
        loss, counted = masked_mse(output, target, hidden, asked), hidden & asked
        metrics = {
            "mse": loss.detach(),
            "mse_chance": guess_error(target, hidden, asked),
            "overlap": (views["shown"] & counted).sum() / counted.sum().clamp(min=1),
            **self.config.target.metrics(hidden, asked, views["valid"]),
        }
        if self.training:
            return StepOutput(loss=loss, metrics=metrics)
        if len(first) > 1:
            other = self.decoder(visible, kept, context.roll(1, 0), places.roll(1, 0)).detach()
            metrics["mse_other_case"] = masked_mse(other, target, hidden, asked)
        images = {"input": first, "masked": masked, "second": views["second"], "output": output.detach()}
        return StepOutput(loss=loss, metrics=metrics, images={**images, "target": target})

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The tokens to restore are those of another case; see `PretextTask.sham`."""
        return restore_another_case(views)

    def predictor(self) -> Mapping[str, torch.Tensor]:
        """The decoder; see `PretextTask`."""
        return self.decoder.state_dict(prefix="decoder.")


@TRAINERS.register
class CroCoTrainer(PretrainTrainer):
    """Cross-view completion with the recipe of Weinzaepfel et al. 2022 over 1000 x 250 steps.

    The published rate, 1.5e-4 per 256 samples of a step, is kept for the small batches of volumes and not scaled down
    with them: AdamW's steps are as long as the rate whatever the batch, and at two samples it would be 1e-6.
    """

    task = CroCo
    cost = StepCost(views=1.5, copies=1, decoder=True)
    optim = OptimConfig(name="adamw", lr=1.5e-4, weight_decay=5e-2, betas=(0.9, 0.95), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=40 * 250)
