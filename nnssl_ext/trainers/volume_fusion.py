"""VolumeFusion: two volumes are mixed in boxes by different shares, and the network tells the share of every voxel.

Pretraining so becomes a segmentation like the one that follows: classes, Dice and cross-entropy, every layer of a U-Net
trained, all of which but the output layers goes to fine-tuning. Of a transformer the encoder does.

Paper: Wang et al. 2023 (arXiv:2306.16925). Other than there, a voxel counts only where it is real in both volumes,
boxes lie among these, and Dice is averaged over the classes that a sample holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from nnssl_ext.core.checks import at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.losses.dice_ce import dice_ce
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.corruptions import paint_boxes
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.tokens import whole_only


@dataclass(frozen=True, kw_only=True)
class VolumeFusionConfig:
    """Settings of VolumeFusion; the paper's."""

    levels: int = 4
    """Steps from no share to the whole, 1 or more: with 4 the first volume's share is 0, 1/4, 1/2, 3/4 or 1, and there
    are 5 classes."""
    boxes: tuple[int, int] = (10, 40)
    """Least and greatest number of boxes; the share is 0 outside of all."""
    sides: tuple[float, float] = (1 / 16, 5 / 8)
    """Shortest and longest edge of a box as a share of the crop's."""
    shortest_depth: float = 1 / 8
    """Shortest edge along the first axis of a volume, as a share of the crop's."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How the volumes are flipped, rotated and scaled in training, each on its own, before they are mixed."""

    def __post_init__(self) -> None:
        at_least(self, levels=1)
        rising(self, "[1, inf)", "boxes")
        rising(self, "(0, 1]", "sides")
        within(self, f"(0, {self.sides[1]}]", "shortest_depth", note=", up to the sides'")


class VolumeFusion(PretextTask):
    """Tells how much of the first volume is in each voxel; see the module."""

    Config = VolumeFusionConfig
    info = TaskInfo(
        idea="mix two images in boxes, and tell the share of each voxel",
        paper="arXiv:2306.16925",
        choose="for a U-Net that will segment: the pretext is a segmentation itself, and all layers but the outputs "
        "are taken over.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
        needs=DataNeeds(images=2, same="modality"),
    )
    config: VolumeFusionConfig

    def __init__(self, config: VolumeFusionConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with one output per class.

        Raises:
            ValueError: Where the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder, self.decoder = build_dense(configuration, config.levels + 1)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Mixtures of the two rows of each sample, moved about in training.

        Returns:
            `image` (B, C, *patch), 0 where one of the two is padding; `classes` (B, 1, *patch), int64, the first
            row's share times `levels`; `valid` (B, 1, *patch), bool, what is asked for; for a transformer also `kept`,
            the tokens without padding, and of these alone `valid`.
        """
        data, valid = training_view(batch, random, self.config.spatial, train)
        valid = valid[::2] & valid[1::2]
        classes = share_classes(replace(random, samples=random.samples[::2]), valid, self.config)
        image = fused(data[::2], data[1::2], classes, self.config.levels).masked_fill(~valid, 0)
        views = {"image": image, "classes": classes, "valid": valid}
        if is_transformer(self.encoder):
            views |= whole_only(valid, self.encoder.token_size)
        return views

    def forward(self, views: Views) -> StepOutput:
        """Dice loss and cross-entropy of the classes; chance is to know how often each class occurs, and no more.

        Classes count alike in the accuracy as in Dice; see `class_accuracy`.
        """
        image, classes, valid = views["image"], views["classes"], views["valid"]
        logits, _ = run_dense(self.encoder, self.decoder, image, valid, views.get("kept"))
        dice, ce = dice_ce(logits, classes, valid)
        told = logits.detach().argmax(1, keepdim=True)
        counts = torch.stack([(valid & (classes == value)).sum() for value in range(logits.shape[1])])
        shares = counts / counts.sum().clamp(min=1)
        accuracy, chance = class_accuracy(told, classes, valid, counts)
        metrics = {
            "dice_loss": dice.detach(),
            "cross_entropy": ce.detach(),
            "cross_entropy_chance": -torch.special.xlogy(shares, shares).sum(),
            "accuracy": accuracy,
            "accuracy_chance": chance,
        }
        pictures = {"input": image, "share": classes, "output": told.masked_fill(~valid, 0)}
        images = None if self.training else {name: picture.to(image.dtype) for name, picture in pictures.items()}
        return StepOutput(loss=dice + ce, metrics=metrics, images=images)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The classes are those of another sample's boxes; see `PretextTask.sham`."""
        return restore_another_case(views, target="classes", asked="valid")


def share_classes(random: SampleRandom, valid: torch.Tensor, config: VolumeFusionConfig) -> torch.Tensor:
    """Draws boxes and the class of each; later boxes lie over earlier ones.

    Args:
        random: Keyed by sample.
        valid: (B, 1, *patch), bool.
        config: Number and size of the boxes, number of classes.

    Returns:
        (B, 1, *patch), int64, from 0 to `levels`, all equally likely in a box; 0 outside.
    """
    low, high = config.sides
    sides = [(low, high)] * (valid.ndim - 2)
    if len(sides) == 3:
        sides[0] = (config.shortest_depth, high)
    painted = paint_boxes(random, valid, config.boxes, sides)
    of_boxes = torch.from_numpy(random.integers("classes", 0, config.levels + 1, (config.boxes[1],))).to(valid.device)
    of_boxes = torch.nn.functional.pad(of_boxes, (1, 0))
    return of_boxes.gather(1, painted.flatten(1)).view_as(painted)


def fused(first: torch.Tensor, second: torch.Tensor, classes: torch.Tensor, levels: int) -> torch.Tensor:
    """`share * first + (1 - share) * second`, with a share of `classes / levels`; all (B, C or 1, *patch)."""
    return torch.lerp(second, first, (classes / levels).to(first.dtype).expand_as(first))


def class_accuracy(
    told: torch.Tensor, classes: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of a class is told rightly, a mean over the classes that are held, and its chance.

    Of all voxels together, most are right for whoever always tells the commonest class, which a Dice loss trains no one
    to do. By classes, telling them without regard to image and place is right for one in as many as are held, or fewer.

    Args:
        told: (B, 1, *patch), int64.
        classes: (B, 1, *patch), int64, the true ones.
        valid: (B, 1, *patch), bool.
        counts: (K,), real voxels of each class.

    Returns:
        Two scalars in [0, 1].
    """
    hit = valid & (told == classes)
    right = torch.stack([(hit & (classes == value)).sum() for value in range(len(counts))])
    held = (counts > 0).sum().clamp(min=1)
    return (right / counts.clamp(min=1)).sum() / held, 1 / held


@TRAINERS.register
class VolumeFusionTrainer(PretrainTrainer):
    """VolumeFusion with the recipe that masked autoencoders have here, so that the two can be compared.

    On a U-Net nnU-Net's SGD, on a transformer AdamW with warm-up. A step reads two crops for each sample.
    """

    task = VolumeFusion
    cost = StepCost(views=1, copies=1, decoder=True)
    vit = VIT_RECIPE
