"""The pretext trio of Swin UNETR: tell how a crop was turned, tell which two views show the same crop, and fill holes.

Each crop gives two views, turned by quarter turns about one axis and with boxes cut out. One pass of the network serves
three losses of equal weight: the turn from pooled features of the encoder, a contrast of their projections, and the
voxels under the boxes. Encoder and decoder of a U-Net go to fine-tuning, of a transformer the encoder.

Paper: Tang et al. 2022 (arXiv:2111.14791), there on a Swin transformer. Other than there, only hidden voxels are asked
for, since a U-Net's skips would copy the visible ones; views show as much as fits into the volume in every turn, and
where it is so thin that padding would tell the turn all the same, or the voxels of a case are stretched, the turn is
not asked for; and crops of one case are no negatives of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.core.checks import above_zero, at_least, rising, within
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
from nnssl_ext.losses.mae import masked_l1
from nnssl_ext.losses.nt_xent import check_negatives, nt_xent
from nnssl_ext.losses.restoration import trivial_errors
from nnssl_ext.models.backbone import is_transformer
from nnssl_ext.models.dense import build_dense, run_dense
from nnssl_ext.models.queue import case_keys
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.corruptions import cut_out
from nnssl_ext.views.sham import drawn_classes, of_another_case
from nnssl_ext.views.tokens import whole_only
from nnssl_ext.views.turns import NUM_TURNS, are_square, only_shown, quarter_turned, turning_plane

WARMUP_STEPS = 500
"""The paper's."""


@dataclass(frozen=True, kw_only=True)
class SwinUNETRConfig:
    """Settings of the pretext trio; the paper's, unless said."""

    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of turn, contrast and inpainting, 0 or more."""
    temperature: float = 0.5
    """Divides the cosines of the contrast, above 0."""
    width: int = 512
    """Of the projections that are contrasted, 1 or more."""
    hidden_share: float = 0.3
    """Largest share of the voxels that is cut out, in (0, 1)."""
    boxes: int = 16
    """Greatest number of boxes that are cut out, 1 or more. Ours."""
    sides: tuple[float, float] = (1 / 8, 1 / 2)
    """Shortest and longest edge of a box as a share of the crop's. Ours."""
    max_anisotropy: float = 1.1
    """Planes whose voxel edges differ by more than this factor are not turned in, 1 or more. Ours."""

    def __post_init__(self) -> None:
        at_least(self, weights=0, width=1, boxes=1, max_anisotropy=1)
        above_zero(self, "temperature")
        within(self, "(0, 1)", "hidden_share")
        rising(self, "(0, 1]", "sides")


class SwinUNETR(PretextTask):
    """Turn, contrast and inpainting on one pass; see the module."""

    Config = SwinUNETRConfig
    info = TaskInfo(
        idea="tell the turn of a crop, find its other view, and fill its holes",
        paper="arXiv:2111.14791",
        choose="to repeat that recipe on nnU-Net's networks. Turns teach little where anatomy tells the orientation "
        "at a glance.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
    )
    config: SwinUNETRConfig

    def __init__(self, config: SwinUNETRConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's network with one output per input channel, and two linear heads on its encoder.

        Raises:
            ValueError: Where the network cannot be built, no plane has voxels that are square enough, or a contrast is
                wanted and the batch is a single crop.
        """
        super().__init__(config, configuration, num_cases)
        if config.weights[1]:
            check_negatives(configuration.batch_size, f"weights=[{config.weights[0]:g},0,{config.weights[2]:g}]")
        self.encoder, self.decoder = build_dense(configuration, configuration.num_input_channels)
        if is_transformer(self.encoder):
            self.decoder.get_parameter("mask_token").requires_grad_(False)  # for padding, as hardly a view holds
        self.turn_head = nn.Linear(self.encoder.channels[-1], NUM_TURNS)
        self.projector = nn.Linear(self.encoder.channels[-1], config.width)
        self.plane = turning_plane(configuration.patch_size, configuration.spacing, config.max_anisotropy)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two turned views of each crop with boxes cut out, the first ones before the second ones.

        Returns:
            `target` (2B, C, *patch); `image`, likewise, 0 where cut out; `asked` and `valid` (2B, 1, *patch), bool:
            what is cut out, and what is real; `turns` (2B,), 0 to 3; `fair` (2B,), bool, False where padding
            or the case's spacing tells the turn; `case` (B,), a number for each case; `partner` (B,), which second view
            belongs to each first one; for a transformer also `kept`, the tokens without padding, and of these alone
            `valid` and `asked`.
        """
        first, second = (self._view(batch, random.child(name)) for name in ("first", "second"))
        views = {name: torch.cat([first[name], second[name]]) for name in first}
        square = are_square(batch.spacing, [self.plane], self.config.max_anisotropy)[:, 0]
        views["fair"] = only_shown(views["valid"], self.plane) & square.repeat(2)
        views["case"] = case_keys(batch.cases, batch.data.device)
        views["partner"] = torch.arange(len(batch.data), device=batch.data.device)
        if is_transformer(self.encoder):
            views |= whole_only(views["valid"], self.encoder.token_size)
            views["asked"] &= views["valid"]
        return views

    def _view(self, batch: Batch, random: SampleRandom) -> Views:
        config, size = self.config, self.configuration.patch_size
        turns = torch.from_numpy(random.integers("turns", 0, NUM_TURNS)).to(batch.data.device)
        turned = quarter_turned(batch.data.masked_fill(~batch.valid, 0), batch.valid, turns, self.plane, size)
        hidden = cut_out(random, turned.valid, config.hidden_share, config.boxes, [config.sides] * len(size))
        image, asked = turned.data.masked_fill(hidden, 0), hidden & turned.valid
        return {"target": turned.data, "image": image, "asked": asked, "valid": turned.valid, "turns": turns}

    def forward(self, views: Views) -> StepOutput:
        """The three losses, each beside its chance; that of a turn that padding or spacing tells counts as 0.

        The accuracy of turns and its chance are NaN where none is asked for.
        """
        target, image, asked = (views[name] for name in ("target", "image", "asked"))
        turns, fair = views["turns"], views["fair"]
        output, pooled = run_dense(self.encoder, self.decoder, image, views["valid"], views.get("kept"))
        logits = self.turn_head(pooled).float()
        first, second = self.projector(pooled).chunk(2)
        turn = (functional.cross_entropy(logits, turns, reduction="none") * fair).mean()
        contrast, chance = nt_xent(first, second[views["partner"]], self.config.temperature, views["case"])
        error = masked_l1(output, target, asked, asked)
        constant, untouched = trivial_errors(masked_l1, image, target, asked)
        num_fair = fair.sum()
        metrics = {
            "turn_accuracy": (fair & (logits.detach().argmax(1) == turns)).sum() / num_fair,
            "turn_accuracy_chance": num_fair / (NUM_TURNS * num_fair),
            "contrast": contrast.detach(),
            "contrast_chance": chance,
            "l1": error.detach(),
            "l1_chance": constant,
            "l1_untouched": untouched,
        }
        weights = self.config.weights
        pictures = {"input": target, "masked": image, "output": output.detach()}
        return StepOutput(
            loss=weights[0] * turn + weights[1] * contrast + weights[2] * error,
            metrics=metrics,
            images=None if self.training else {name: picture[: len(first)] for name, picture in pictures.items()},
            embeddings=Embeddings(first=first.detach(), second=second.detach()),
        )

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Turns are drawn anew, partner and voxels to restore are another case's; see `PretextTask.sham`."""
        halves = zip(("first", "second"), views["turns"].chunk(2), strict=True)
        return {
            **views,
            "turns": torch.cat([drawn_classes(turns, NUM_TURNS, random.child(name)) for name, turns in halves]),
            "partner": of_another_case(views["partner"]),
            "target": of_another_case(views["target"]),
            "asked": views["asked"] & of_another_case(views["valid"]),
        }


@TRAINERS.register
class SwinUNETRTrainer(PretrainTrainer):
    """The pretext trio with the paper's AdamW, warm-up and cosine; on a transformer, as masked autoencoders train here.

    Takes a batch of 2 or more over all ranks, for a crop alone has no negatives; without the contrast, of any size.
    """

    task = SwinUNETR
    cost = StepCost(views=2, copies=1, decoder=True)
    optim = OptimConfig(name="adamw", lr=4e-4, weight_decay=1e-5, betas=(0.9, 0.999))
    schedule = ScheduleConfig(name="cosine", warmup_steps=WARMUP_STEPS)
    vit = VIT_RECIPE
