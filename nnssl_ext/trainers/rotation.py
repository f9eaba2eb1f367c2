"""Rotation: tell by which quarter turn, about which axis, a cube was turned.

The middle cube of a crop is turned by 0, 90, 180 or 270 degrees about one of its axes, which makes ten classes in 3D
and four in 2D; the network sees it and names the class. To know what is up it has to know the anatomy.

Papers: Gidaris et al. 2018 (arXiv:1803.07728); Taleb et al. 2020 (arXiv:2006.03829) for volumes. Other than there, the
cube lies in the volume, so that no padding tells the turn; planes of unequal spacing are not turned in, since stretched
voxels would tell it; and nothing is flipped, since two flips are a turn. Where cases keep spacings of their own
(`-spacing noresample`), a turn in a plane that is stretched in that case is not asked for. Thick slices that were
resampled to cubic voxels stay blurred, and may tell the axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from nnssl_ext.core.checks import at_least
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.backbone import build_encoder, descriptor
from nnssl_ext.models.perceptron import PooledHead
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.rotations import cube_size, fair_rotations, inner_view, rotated, rotations
from nnssl_ext.views.sham import drawn_classes


@dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """Settings of rotation."""

    max_anisotropy: float = 1.1
    """Planes whose voxel edges differ by more than this factor are not turned in, 1 or more."""
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    """How the intensities of the cube change in training."""

    def __post_init__(self) -> None:
        at_least(self, max_anisotropy=1)


class Rotation(PretextTask):
    """Names the quarter turn of a cube; see the module."""

    Config = RotationConfig
    info = TaskInfo(
        idea="tell by which quarter turn, about which axis, a cube was turned",
        paper="arXiv:2006.03829",
        choose="as a cheap reference. It is soon solved where anatomy tells the orientation at a glance, and then "
        "teaches nothing more; the log says so.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: RotationConfig

    def __init__(self, config: RotationConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds the plan's encoder and a small head.

        Raises:
            ValueError: Where no plane has voxels that are square enough, or the patch holds no cube large enough.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.rotations = rotations(configuration.spacing, config.max_anisotropy)
        self.size = cube_size(configuration.patch_size, self.encoder.strides[-1], self.rotations)
        self.head = PooledHead(self.encoder.channels[-1], len(self.rotations))

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """The middle cube of each crop, as it is and turned; in training with changed intensities.

        Returns:
            `input` and `turned` (B, C, *cube); `turns` (B,), the class; `fair` (B,), bool, False where padding or
            the case's own spacing tells the turn; `chance` (B,), that of a guess among the turns that may be asked for.
        """
        cube = inner_view(batch.data, batch.valid, self.size)
        data = cube.data
        if train:
            intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes)
            data = intensity_view(data, cube.valid, random.child("intensity"), intensity)
        drawn = random.integers("turns", 0, len(self.rotations))
        turns = torch.from_numpy(drawn).to(data.device)
        may = fair_rotations(batch.spacing, self.rotations, self.config.max_anisotropy)
        number = may.sum(1)
        square = may.gather(1, turns[:, None])[:, 0] & (number > 1)
        return {
            "input": data,
            "turned": rotated(data, [self.rotations[turn] for turn in drawn]),
            "turns": turns,
            "fair": cube.valid.flatten(1).all(1) & square,
            "chance": 1 / number,
        }

    def forward(self, views: Views) -> StepOutput:
        """The cross-entropy of the turn, and how often it is told; where anything else tells it, it is not asked for.

        Chance is that of a guess that knows which turns are asked of a case. Both are NaN where none is asked for.
        """
        turns, fair = views["turns"], views["fair"]
        logits = self.head(descriptor(self.encoder(views["turned"])), fair)
        loss = (functional.cross_entropy(logits, turns, reduction="none") * fair).mean()
        asked = fair.sum()
        metrics = {
            "accuracy": (fair & (logits.detach().argmax(1) == turns)).sum() / asked,
            "accuracy_chance": (fair * views["chance"]).sum() / asked,
        }
        images = None if self.training else {name: views[name] for name in ("input", "turned")}
        return StepOutput(loss=loss, metrics=metrics, images=images)

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the features."""
        self.head.update()

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Turns are drawn anew, whatever is seen; see `PretextTask.sham`."""
        return {**views, "turns": drawn_classes(views["turns"], len(self.rotations), random)}


@TRAINERS.register
class RotationTrainer(PretrainTrainer):
    """Rotation with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders are trained here."""

    task = Rotation
    cost = StepCost(views=1, copies=1, decoder=False)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
