"""SimCLR: two views of a crop should look alike to the network, and unlike the views of other cases.

Two overlapping crops of each sample are moved and recoloured on their own; the descriptor of each, through a small
projector, has to find that of the other among those of all other cases. Batches of volumes hold 2 to 8 cases, which is
next to nothing to compare with, so a queue remembers what a slow copy of the network made of earlier cases; the views
that are looked for come from that copy too.

Papers: Chen et al. 2020 (arXiv:2002.05709), and He et al. 2020 (arXiv:1911.05722) for the queue. Other than there, what
the queue or the batch holds of the same case is no negative, the queue is never longer than there are other cases, and
descriptors are standardised by running moments before the projector, since instance-normalised networks make them
nearly the same for all images. Without a queue it is SimCLR as published, with gradients through both views.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nnssl_ext.core.checks import above_zero, at_least, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.ranks import num_ranks
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
from nnssl_ext.losses.nt_xent import nt_xent
from nnssl_ext.models.backbone import build_encoder, descriptor
from nnssl_ext.models.ema import Teacher
from nnssl_ext.models.perceptron import perceptron
from nnssl_ext.models.queue import EMPTY, FeatureQueue, all_rows, case_keys
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.multicrop import MultiCropConfig, multi_crop, view_sizes
from nnssl_ext.views.sham import of_another_case


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig:
    """Settings of SimCLR."""

    crops: MultiCropConfig = field(default_factory=lambda: MultiCropConfig(num_locals=0))
    """Which two views are compared; there are no local ones."""
    temperature: float = 0.5
    """Divides the cosines, above 0. Chen et al. 2020."""
    hidden_width: int = 512
    """Of the projector's two hidden layers, 1 or more."""
    width: int = 128
    """Of the projections that are compared, 1 or more. Chen et al. 2020."""
    queue: int = 512
    """Cases of earlier steps that are negatives too, 0 or more; never more than there are outside a batch."""
    queue_momentum: float = 0.99
    """Of the slow copy that fills the queue, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.crops.num_locals:
            raise ValueError(f"crops.num_locals={self.crops.num_locals} must be 0: two global views are compared.")
        above_zero(self, "temperature")
        at_least(self, hidden_width=1, width=1, queue=0)
        within(self, "[0, 1)", "queue_momentum", note=": at 1 the copy never moves")


class SimCLR(PretextTask):
    """Finds the other view of a crop among those of other cases; see the module."""

    Config = SimCLRConfig
    info = TaskInfo(
        idea="find the other view of a crop among views of other cases, here and in a queue",
        paper="arXiv:2002.05709",
        choose="where one descriptor per scan is the aim and there are hundreds of cases: it learns from telling them "
        "apart. It pretrains no decoder.",
        encoders={"cnn", "vit"},
        pooled=True,
    )
    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds encoder and projector; and the queue and the slow copy that fills it, where there is one.

        Raises:
            ValueError: Where views do not fit the network, or a view has nothing to be told from.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.parent_scale = config.crops.parent_scale
        self.size, _ = view_sizes(config.crops, configuration.patch_size, self.encoder.strides[-1])
        volumes = configuration.batch_size * num_ranks()
        length = max(0, min(config.queue, num_cases - volumes))
        if volumes + length < 2:
            raise ValueError(
                f"a batch of {volumes} with a queue of {length} has no other case to tell a view's partner from: use a "
                "-batch_size of 2 or more"
            )
        width = self.encoder.channels[-1]
        self.standard, self.teacher_standard = Standardise(width), Standardise(width)
        self.projector = perceptron([width, config.hidden_width, config.hidden_width, config.width])
        self.queue = FeatureQueue(length, config.width)
        if length:
            self.teacher = Teacher(encoder=self.encoder, projector=self.projector)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two crops of each sample; only in training they are moved and recoloured.

        Returns:
            `first` and `second` (B, C, *size); `case` (B,), a number for each case; `partner` (B,), which second view
            belongs to each first one.
        """
        config = self.config.crops.suited_to(self.configuration.normalization_schemes)
        (first, second), _ = multi_crop(batch, random, config, (self.size, self.size), augment=train)
        return {
            "first": first.data,
            "second": second.data,
            "case": case_keys(batch.cases, batch.data.device),
            "partner": torch.arange(len(batch.data), device=batch.data.device),
        }

    def forward(self, views: Views) -> StepOutput:
        """The contrast beside the logarithm of the number of candidates, which it is at chance."""
        case, partner = views["case"], views["partner"]
        images = torch.cat([views["first"], views["second"]])
        ours = descriptor(self.encoder(images))
        if self.training:
            self.standard.collect(ours)
        with torch.autocast(ours.device.type, enabled=False):
            first, second = self.projector(self.standard(ours)).chunk(2)
        keys, earlier = self._candidates(images, case, partner) if len(self.queue.keys) else (None, None)
        loss, chance = nt_xent(first, second[partner], self.config.temperature, case, keys, earlier)
        return StepOutput(
            loss=loss,
            metrics={"contrast": loss.detach(), "contrast_chance": chance},
            images=None if self.training else {name: views[name] for name in ("first", "second")},
            embeddings=Embeddings(first=first.detach(), second=second.detach()),
        )

    @torch.no_grad()
    def _candidates(
        self, images: torch.Tensor, case: torch.Tensor, partner: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """What the slow copy makes of both views; and the queue as it is, with what is left out of it.

        In training the queue then takes up the first views.

        Args:
            images: (2B, C, *size), the first views before the second ones.
            case: (B,).
            partner: (B,).
        """
        theirs = descriptor(self.teacher.encoder(images))
        with torch.autocast(theirs.device.type, enabled=False):
            first, second = self.teacher.projector(self.teacher_standard(theirs)).chunk(2)
        known = self.queue.keys
        left_out = (known == EMPTY) | (known == case[:, None]) | (known == case[partner, None])
        earlier = (self.queue.rows.clone(), left_out)
        if self.training:
            self.teacher_standard.collect(theirs)
            self.queue.push(all_rows(first), all_rows(case))
        return (first, second[partner]), earlier

    def after_step(self, step: int, total: int) -> None:
        """Takes up the moments of the descriptors, and moves the slow copy."""
        self.standard.update()
        if len(self.queue.keys):
            self.teacher_standard.update()
            self.teacher.follow(self.config.queue_momentum, encoder=self.encoder, projector=self.projector)

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The view to find is another case's; see `PretextTask.sham`."""
        return {**views, "partner": of_another_case(views["partner"])}


@TRAINERS.register
class SimCLRTrainer(PretrainTrainer):
    """SimCLR with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders are trained here."""

    task = SimCLR
    cost = StepCost(views=2, copies=2, decoder=False)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=1500)
    vit = VIT_RECIPE
