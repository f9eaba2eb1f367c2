"""Registration: two images are laid upon each other by a deformation that is told from features of each.

The plan's network gives every voxel of either image a vector, each image by itself. From the vectors of both, light
heads tell an affine map and then a flow that does not fold, under which the moving image should look like the fixed
one. Parts of both are hidden and restored, so that the features tell what is there and not only where it belongs. The
images are of two cases (`pair=case`), so anatomy that all cases share is what helps; or two views of one, the fixed one
deformed: told by how alike the images become (`pair=view`), or by the deformation itself (`pair=warp`).

Papers: He et al. 2023 (arXiv:2303.00874) for registration and restoration as pretraining; Balakrishnan et al. 2019
(arXiv:1809.05231) and Dalca et al. 2018 (arXiv:1805.04605) for the flow. Other than there, correlation is signed, only
voxels count that both images show and that are not flat (air), smoothness is measured in millimetres, and what is
hidden is blocks, as in masked autoencoders. Encoder and decoder of a U-Net go to fine-tuning, of a transformer the
encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Literal

import torch
from torch import nn

from nnssl_ext.core.checks import at_least, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.losses.mae import guess_error, masked_mse
from nnssl_ext.losses.registration import endpoint_error, mean_ncc, squared_gradients
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.models.fields import determinants, warp
from nnssl_ext.models.registration import Deformation, RegistrationHead
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import UNMOVED
from nnssl_ext.views.masks import block_mask
from nnssl_ext.views.occupancy import occupied_cells
from nnssl_ext.views.overlap import place_in
from nnssl_ext.views.places import unmoved
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, draw_transform, training_view
from nnssl_ext.views.tokens import whole_only
from nnssl_ext.views.transform import SpatialTransform, apply_transform

SHOWN = 1 - 1e-3
"""Least interpolated validity of what a field shows, 1 but for rounding."""


@dataclass(frozen=True, kw_only=True)
class RegistrationConfig:
    """Settings of registration."""

    pair: Literal["case", "view", "warp"] = "case"
    """What is registered: crops of two cases of one modality; or two views of one crop, told by how alike they become
    (`view`) or by the known deformation between them (`warp`)."""
    similarity: float = 1.0
    """Weight of the images' unlikeness, 1 minus their local correlation; with `pair=warp` of the distance from the true
    deformation, in voxels. 0 or more."""
    smoothness: float = 1.0
    """Weight of the velocity's squared gradients, 0 or more."""
    restoration: float = 1.0
    """Weight of the squared error of hidden voxels, 0 or more."""
    window: int = 9
    """Voxels along each axis in which images are correlated, odd and 3 or more. Balakrishnan et al. 2019."""
    mask_ratio: float = 0.25
    """Share of the voxels of both images that is hidden and restored, in (0, 1)."""
    block_size: int = 8
    """Edge of a hidden block in voxels, 1 or more."""
    width: int = 16
    """Of a voxel's vector, 1 or more."""
    hidden_width: int = 32
    """Of the heads' hidden layers, 1 or more."""
    background_std: float = 0.05
    """Voxels around which the fixed image deviates by less are background, and need not look alike; 0 or more."""
    spatial: SpatialConfig = field(
        default_factory=lambda: SpatialConfig(
            flip=0, rotation=0.5, rotation_degrees=15, scaling=0.5, scale_range=(0.85, 1.2)
        )
    )
    """How each of two cases, or the moving one of two views, is moved in training."""
    parent_scale: float = 1.4
    """Edge of the crop that two views are cut from, as a multiple of the patch's, 1 or more."""
    warp: SpatialConfig = field(
        default_factory=lambda: SpatialConfig(
            flip=0, rotation=1, rotation_degrees=10, scaling=1, scale_range=(0.9, 1.1), elastic=1
        )
    )
    """How the fixed one of two views is moved and deformed against the crop, in training and in validation."""

    def __post_init__(self) -> None:
        if self.pair not in ("case", "view", "warp"):
            raise ValueError(f"pair={self.pair!r} must be 'case', 'view' or 'warp'.")
        at_least(self, similarity=0, smoothness=0, restoration=0, background_std=0)
        at_least(self, parent_scale=1, block_size=1, width=1, hidden_width=1)
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"window={self.window} must be odd, and 3 or more.")
        within(self, "(0, 1)", "mask_ratio")
        for name, moves in (("spatial", self.spatial), ("warp", self.warp)):
            if moves.flip:
                raise ValueError(f"{name}.flip={moves.flip} must be 0: anatomy would be laid upon its mirror image.")
        if self.pair != "case" and self.spatial.elastic:
            raise ValueError(f"spatial.elastic={self.spatial.elastic} must be 0: set warp.elastic, which has a truth.")


class Registration(PretextTask):
    """Lays two images upon each other; see the module."""

    Config = RegistrationConfig
    info = TaskInfo(
        idea="lay two images upon each other by a smooth deformation, and restore hidden parts of both",
        paper="arXiv:2303.00874",
        choose="where cases show the same anatomy in the same pose, as heads and organs cut out do: then what "
        "corresponds between them is there to be learned. On bodies cut at random there is little.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
        needs=DataNeeds(images=2, same="modality"),
    )
    config: RegistrationConfig

    def __init__(self, config: RegistrationConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with a vector per voxel, and the heads.

        Raises:
            ValueError: Where no block of the patch would be hidden, or the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        _check_blocks(config, configuration.patch_size)
        if config.pair != "case":
            self.parent_scale = config.parent_scale
        self.encoder, self.decoder = build_dense(configuration, config.width)
        conv = nn.Conv3d if configuration.dims == 3 else nn.Conv2d
        self.restore = conv(config.width, configuration.num_input_channels, 1)
        self.head = RegistrationHead(configuration.dims, config.width, config.hidden_width)

    @property
    def needs(self) -> DataNeeds:
        """Two cases of one modality, or one image for two views of it; see `PretextTask.needs`."""
        return self.info.needs if self.config.pair == "case" else DataNeeds()

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two images of each sample, first the moving and then the fixed one, and what of them is hidden.

        Returns:
            `target` (B, 2, C, *patch), both images, and `images`, the same as the network sees them: 0 where `hidden`
            (B, 2, 1, *patch); `valid` and `asked` (B, 2, 1, *patch), bool, what is real and what is asked for;
            `spacing` (B, D), in mm, that of the fixed image's case; of two views also `truth` (B, D, *patch), the
            displacement from the fixed to the moving one in voxels, and `known` (B, 1, *patch), bool, where both show
            the place; for a transformer also `kept`, the tokens without padding of the images in turn.
        """
        config, patch = self.config, self.configuration.patch_size
        batch = replace(batch, data=batch.data.masked_fill(~batch.valid, 0))
        if config.pair == "case":
            data, valid = training_view(batch, random, config.spatial, train)
            target, valid = (each.unflatten(0, (-1, 2)) for each in (data, valid))
            views: Views = {}
        else:
            target, valid, views = self._two_views(batch, random, train)
        draws = replace(random, samples=random.samples[:: self.needs.images])
        hidden = [
            block_mask(draws.child(name), patch, config.block_size, config.mask_ratio, valid=valid[:, number])
            for number, name in enumerate(("moving", "fixed"))
        ]
        views |= {"target": target.masked_fill(~valid, 0), "valid": valid, "hidden": torch.stack(hidden, 1)}
        views |= {"images": views["target"].masked_fill(views["hidden"], 0), "asked": valid}
        views["spacing"] = batch.spacing[self.needs.images - 1 :: self.needs.images]
        if is_transformer(self.encoder):
            known = whole_only(valid.flatten(0, 1), self.encoder.token_size)
            views |= {"kept": known["kept"], "asked": known["valid"].unflatten(0, (-1, 2))}
        return views

    def _two_views(self, batch: Batch, random: SampleRandom, train: bool) -> tuple[torch.Tensor, torch.Tensor, Views]:
        """Both views, their validity, and the truth; see `views`."""
        config, patch = self.config, self.configuration.patch_size
        pair = [
            draw_transform(batch.valid, batch.spacing, random.child(f"{name} place"), moves, patch)
            for name, moves in (("moving", config.spatial if train else UNMOVED), ("fixed", config.warp))
        ]
        moving, fixed = (apply_transform(batch.data, batch.valid, place) for place in pair)
        truth = displacement(moving.transform, fixed.transform)
        known = fixed.valid & (warp(moving.valid.float(), truth, "zeros") > SHOWN)
        views = [torch.stack(both, 1) for both in ((moving.data, fixed.data), (moving.valid, fixed.valid))]
        return views[0], views[1], {"truth": truth, "known": known}

    def forward(self, views: Views) -> StepOutput:
        """How alike the images are after and before the deformation, whether it folds, and the error of restoring.

        `shown` is the share of the fixed image's tissue that the moving one shows after it: the likeness is that of the
        part that both show. Of two views, also how far the deformation is from the true one, and how far the identity.
        """
        images, valid, config = views["images"], views["valid"], self.config
        rows, real = images.flatten(0, 1), valid.flatten(0, 1)
        output, _ = run_dense(self.encoder, self.decoder, rows, real, views.get("kept"))
        restored = self.restore(output)
        hidden_target = [views[name].flatten(0, 1) for name in ("target", "hidden", "asked")]
        mse = masked_mse(restored, *hidden_target)
        moving, fixed = output.unflatten(0, (-1, 2)).unbind(1)
        found = self.head(moving, fixed, valid.all(1))
        likeness, warped, shown = self._likeness(views, found.field)
        smoothness = self._roughness(found, valid[:, 1], views["spacing"])
        metrics = {"mse": mse, "mse_chance": guess_error(*hidden_target), "ncc": likeness, "smoothness": smoothness}
        with torch.no_grad():
            metrics["ncc_untouched"] = self._likeness(views, torch.zeros_like(found.field))[0]
            folded = (determinants(found.field) <= 0) & valid[:, 1]
            metrics["shown"] = shown
            metrics["folded"] = folded.sum() / valid[:, 1].sum().clamp(min=1)
        unlike = 1 - likeness
        if config.pair != "case":
            off, metrics["error_untouched"] = (
                endpoint_error(each, views["truth"], views["spacing"], views["known"])
                for each in (found.field, torch.zeros_like(found.field))
            )
            metrics["error"] = off
            unlike = off / _mean_edge(self.configuration) if config.pair == "warp" else unlike
        loss = config.similarity * unlike + config.smoothness * smoothness + config.restoration * mse
        pictures = {"fixed": views["target"][:, 1], "moving": views["target"][:, 0], "warped": warped.detach()}
        pictures |= {"fixed, seen": images[:, 1], "restored": restored.unflatten(0, (-1, 2))[:, 1].detach().float()}
        return StepOutput(
            loss=loss,
            metrics={name: value.detach() for name, value in metrics.items()},
            images=None if self.training else pictures,
        )

    def _likeness(self, views: Views, displacements: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean local correlation of the fixed image with the moving one under a field, the latter, and its share.

        The share is that of the fixed image's tissue that it shows.
        """
        (moving, fixed), (seen, asked) = views["target"].unbind(1), views["asked"].unbind(1)
        shown = asked & (warp(seen.float(), displacements, "zeros") > SHOWN)
        warped = warp(moving, displacements).masked_fill(~shown, 0)
        tissue = occupied_cells(fixed, asked, (1,) * (fixed.ndim - 2), self.config.background_std, 1)
        share = (tissue & shown).sum() / tissue.sum().clamp(min=1)
        return mean_ncc(warped, fixed, shown, tissue, self.config.window), warped, share

    def _roughness(self, found: Deformation, real: torch.Tensor, spacing: torch.Tensor) -> torch.Tensor:
        """The velocity's squared gradients in mm, where its positions hold a real voxel of the fixed image."""
        grid, patch = found.velocity.shape[2:], self.configuration.patch_size
        voxels = [full / size for full, size in zip(patch, grid, strict=True)]
        share = nn.functional.interpolate(real.float(), size=list(grid), mode="area")
        return squared_gradients(found.velocity, spacing * spacing.new_tensor(voxels), share > 0)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The images to lay upon each other and to restore are those of another sample; see `PretextTask.sham`."""
        views = restore_another_case(views)
        return restore_another_case(views, "truth", "known") if "truth" in views else views


def displacement(moving: SpatialTransform, fixed: SpatialTransform) -> torch.Tensor:
    """From where each voxel of the fixed view lies to where the moving one shows the same, (B, D, *size) in voxels.

    Args:
        moving: Where it was taken, without elastic deformation.
        fixed: Where the other one was taken from the same crop, of the same size.
    """
    return place_in(moving, fixed) - unmoved(fixed)


def _mean_edge(configuration: Configuration) -> float:
    """Edge in mm of a cube as large as a voxel of the plan, also where cases keep spacings of their own."""
    return prod(configuration.spacing) ** (1 / configuration.dims)


def _check_blocks(config: RegistrationConfig, patch_size: tuple[int, ...]) -> None:
    number = prod(ceil(edge / config.block_size) for edge in patch_size)
    if not 0.5 < config.mask_ratio * number < number - 0.5:
        raise ValueError(
            f"mask_ratio={config.mask_ratio} and block_size={config.block_size} hide none or all of a patch of "
            f"{patch_size}, which holds {number} blocks. Set a smaller one: --set block_size={min(patch_size) // 4}"
        )


@TRAINERS.register
class RegistrationTrainer(PretrainTrainer):
    """Registration with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders.

    A step reads crops of two cases for each sample.
    """

    task = Registration
    cost = StepCost(views=2, copies=1, decoder=True)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
