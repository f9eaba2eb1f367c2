"""Models Genesis: a crop is damaged in four ways, and the network gives back what it was.

Voxels change places within small windows (texture), intensities run through a random curve (appearance), and boxes, or
all but some boxes, are filled with noise (context). The whole network restores the whole crop; on a U-Net, encoder and
decoder both go to fine-tuning, on a transformer, the encoder.

Paper: Zhou et al. 2019 (arXiv:1908.06912). Other than there, curves and noise span each crop's usual range of values,
for z-scored voxels lie outside the [0, 1] that they are made for; and windows are shuffled in one pass in which they
tile the crop, instead of ten thousand that overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from nnssl_ext.core.checks import at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.mae import masked_mse
from nnssl_ext.losses.restoration import trivial_errors
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.corruptions import bend_intensities, noise_by_boxes, on_rows
from nnssl_ext.views.sham import restore_another_case
from nnssl_ext.views.shuffles import shuffle_within, tiled_windows
from nnssl_ext.views.spatial import SpatialConfig, training_view
from nnssl_ext.views.tokens import whole_only

SHORTEST_WINDOW = 2
"""Edge in voxels that windows may have even where their share of a small crop is less."""


@dataclass(frozen=True, kw_only=True)
class ModelsGenesisConfig:
    """Settings of Models Genesis; the paper's, unless said."""

    shuffle: float = 0.5
    """Probability that voxels are shuffled within windows."""
    shuffle_side: float = 0.1
    """Longest edge of a window as a share of the crop's, in (0, 1]."""
    bend: float = 0.9
    """Probability that intensities run through a random curve, rising or falling."""
    paint: float = 0.9
    """Probability that noise is painted, either into boxes or around them."""
    outer: float = 0.8
    """Share of the painted crops in which the noise lies around the boxes, in [0, 1]."""
    boxes: int = 5
    """Boxes, 1 or more."""
    inner_sides: tuple[float, float] = (1 / 6, 1 / 3)
    """Shortest and longest edge of a box to fill, as a share of the crop's."""
    outer_sides: tuple[float, float] = (3 / 7, 4 / 7)
    """Shortest and longest edge of a box that is spared, as a share of the crop's."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    """How crops are flipped, rotated and scaled in training, before they are damaged."""

    def __post_init__(self) -> None:
        within(self, "[0, 1]", "shuffle", "bend", "paint", "outer")
        within(self, "(0, 1]", "shuffle_side")
        at_least(self, boxes=1)
        rising(self, "(0, 1]", "inner_sides", "outer_sides")


class ModelsGenesis(PretextTask):
    """Restores a damaged crop; see the module."""

    Config = ModelsGenesisConfig
    info = TaskInfo(
        idea="shuffle, bend and paint over the image, and restore it",
        paper="arXiv:1908.06912",
        choose="where the whole network should be pretrained on inputs that look like those of fine-tuning: nothing "
        "is hidden from it but a few boxes.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
    )
    config: ModelsGenesisConfig

    def __init__(self, config: ModelsGenesisConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with one output per input channel.

        Raises:
            ValueError: Where the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder, self.decoder = build_dense(configuration, configuration.num_input_channels)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Crops, moved about in training, and what the network sees of them.

        Returns:
            `target` and `image` (B, C, *patch); `valid` (B, 1, *patch), bool, what is asked for; for a transformer also
            `kept`, the tokens without padding, and of these alone `valid`.
        """
        target, valid = training_view(batch, random, self.config.spatial, train)
        target = target.masked_fill(~valid, 0)
        views = {"target": target, "image": damaged(target, valid, random, self.config), "valid": valid}
        if is_transformer(self.encoder):
            views |= whole_only(valid, self.encoder.token_size)
        return views

    def forward(self, views: Views) -> StepOutput:
        """The error over all real voxels, beside that of guessing a constant (`mse_chance`) or leaving the damage."""
        target, image, valid = views["target"], views["image"], views["valid"]
        output, _ = run_dense(self.encoder, self.decoder, image, valid, views.get("kept"))
        loss = masked_mse(output, target, valid, valid)
        constant, untouched = trivial_errors(masked_mse, image, target, valid)
        metrics = {"mse": loss.detach(), "mse_chance": constant, "mse_untouched": untouched}
        images = None if self.training else {"input": target, "damaged": image, "output": output.detach()}
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The crop to restore is another case's; see `PretextTask.sham`."""
        return restore_another_case(views, asked="valid")


def damaged(
    image: torch.Tensor, valid: torch.Tensor, random: SampleRandom, config: ModelsGenesisConfig
) -> torch.Tensor:
    """Crops (B, C, *patch) with windows shuffled, intensities bent and boxes painted, in this order."""
    chosen = random.bernoulli("shuffle", config.shuffle)
    image = on_rows(image, valid, random.child("shuffle"), chosen, partial(_shuffled, config=config))
    image = on_rows(image, valid, random.child("bend"), random.bernoulli("bend", config.bend), bend_intensities)
    painted, outer = random.bernoulli("paint", config.paint), random.bernoulli("outer", config.outer)
    inside = partial(noise_by_boxes, boxes=config.boxes, sides=config.inner_sides, around=False)
    around = partial(noise_by_boxes, boxes=config.boxes, sides=config.outer_sides, around=True)
    image = on_rows(image, valid, random.child("inner"), painted & ~outer, inside)
    return on_rows(image, valid, random.child("outer"), painted & outer, around)


def _shuffled(
    image: torch.Tensor, valid: torch.Tensor, random: SampleRandom, config: ModelsGenesisConfig
) -> torch.Tensor:
    longest = tuple(max(SHORTEST_WINDOW, int(size * config.shuffle_side)) for size in image.shape[2:])
    return shuffle_within(image, tiled_windows(random, valid, longest), random)


@TRAINERS.register
class ModelsGenesisTrainer(PretrainTrainer):
    """Models Genesis with the recipe that masked autoencoders have here, so that the two can be compared.

    On a U-Net nnU-Net's SGD, on a transformer AdamW with warm-up.
    """

    task = ModelsGenesis
    cost = StepCost(views=1, copies=1, decoder=True)
    vit = VIT_RECIPE
