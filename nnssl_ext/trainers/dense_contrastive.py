"""Dense contrast: the same place in two views should have the same features, and other places others.

Two overlapping crops are cut from one place, each moved and recoloured on its own. The whole network, decoder included,
gives every voxel a vector. Where a voxel of one view lies in the other is known from how they were cut, in scanner
coordinates, so nothing has to be matched: at some hundred places each view has to find the other's vector among those
of all other places, in both directions. Where the mid-plane of the body is known, the vector of the mirrored place may
count as a second, weaker positive (`mirror`).

Papers: O. Pinheiro et al. 2020 (arXiv:2011.05499) and Wang et al. 2021 (arXiv:2011.09157) for dense contrast. Other
than there, places closer than two strides of the features are no negatives of each other, and flat regions (air) are
left out. Of images of several modalities both views hold all: modalities are not contrasted with each other. Encoder
and decoder of a U-Net go to fine-tuning, of a transformer the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from nnssl_ext.core.checks import above_zero, at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.monitors import token_spread
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
from nnssl_ext.losses.dense_contrast import dense_contrast
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import UNMOVED, place_pair
from nnssl_ext.views.intensity import IntensityConfig, recoloured
from nnssl_ext.views.mirror import reflected, seen_at, shown_at
from nnssl_ext.views.occupancy import textured
from nnssl_ext.views.overlap import place_in
from nnssl_ext.views.places import across, picked, read_at, shared_places
from nnssl_ext.views.sham import of_another_case
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.tokens import whole_places
from nnssl_ext.views.transform import SpatialView, apply_transform

NEAR_STRIDES = 2
"""Places closer than so many strides of the features are no negatives of each other."""


@dataclass(frozen=True, kw_only=True)
class DenseContrastiveConfig:
    """Settings of dense contrast."""

    positions: int = 1024
    """Places that are compared in each sample, 2 or more; fewer where the views share fewer."""
    temperature: float = 0.2
    """Divides the cosines, above 0. Wang et al. 2021."""
    width: int = 32
    """Of a voxel's vector, 1 or more."""
    parent_scale: float = 1.4
    """Edge of the crop that both views are cut from, as a multiple of the patch's, 1 or more."""
    crop_scale: tuple[float, float] = (0.6, 1.0)
    """Smallest and largest edge of a view as a share of the largest that fits into that crop, in (0, 1]."""
    shift: float = 0.25
    """Longest way along each axis that the second view is moved away from where the two lie within one another, as a
    share of its edge, in [0, 1)."""
    background_std: float = 0.05
    """Places around which intensities deviate by less are background and left out, 0 or more."""
    spatial: SpatialConfig = field(default_factory=lambda: SpatialConfig(flip=0, rotation=0.5, scaling=0))
    """How each view is moved in training, without elastic deformation."""
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    """How the intensities of each view change in training."""
    mirror: bool = False
    """Whether a place should also be found by its mirror image in the other half of the body, and both are no negatives
    of each other. Takes a mid-plane that is known, as in images that were laid upon one template: a crop does not tell
    it."""
    mirror_axis: int | None = None
    """Axis of the preprocessed images, from 0, that runs from left to right."""
    mid_plane: float | None = None
    """Where the mid-plane cuts that axis, in mm from the border of the raw images, the same in all of them."""
    mirror_weight: float = 0.25
    """Weight of the mirror image beside the place itself, above 0. Neither published nor measured."""

    def __post_init__(self) -> None:
        at_least(self, positions=2, width=1, parent_scale=1, background_std=0)
        above_zero(self, "temperature", "mirror_weight")
        rising(self, "(0, 1]", "crop_scale")
        within(self, "[0, 1)", "shift", note=": the two views must overlap")
        within(self, "(-inf, inf)", "mid_plane")
        if self.spatial.elastic:
            raise ValueError(f"spatial.elastic={self.spatial.elastic} must be 0: its inverse is not known.")
        if self.mirror and (self.mirror_axis is None or self.mid_plane is None):
            raise ValueError(
                "mirror=True needs a known mid-plane: give its axis and place, the same in all images, as --set "
                "mirror_axis=2 mid_plane=90.5, or lay the images upon one template first. Else leave mirror=False"
            )


class DenseContrastive(PretextTask):
    """Finds the same place in another view; see the module."""

    Config = DenseContrastiveConfig
    info = TaskInfo(
        idea="give the same place in two views the same features, and other places others",
        paper="arXiv:2011.05499",
        choose="where a feature per voxel is the aim and the decoder should learn too, as for segmentation, "
        "registration and landmarks.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
    )
    config: DenseContrastiveConfig

    def __init__(self, config: DenseContrastiveConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with a vector per voxel.

        Raises:
            ValueError: Where the network cannot be built, or the images have no axis of that number.
        """
        super().__init__(config, configuration, num_cases)
        if config.mirror and config.mirror_axis not in range(configuration.dims):
            raise ValueError(f"mirror_axis={config.mirror_axis} must be one of 0 to {configuration.dims - 1}.")
        self.parent_scale = config.parent_scale
        self.encoder, self.decoder = build_dense(configuration, config.width)
        if is_transformer(self.encoder):
            self.decoder.get_parameter("mask_token").requires_grad_(False)  # views hold no padding
        self.stride = self.encoder.strides[0]
        self.positions = min(config.positions, prod(configuration.patch_size) // 2)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two overlapping views and places that both show; in validation they are crops of random size and place.

        Returns:
            `first` and `second` (B, C, *patch); `first_valid` and `second_valid` (B, 1, *patch); `places` (B, P),
            voxels of the first view, the last axis fastest; `there` (B, P, D), where the second view shows them, from
            -1 to 1 across it; `where` (B, P, D), in mm; `reach` (B,), the distance in mm below which places are near;
            `counted` (B, P), bool; `partner` (B,), which second view belongs to each first one; with `mirror` what
            `_mirrored` gives; for a transformer also `kept`, the tokens without padding of the first views and then of
            the second ones.
        """
        config, size = self.config, self.configuration.patch_size
        moves = config.spatial if train else UNMOVED
        pair = place_pair(
            batch.valid, batch.spacing, random.child("crops"), config.crop_scale, size, moves, config.shift
        )
        data = batch.data.masked_fill(~batch.valid, 0)
        first, second = (apply_transform(data, batch.valid, place) for place in pair)
        there = place_in(second.transform, first.transform)
        asked = textured(first.data, first.valid, config.background_std)
        chosen, counted = shared_places(asked, there, size, random.child("places"), self.positions)
        where = picked(first.transform.coordinates(), chosen) * batch.spacing[:, None]
        steps = torch.stack([place.matrix for place in pair]) * batch.spacing[:, :, None]  # a column a step, in mm
        mirrored = self._mirrored(batch, where, first, second) if config.mirror else {}
        if train:
            intensity = config.intensity.suited_to(self.configuration.normalization_schemes)
            first, second = recoloured(first, second, random, intensity)
        views = {
            "first": first.data,
            "second": second.data,
            "first_valid": first.valid,
            "second_valid": second.valid,
            "places": chosen,
            "there": across(picked(there, chosen), size),
            "where": where,
            "reach": NEAR_STRIDES * (steps.norm(dim=2) * torch.tensor(self.stride, device=there.device)).amax((0, 2)),
            "counted": counted,
            "partner": torch.arange(len(chosen), device=chosen.device),
            **mirrored,
        }
        if is_transformer(self.encoder):
            views["kept"] = whole_places(torch.cat([first.valid, second.valid]), self.encoder.token_size)
        return views

    def _mirrored(self, batch: Batch, where: torch.Tensor, first: SpatialView, second: SpatialView) -> Views:
        """The mirror images of places.

        Returns:
            `mirrored` (B, P, D), in mm as `where`; `first_mirror` and `second_mirror` (B, P, D), where the views show
            them, from -1 to 1 across each; `first_shows` and `second_shows` (B, P), bool, whether they do, and not air.
        """
        config, size = self.config, self.configuration.patch_size
        assert config.mirror_axis is not None
        assert config.mid_plane is not None
        mirrored = reflected(where, batch, config.mirror_axis, config.mid_plane)
        views = {"mirrored": mirrored}
        for name, view in (("first", first), ("second", second)):
            there = seen_at(view.transform, mirrored / batch.spacing[:, None])
            asked = textured(view.data, view.valid, config.background_std)
            views |= {f"{name}_mirror": there, f"{name}_shows": shown_at(asked, there, size)}
        return views

    def forward(self, views: Views) -> StepOutput:
        """The contrast beside its chance, and how often a place is found; with `mirror` also that of mirror images."""
        images, valid = (torch.cat([views[f"first{name}"], views[f"second{name}"]]) for name in ("", "_valid"))
        output, _ = run_dense(self.encoder, self.decoder, images, valid, views.get("kept"))
        maps, others = output.float().chunk(2)
        others = others[views["partner"]]
        first, second = picked(maps, views["places"]), read_at(others, views["there"])
        near = torch.cdist(views["where"], views["where"]) < views["reach"][:, None, None]
        if self.config.mirror:
            near = near | (torch.cdist(views["where"], views["mirrored"]) < views["reach"][:, None, None])
        contrast, metrics = dense_contrast(first, second, near, views["counted"], self.config.temperature)
        metrics["contrast"], loss = contrast, contrast
        if self.config.mirror:
            metrics |= self._mirror_contrast(views, (first, second), (maps, others), near)
            loss = contrast + self.config.mirror_weight * metrics["mirror_contrast"]
        pictures = {"first": views["first"], "second": views["second"], "features": maps.detach()}
        return StepOutput(
            loss=loss,
            metrics={name: value.detach() for name, value in metrics.items()},
            images=None if self.training else pictures,
            embeddings=Embeddings(
                first=first[:, 0].detach(),
                second=second[:, 0].detach(),
                token_spread=token_spread(first.detach(), views["counted"]),
            ),
        )

    def _mirror_contrast(
        self, views: Views, places: tuple[torch.Tensor, ...], maps: tuple[torch.Tensor, ...], near: torch.Tensor
    ) -> Views:
        """How well the vectors of places (B, P, D) in one view tell those of their mirror images in the other one."""
        losses, chances = [], []
        for vectors, features, name in zip(places, reversed(maps), ("second", "first"), strict=True):
            mirrored, counted = read_at(features, views[f"{name}_mirror"]), views["counted"] & views[f"{name}_shows"]
            loss, metrics = dense_contrast(vectors, mirrored, near, counted, self.config.temperature)
            losses.append(loss)
            chances.append(metrics["contrast_chance"])
        return {"mirror_contrast": torch.stack(losses).mean(), "mirror_contrast_chance": torch.stack(chances).mean()}

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The second view is another case's; see `PretextTask.sham`."""
        return {**views, "partner": of_another_case(views["partner"])}


@TRAINERS.register
class DenseContrastiveTrainer(PretrainTrainer):
    """Dense contrast with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders."""

    task = DenseContrastive
    cost = StepCost(views=2, copies=1, decoder=True)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
