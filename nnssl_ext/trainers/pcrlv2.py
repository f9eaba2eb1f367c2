"""PCRLv2: views should agree at several scales of a decoder, and the same decoder restores the image.

Two large crops of a volume are damaged, and a U-Net without skip connections restores both. At three scales of its
decoder pooled features of one crop predict those of the other, and of six small crops those of both large ones: at one
scale, drawn for each pair. At the scale drawn for the large pair a coarse restoration is asked for as well, whose
weight falls to 0 over the run.

Paper: Zhou et al. 2023 (arXiv:2301.00772). Other than there, pooled features are scaled by running moments and not by
the batch, which is too small, and by the batch they are centred alone; the output has no sigmoid, since images are
z-scored; the damage is noise in boxes, beside changes of intensity; and the weight of the coarse restoration falls step
by step over whatever length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.core.checks import at_least, rising
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
from nnssl_ext.losses.mae import masked_mse
from nnssl_ext.losses.restoration import trivial_errors
from nnssl_ext.losses.siamese import agreements
from nnssl_ext.models.backbone import build_encoder
from nnssl_ext.models.perceptron import perceptron
from nnssl_ext.models.skipless import CONVS, SkiplessDecoder
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.corruptions import noise_by_boxes
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.multicrop import NUM_GLOBALS, MultiCropConfig, multi_crop, num_patches, view_sizes
from nnssl_ext.views.sham import of_another_case, restore_another_case

NUM_SCALES = 3
"""Of the decoder, the finest ones, at which features agree: the paper's."""
UNCHANGED = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)
"""Intensities as they are."""
INTERPOLATION = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class PCRLv2Config:
    """Settings of PCRLv2."""

    crops: MultiCropConfig = field(default_factory=lambda: MultiCropConfig(num_locals=6))
    """Which views are taken. Restored are the two global ones, as they are before their intensities change."""
    boxes: int = 5
    """Boxes of noise in a global view, 1 or more."""
    box_sides: tuple[float, float] = (1 / 6, 1 / 3)
    """Shortest and longest edge of a box as a share of the view's."""
    predictor_factor: int = 2
    """Hidden width of the predictors as a multiple of the features', 1 or more."""
    agreement_weight: float = 1.0
    """Of the views' agreement, global and local alike, beside the restoration, 0 or more."""

    def __post_init__(self) -> None:
        at_least(self, boxes=1, predictor_factor=1, agreement_weight=0)
        rising(self, "(0, 1]", "box_sides")


class PCRLv2(PretextTask):
    """Restores damaged views that agree at several scales; see the module."""

    Config = PCRLv2Config
    info = TaskInfo(
        idea="restore damaged views from the deepest features alone, and let views agree at several scales",
        paper="arXiv:2301.00772",
        choose="where one feature per crop should know of structure and of detail. It hands over no decoder, since its "
        "own has no skip connections.",
        encoders={"cnn", "vit"},
        negative=True,
    )
    config: PCRLv2Config
    beta: torch.Tensor
    """Weight of the coarse restoration: from 1 to 0 along half a cosine."""

    def __init__(self, config: PCRLv2Config, configuration: Configuration, num_cases: int) -> None:
        """Builds encoder, decoder, and at each scale a predictor and an output.

        Raises:
            ValueError: Where the network cannot be built, the views do not fit it, or views are to agree and the batch
                is a single crop.
        """
        super().__init__(config, configuration, num_cases)
        if config.agreement_weight and configuration.batch_size < 2:
            raise ValueError(
                "a batch of 1 has no other case to tell from what all cases share: use a -batch_size of 2 or more, or "
                "--set agreement_weight=0"
            )
        self.encoder = build_encoder(configuration)
        self.parent_scale = config.crops.parent_scale
        self.sizes = view_sizes(config.crops, configuration.patch_size, self.encoder.strides[-1])
        self.decoder = SkiplessDecoder(self.encoder)
        widths, channels = self.decoder.channels[-NUM_SCALES:], configuration.num_input_channels
        conv = CONVS[configuration.dims]
        self.standards: Any = nn.ModuleList(Standardise(width) for width in widths)
        self.predictors = nn.ModuleList(perceptron([width, config.predictor_factor * width, width]) for width in widths)
        self.coarse = nn.ModuleList(conv(width, channels, 1) for width in widths)
        self.output = conv(widths[-1], channels, 1)
        self.register_buffer("beta", torch.ones(()))

    @property
    def pairs(self) -> tuple[list[int], list[int]]:
        """Numbers of the views that are compared, global ones first: both global ones, then each with each local."""
        local = range(NUM_GLOBALS, NUM_GLOBALS + self.config.crops.num_locals)
        pairs = [(0, 1), *((one, other) for one in range(NUM_GLOBALS) for other in local)]
        return [one for one, _ in pairs], [other for _, other in pairs]

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two damaged global and several local crops of each sample; moved and recoloured in training alone.

        Returns:
            `global0`, `global1` (B, C, *global size); `local0`, ... (B, C, *local size); `target` (B, 2, C, *global
            size), the global ones undamaged; `valid` (B, 2, 1, *global size), bool; `scale` (B, pairs), at which of the
            scales each pair is compared; `partner` (B,), the sample whose features each one has to predict.
        """
        config = self.config
        plain = replace(config.crops, intensity=UNCHANGED)
        large, small = multi_crop(batch, random, plain, self.sizes, augment=train)
        intensity = config.crops.suited_to(self.configuration.normalization_schemes).intensity if train else UNCHANGED
        drawn = random.integers("scale", 0, len(self.predictors), (len(self.pairs[0]),))
        views = {
            "target": torch.stack([view.data for view in large], 1),
            "valid": torch.stack([view.valid for view in large], 1),
            "scale": torch.from_numpy(drawn).to(batch.data.device),
            "partner": torch.arange(len(batch.data), device=batch.data.device),
        }
        for number, view in enumerate(large):
            draws = random.child(f"damage{number}")
            changed = intensity_view(view.data, view.valid, draws.child("intensity"), intensity)
            noisy = noise_by_boxes(changed, view.valid, draws, boxes=config.boxes, sides=config.box_sides, around=False)
            views[f"global{number}"] = noisy.masked_fill(~view.valid, 0)
        for number, view in enumerate(small):
            views[f"local{number}"] = intensity_view(
                view.data, view.valid, random.child(f"change{number}"), intensity, inplace=True
            )
        return views

    def forward(self, views: Views) -> StepOutput:
        """Both restorations and the agreement, beside what is known to be reached without learning."""
        maps = self._decoded(torch.cat([views["global0"], views["global1"]]))
        pooled = [features.float().flatten(2).mean(2) for features in maps]
        if self.config.crops.num_locals:
            small = [view for name, view in views.items() if name.startswith("local")]
            local = [features.float().flatten(2).mean(2) for features in self._decoded(torch.cat(small))]
            pooled = [torch.cat(both) for both in zip(pooled, local, strict=True)]
        agreement, metrics, embeddings = self._agreement(pooled, views["partner"], views["scale"])
        target, valid = views["target"].flatten(0, 1), views["valid"].flatten(0, 1)
        image = torch.stack([views["global0"], views["global1"]], 1).flatten(0, 1)
        output = by_sample(self.output(maps[-1])).flatten(0, 1)
        mse = masked_mse(output, target, valid, valid)
        coarse = masked_mse(self._coarse(maps, views["scale"][:, 0]).flatten(0, 1), target, valid, valid)
        metrics["mse"], metrics["coarse_mse"] = mse.detach(), coarse.detach()
        metrics["mse_chance"], metrics["mse_untouched"] = trivial_errors(masked_mse, image, target, valid)
        pictures = {"input": target[::2], "damaged": image[::2], "output": output[::2].detach()}
        return StepOutput(
            loss=mse + self.beta * coarse - self.config.agreement_weight * agreement,
            metrics=metrics,
            images=None if self.training else pictures,
            embeddings=embeddings,
        )

    def _decoded(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The decoder's finest maps, coarsest first."""
        return self.decoder(self.encoder(images)[-1])[-NUM_SCALES:]

    def _agreement(
        self, pooled: Sequence[torch.Tensor], partner: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Embeddings]:
        """Agreement of the global pair and the mean over the others, each pair at the scale that was drawn for it.

        Features of global views are compared less their mean over the batch, those of local ones less theirs: what all
        share, size among it, would be agreed upon first, and a running mean can be outrun.

        Args:
            pooled: At each scale (views * B, width), of global views first.
            partner: (B,).
            scale: (B, pairs).
        """
        one, other = self.pairs
        found, elsewhere, shown = [], [], []
        for features, standard, predictor in zip(pooled, self.standards, self.predictors, strict=True):
            features = features.unflatten(0, (-1, len(partner)))
            with torch.autocast(features.device.type, enabled=False):
                scaled = standard(features)
                wanted = torch.cat([kind - kind.mean((0, 1)) for kind in scaled.tensor_split([NUM_GLOBALS])])
                predicted = predictor(wanted)
            found.append(agreements(wanted, predicted, partner)[one, other])
            elsewhere.append(agreements(wanted, predicted, partner.roll(1))[0, 1].detach())
            shown.append(scaled[:NUM_GLOBALS].detach())
            if self.training:
                standard.collect(features)
        chosen = torch.stack(found).gather(0, scale.T[None])[0].mean(1)
        agreement = chosen[0] + (chosen[1:].mean() if len(chosen) > 1 else 0)
        metrics = {
            "agreement": torch.stack(found)[:, 0].mean().detach(),
            "agreement_chance": torch.stack(elsewhere).mean(),
        }
        first, second = torch.cat(shown, -1).unbind(0)
        return agreement, metrics, Embeddings(first=first, second=second)

    def _coarse(self, maps: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """Restorations at each sample's scale, brought to full size: (B, 2, C, *global size)."""
        mode: Any = INTERPOLATION[self.configuration.dims]
        size = list(maps[-1].shape[2:])
        outputs = [conv(features) for conv, features in zip(self.coarse, maps, strict=True)]
        whole = torch.stack([by_sample(functional.interpolate(each, size=size, mode=mode)) for each in outputs])
        return whole[scale, torch.arange(len(scale), device=scale.device)]

    def after_step(self, step: int, total: int) -> None:
        """Lowers the weight of the coarse restoration, and takes up the moments."""
        self.beta.fill_((1 + math.cos(math.pi * (step + 1) / total)) / 2)
        for standard in self.standards:
            standard.update()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Crops to restore and features to predict are another case's; see `PretextTask.sham`."""
        return {**restore_another_case(views, asked="valid"), "partner": of_another_case(views["partner"])}


def by_sample(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all first global views, then of all second ones, (2 B, ...), as (B, 2, ...)."""
    return tensor.unflatten(0, (NUM_GLOBALS, -1)).transpose(0, 1)


@TRAINERS.register
class PCRLv2Trainer(PretrainTrainer):
    """PCRLv2 with AdamW at 1e-3, warm-up and a cosine over 240 epochs; on a transformer as masked autoencoders.

    Takes a batch of 2 or more on each rank, for crops of one case share too much; without the agreement, of any size.
    """

    task = PCRLv2
    cost = StepCost(views=2.75, copies=1, decoder=True)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    num_epochs = 240
    vit = VIT_RECIPE

    def step_cost(self, configuration: Configuration) -> StepCost:
        """Of the views that were asked for; see `PretrainTrainer`."""
        stride = [prod(steps) for steps in zip(*configuration.strides, strict=True)]
        views = num_patches(self.task_config.crops, NUM_GLOBALS, configuration.patch_size, stride)
        return replace(self.cost, views=views)
