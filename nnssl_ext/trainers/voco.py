"""VoCo: tell from its features how far a crop overlaps each of the cells that tile the volume's region.

The region is cut into 4x4 cells that touch (one along its shortest axis), the bases. Other crops of the same size lie
anywhere in it. The cosine of such a crop's features with those that a slow copy of the network gives a base should be
the share of the crop that lies in the base, 0 where they are apart; and bases should be unlike one another. So features
have to tell where in the body they are.

Paper: Wu et al. 2024 (arXiv:2402.17300). Other than there, the region is the training crop within the real voxels;
bases and crops are resampled to a size that the network takes; their intensities change on their own, so that no voxel
tells the overlap by its value; and features are standardised by running moments before the projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from nnssl_ext.core.checks import at_least, within
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
from nnssl_ext.losses.voco import voco_loss
from nnssl_ext.models.backbone import build_encoder, descriptor
from nnssl_ext.models.ema import Teacher
from nnssl_ext.models.perceptron import perceptron
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.cells import Boxes, box_size, grid_cells, overlaps, resample_boxes
from nnssl_ext.views.intensity import IntensityConfig, intensity_view
from nnssl_ext.views.sham import of_another_case


@dataclass(frozen=True, kw_only=True)
class VoCoConfig:
    """Settings of volume contrast."""

    bases_per_axis: int = 4
    """Bases along each axis, 2 or more; in 3D one along the shortest axis. Wu et al. 2024."""
    num_crops: int = 4
    """Crops of each sample that are compared with its bases, 1 or more. Wu et al. 2024."""
    teacher_momentum: float = 0.99
    """Of the slow copy that encodes the bases, in [0, 1). The paper's code has 0.9, with which a small transformer did
    not learn on a single batch: crops chased bases that moved as fast."""
    hidden_width: int = 256
    """Of the projector's hidden layer, 1 or more."""
    width: int = 128
    """Of the projections that are compared, 1 or more."""
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    """How intensities change in training, of bases and of crops on their own."""

    def __post_init__(self) -> None:
        at_least(self, bases_per_axis=2, num_crops=1, hidden_width=1, width=1)
        within(self, "[0, 1)", "teacher_momentum", note=": at 1 it never moves")


class VoCo(PretextTask):
    """Tells crops' overlaps with bases; see the module."""

    Config = VoCoConfig
    info = TaskInfo(
        idea="tell from its features how far a crop overlaps each of the cells that tile its region",
        paper="arXiv:2402.17300",
        choose="where crops show whole organs that lie alike in all patients, as in CT of the trunk: it learns where "
        "in the body it is. It pretrains no decoder.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: VoCoConfig

    def __init__(self, config: VoCoConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds encoder, projector and their slow copy.

        Raises:
            ValueError: Where the network cannot be built.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.grid = base_grid(config.bases_per_axis, configuration.patch_size, configuration.spacing)
        self.size = box_size(configuration.patch_size, self.grid, self.encoder.strides[-1], share=1)
        width = self.encoder.channels[-1]
        self.standard, self.teacher_standard = Standardise(width), Standardise(width)
        self.projector = perceptron([width, config.hidden_width, config.width])
        self.teacher = Teacher(encoder=self.encoder, projector=self.projector)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Bases and crops of each sample; in training with changed intensities.

        Returns:
            `input` (B, C, *patch); `bases` (B * n, C, *size) and `crops` (B * m, C, *size), those of a sample in a row;
            `target` (B, m, n), the share of each crop that lies in each base: they sum to 1.
        """
        cells = grid_cells(batch.valid, self.grid)
        boxes = boxes_anywhere(cells, random, self.config.num_crops)
        data = {name: batch.data.masked_fill(~batch.valid, 0) for name in ("bases", "crops")}
        if train:
            intensity = self.config.intensity.suited_to(self.configuration.normalization_schemes)
            for name, each in data.items():
                data[name] = intensity_view(each, batch.valid, random.child(name), intensity)
        return {
            "input": data["bases"],
            "bases": resample_boxes(data["bases"], batch.valid, cells, self.size),
            "crops": resample_boxes(data["crops"], batch.valid, boxes, self.size),
            "target": overlaps(boxes, cells),
        }

    def forward(self, views: Views) -> StepOutput:
        """The loss, and how often a crop is most like a base that it overlaps most."""
        target, num = views["target"], len(views["bases"])
        pooled = descriptor(self.encoder(torch.cat([views["bases"], views["crops"]])))
        with torch.no_grad():
            theirs = descriptor(self.teacher.encoder(views["bases"]))
        with torch.autocast(pooled.device.type, enabled=False):
            ours = self.projector(self.standard(pooled))
            fixed = self.teacher.projector(self.teacher_standard(theirs))
        bases, fixed, crops = (rows.unflatten(0, (len(target), -1)) for rows in (ours[:num], fixed, ours[num:]))
        loss, cosines = voco_loss(crops, bases, fixed, target)
        if self.training:
            self.standard.collect(pooled)
            self.teacher_standard.collect(theirs)
        nearest = target.gather(2, cosines.argmax(2, keepdim=True)).squeeze(2)
        metrics = {
            "accuracy": (nearest > 0).logical_and(nearest >= target.amax(2)).float().mean(),
            "accuracy_chance": torch.full((), best_guess(self.grid), device=target.device),
        }
        examples = {"base": views["bases"][:: prod(self.grid)], "crop": views["crops"][:: self.config.num_crops]}
        with_overlap = (target[:, :1] @ bases.detach()).squeeze(1)
        return StepOutput(
            loss=loss,
            metrics=metrics,
            images=None if self.training else {"input": views["input"], **examples},
            embeddings=Embeddings(first=crops[:, 0].detach(), second=with_overlap),
        )

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the features, and moves the slow copy."""
        self.standard.update()
        self.teacher_standard.update()
        self.teacher.follow(self.config.teacher_momentum, encoder=self.encoder, projector=self.projector)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The overlaps are those of another case's crops; see `PretextTask.sham`."""
        return {**views, "target": of_another_case(views["target"])}


def base_grid(number: int, patch_size: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[int, ...]:
    """Bases per axis: in 3D one along the axis along which the patch is shortest in mm, of equals the first.

    All cases have the same bases, so the spacing is the plan's, also where theirs differ.
    """
    extent = [size * step for size, step in zip(patch_size, spacing, strict=True)]
    grid = [number] * len(extent)
    if len(extent) == 3:
        grid[extent.index(min(extent))] = 1
    return tuple(grid)


def best_guess(grid: Sequence[int]) -> float:
    """How often a crop overlaps that base most which most crops do: what an answer that is always the same achieves.

    Along an axis of n bases a crop begins at any of the n - 1 edges between the first place and the last, equally
    likely, and the base of most overlap is the nearest one. That is an inner one over a whole edge, and one at the end
    over half an edge: 1 / (n - 1), or half of two.
    """
    return prod(1 / max(min(number, 2), number - 1) for number in grid)


def boxes_anywhere(cells: Boxes, random: SampleRandom, number: int) -> Boxes:
    """So many boxes of the cells' size at random places in what the cells tile, straight as they are."""
    edges = cells.edges[:, :1].expand(-1, number, -1)
    first, room = cells.lower[:, :1], cells.lower[:, -1:] - cells.lower[:, :1]
    place = torch.from_numpy(random.uniform("anywhere", shape=(number, edges.shape[2]))).to(edges)
    return Boxes(first + place * room, edges)


@TRAINERS.register
class VoCoTrainer(PretrainTrainer):
    """VoCo with AdamW at 3e-4, warm-up and a cosine; on a transformer as masked autoencoders are trained here."""

    task = VoCo
    cost = StepCost(views=5, copies=2, decoder=False)
    optim = OptimConfig(name="adamw", lr=3e-4, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=500)
    vit = VIT_RECIPE
