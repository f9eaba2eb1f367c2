"""Self-distillation: a student predicts, from other crops, what a slow copy of itself makes of two large ones.

`DINOTrainer` compares one descriptor per crop. `DINOv2Trainer` adds hidden tokens that the student has to fill in
(iBOT), a push that keeps cases apart (KoLeo) and, as an option, token similarities kept as an earlier network had them
(Gram). Both are made for batches of 2 to 8 volumes, where the published recipes collapse: few prototypes, a slow rise
of the teacher's temperature, targets centred by a running mean and not by the batch, queues of other cases.

Papers: Caron et al. 2021 (arXiv:2104.14294), Zhou et al. 2022 (arXiv:2111.07832), Oquab et al. 2023
(arXiv:2304.07193), Siméoni et al. 2025 (arXiv:2508.10104). Other than there, the descriptor is the mean over the
deepest feature map, on a transformer too: nnU-Net's Primus has no class token, and no decoder reads its registers.
Hidden tokens have a pass of their own, so descriptors are learned from whole crops. On a U-Net hidden voxels are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import ClassVar, Literal

import torch

from nnssl_ext.core.checks import above_zero, at_least, rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.ranks import num_ranks, rank
from nnssl_ext.engine.alarms import Response
from nnssl_ext.engine.monitors import token_spread
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import (
    TRAINERS,
    Embeddings,
    PretextTask,
    PretrainTrainer,
    StepOutput,
    TaskInfo,
    Views,
)
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.dino import dino_loss, known_case
from nnssl_ext.losses.gram import gram_loss
from nnssl_ext.losses.ibot import ibot_loss
from nnssl_ext.losses.koleo import koleo
from nnssl_ext.losses.sinkhorn import sinkhorn
from nnssl_ext.models.backbone import build_encoder, descriptor, flat_tokens, token_level
from nnssl_ext.models.distillation import Centring, DistillationConfig
from nnssl_ext.models.ema import Teacher
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.heads import PrototypeHead
from nnssl_ext.models.hidden import HiddenTokens, hidden_places
from nnssl_ext.models.layer_rates import rate_of_layer
from nnssl_ext.models.queue import EMPTY, FeatureQueue, all_rows, case_keys
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.models.targets import Targets, check_balance, prototypes_for
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.masks import block_mask, check_blocks
from nnssl_ext.views.multicrop import (
    NUM_GLOBALS,
    MultiCropConfig,
    enlarged,
    multi_crop,
    num_patches,
    view_sizes,
)
from nnssl_ext.views.sham import of_another_case

BALANCE = {"softmax": None, "sinkhorn": sinkhorn}
"""How targets are kept from being all the same, by the name of the setting."""
DESCRIPTORS_PER_PROTOTYPE, TOKENS_PER_PROTOTYPE = 1 / 16, 1 / 4
"""Samples per prototype below which balanced targets are refused: descriptors, hidden tokens."""
MAX_KOLEO = 8.0
"""How far the collapse monitor may multiply KoLeo's weight."""

Weighted = dict[str, tuple[float | torch.Tensor, torch.Tensor]]
"""Losses by name, each with its weight."""


@dataclass(frozen=True, kw_only=True)
class DINOConfig(DistillationConfig):
    """Settings of self-distillation on one descriptor per crop."""

    crops: MultiCropConfig = field(default_factory=MultiCropConfig)
    """Which views are compared."""
    layer_decay: float = 0.9
    """Learning rate of an encoder stage (on a transformer: a block) relative to the next deeper one, in (0, 1]."""
    stem_lr: float = 0.2
    """Factor on the learning rate of a transformer's patch embedding, above 0. Oquab et al. 2023."""
    final_share: float = 0.0
    """Share of the run, at its end, in which global views have more voxels, in [0, 1). Siméoni et al. 2025."""
    final_scale: float = 4 / 3
    """Edge of those as a multiple of the others', 1 or more. They take that much to the power of three in memory."""
    export: Literal["teacher", "student"] = "teacher"
    """Whose encoder goes to fine-tuning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "(0, 1]", "layer_decay")
        above_zero(self, "stem_lr")
        within(self, "[0, 1)", "final_share")
        at_least(self, final_scale=1)


@dataclass(frozen=True, kw_only=True)
class DINOv2Config(DINOConfig):
    """Settings of self-distillation on descriptors and hidden tokens."""

    ibot_weight: float = 1.0
    """Of the hidden tokens' loss, 0 or more; the descriptors' is 1."""
    mask_ratio: tuple[float, float] = (0.3, 0.6)
    """Smallest and largest share of the tokens hidden in one of the two global views, in (0, 1)."""
    mask_block: int = 1
    """Edge of a hidden block in tokens, 1 or more, at most those there are along an axis; clipped at the far border."""
    ibot_centring: Centring = "softmax"
    """As `centring`, for tokens; balance needs a fourth as many hidden tokens as prototypes."""
    ibot_queue: int = 0
    """Hidden tokens of earlier steps that take part in the balance, 0 or more; bounded by the cases."""
    koleo_weight: float = 0.1
    """Of the spread of descriptors, 0 or more."""
    koleo_queue: int = 512
    """Descriptors of earlier steps that repel, 0 or more; never more than there are cases outside a batch."""
    gram_weight: float = 0.0
    """Of the tokens' similarities, 0 or more; above 0 takes memory for one more encoder."""
    gram_start: float = 0.5
    """Share of the run after which the teacher becomes the anchor, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ibot_weight=0, koleo_weight=0, gram_weight=0, ibot_queue=0, koleo_queue=0, mask_block=1)
        rising(self, "(0, 1)", "mask_ratio")
        within(self, "[0, 1]", "gram_start")


class DINO(PretextTask):
    """A student's descriptors against a teacher's; see the module."""

    Config = DINOConfig
    info = TaskInfo(
        idea="predict from other crops what a slow copy of the network makes of large ones",
        paper="arXiv:2104.14294",
        choose="where one descriptor per scan is the aim, as in classification and retrieval. It pretrains no decoder.",
        encoders={"cnn", "vit"},
    )
    config: DINOConfig
    late: torch.Tensor
    """1 while global views have more voxels, else 0."""

    def __init__(self, config: DINOConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds student, teacher and head.

        Raises:
            ValueError: Where views do not fit the network, or balanced targets would be flat.
        """
        super().__init__(config, configuration, num_cases)
        self.encoder = build_encoder(configuration)
        self.parent_scale = config.crops.parent_scale
        self.sizes = view_sizes(config.crops, configuration.patch_size, self.encoder.strides[-1])
        self.level = token_level(self.encoder.strides, self.sizes[0])
        self.num_prototypes = config.prototypes or prototypes_for(num_cases)
        self.volumes = configuration.batch_size * num_ranks()
        if config.centring == "sinkhorn":
            check_balance("centring", NUM_GLOBALS * self.volumes, self.num_prototypes, DESCRIPTORS_PER_PROTOTYPE)
        width = self.encoder.channels[-1]
        self.standard, self.teacher_standard = Standardise(width), Standardise(width)
        self.head = PrototypeHead(width, self.num_prototypes)
        self.targets = Targets(self.num_prototypes, config.teacher_temperature[0], BALANCE[config.centring])
        self.teacher = Teacher(encoder=self.encoder, head=self.head)
        self.register_buffer("late", torch.tensor(0.0))

    def _sizes_now(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Voxels of global and local views at this step."""
        if not self.config.final_share or not self.late:
            return self.sizes
        return enlarged(self.sizes[0], self.encoder.strides[-1], self.config.final_scale), self.sizes[1]

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """Two global and several local crops of each sample; only in training they are moved and recoloured.

        Returns:
            `global0`, `global1` (B, C, *global size); `local0`, ... (B, C, *local size); `case` (B,), a number for
            each case.
        """
        config = self.config.crops.suited_to(self.configuration.normalization_schemes)
        crops = multi_crop(batch, random, config, self._sizes_now(), augment=train)
        kinds = zip(("global", "local"), crops, strict=True)
        named = {f"{kind}{number}": view.data for kind, of_kind in kinds for number, view in enumerate(of_kind)}
        return {**named, "case": case_keys(batch.cases, batch.data.device)}

    def forward(self, views: Views) -> StepOutput:
        """The cross-entropy of descriptors and what a subclass adds; and how often a crop is known for its case."""
        size, temperature = len(views["case"]), self.config.student_temperature
        with torch.no_grad():
            theirs = self.teacher.encoder(_joined(views, "target" if "target0" in views else "global"))
            asked = descriptor(theirs)
            scores = self.teacher.head(self.teacher_standard(asked))
            targets = self.targets(scores).unflatten(0, (-1, size))
        ours = self.encoder(_joined(views, "global"))
        pooled = [descriptor(ours)]
        if self.config.crops.num_locals:
            pooled.append(descriptor(self.encoder(_joined(views, "local"))))
        descriptors = torch.cat(pooled).unflatten(0, (-1, size))
        embedded = self.head.embed(self.standard(descriptors))
        logits = self.targets.close(self.head.scores(embedded))
        losses, metrics = self._more(views, ours, theirs, descriptors)
        losses["dino"] = (1.0, dino_loss(logits, targets, temperature))
        if self.training:
            self.targets.centre.collect(scores)
            self.standard.collect(descriptors)
            self.teacher_standard.collect(asked)
        metrics |= {f"{name}_loss": loss.detach() for name, (_, loss) in losses.items()}
        metrics["known_case"], metrics["known_case_chance"] = known_case(logits, targets, views["case"], temperature)
        metrics["teacher_temperature"] = self.targets.temperature.clone()
        return StepOutput(
            loss=torch.stack([weight * loss for weight, loss in losses.values()]).sum(),
            metrics=metrics,
            embeddings=Embeddings(
                first=embedded[0].detach(),
                second=embedded[1].detach(),
                targets=targets[0],
                token_spread=self._spread(ours, size),
            ),
        )

    def _more(
        self, views: Views, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], descriptors: torch.Tensor
    ) -> tuple[Weighted, dict[str, torch.Tensor]]:
        """Further losses, and metrics.

        Args:
            views: Of the step.
            ours: The student's feature maps of both global views, (2 B, C, *size) each.
            theirs: The teacher's.
            descriptors: The student's, (views, B, D), of global views first.
        """
        return {}, {}

    def _spread(self, maps: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        tokens = flat_tokens(maps[self.level][:size].detach().float())
        return token_spread(tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool))

    def after_step(self, step: int, total: int) -> None:
        """Moves teacher and centres once, and sets the next step's temperature and whether prototypes move."""
        pace = self.config.pace(step, total)
        for module in self.children():
            if isinstance(module, Targets):
                module.update(pace.centre_momentum, pace.temperature)
            elif isinstance(module, PrototypeHead):
                module.moving.fill_(float(pace.moving))
            elif isinstance(module, Standardise):
                module.update()
        self.late.fill_(float(step + 1 >= (1 - self.config.final_share) * total))
        followed = {name: self.get_submodule(name) for name, _ in self.teacher.named_children()}
        self.teacher.follow(pace.momentum, **followed)

    def respond(self, response: Response) -> str:
        """Turns temperatures, centres and prototypes; see `PretextTask`."""
        if response not in ("sharpen", "soften"):
            return ""
        targets = (module for module in self.children() if isinstance(module, Targets))
        changes = [each.sharpen() if response == "sharpen" else each.soften() for each in targets]
        return "; ".join(dict.fromkeys(filter(None, changes)))

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The teacher looks at another case; see `PretextTask.sham`."""
        others = {f"target{number}": of_another_case(views[f"global{number}"]) for number in range(NUM_GLOBALS)}
        return {**views, **others}

    def lr_scale(self, name: str) -> float:
        """Layer-wise decay, and a slow patch embedding on a transformer; see `PretextTask`."""
        names = (each for each, _ in self.named_parameters())
        return rate_of_layer(name, names, self.config.layer_decay, self.config.stem_lr)

    @property
    def exported_encoder(self) -> Encoder:
        """The teacher's encoder, or the student's where the settings say so."""
        return self.teacher.encoder if self.config.export == "teacher" else self.encoder


class DINOv2(DINO):
    """Descriptors, hidden tokens, and the spread of both; see the module."""

    Config = DINOv2Config
    info = TaskInfo(
        idea="predict what a slow copy of the network makes of whole crops: from other crops, and at hidden tokens",
        paper="arXiv:2304.07193",
        choose="where descriptors and dense features are wanted from one network. It pretrains no decoder.",
        encoders={"cnn", "vit"},
        negative=True,  # KoLeo
    )
    config: DINOv2Config
    koleo_factor: torch.Tensor
    """Multiplies KoLeo's weight."""
    anchored: torch.Tensor
    """1 once there is an anchor, else 0."""

    def __init__(self, config: DINOv2Config, configuration: Configuration, num_cases: int) -> None:
        """Builds the tokens' head, the queues, and the anchor where it has weight.

        Raises:
            ValueError: Where views do not fit the network or blocks the views, or balanced targets would be flat.
        """
        super().__init__(config, configuration, num_cases)
        self.stride = self.encoder.strides[self.level]
        self.grid = tuple(edge // step for edge, step in zip(self.sizes[0], self.stride, strict=True))
        self.block = tuple(min(config.mask_block, edge) for edge in self.grid)
        check_blocks(self.block, self.grid, config.mask_ratio)
        others = num_cases - self.volumes
        size = min(config.koleo_queue, others) if config.koleo_weight else 0
        self.queue = FeatureQueue(size, self.encoder.channels[-1])
        self.register_buffer("koleo_factor", torch.tensor(1.0))
        self.register_buffer("anchored", torch.tensor(0.0))
        if config.ibot_weight:
            self._build_tokens(config, others)
        if config.gram_weight:
            self.anchor = Teacher(encoder=self.encoder)

    def _build_tokens(self, config: DINOv2Config, others: int) -> None:
        width, num_tokens = self.encoder.channels[self.level], prod(self.grid)
        most_hidden = self._most_hidden(num_tokens)
        self.token_standard, self.teacher_token_standard = Standardise(width), Standardise(width)
        self.token_head = PrototypeHead(width, self.num_prototypes)
        self.token_targets = Targets(self.num_prototypes, config.teacher_temperature[0], BALANCE[config.ibot_centring])
        self.teacher.add(token_head=self.token_head)
        size = 0
        if config.ibot_centring == "sinkhorn":
            size = max(0, min(config.ibot_queue, others * most_hidden))
            hidden = int(sum(config.mask_ratio) / 2 * num_tokens) * self.volumes
            earlier = size * hidden // (most_hidden * self.volumes)  # the other places stay empty
            check_balance("ibot_centring", hidden + earlier, self.num_prototypes, TOKENS_PER_PROTOTYPE)
        self.token_queue = FeatureQueue(size, self.token_head.bottleneck_width)
        self.fill_in = HiddenTokens(self.encoder, self.level)

    def _most_hidden(self, num_tokens: int) -> int:
        """Tokens of so many that are hidden at most."""
        return min(num_tokens, ceil(self.config.mask_ratio[1] * num_tokens) + prod(self.block))

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """The crops of `DINO.views`, and which tokens of which global one are hidden.

        Returns:
            Besides: `masked_view` (B,), 0 or 1; `hidden` (B, 1, *tokens of a global view), bool.
        """
        views = super().views(batch, random, train)
        draws, device = random.child("mask"), batch.data.device
        ratio = torch.from_numpy(draws.uniform("ratio", *self.config.mask_ratio, (1,))).to(device)
        grid = [edge // step for edge, step in zip(views["global0"].shape[2:], self.stride, strict=True)]
        views["hidden"] = block_mask(draws, grid, self.block, ratio, device=device)
        views["masked_view"] = torch.from_numpy(draws.integers("view", 0, NUM_GLOBALS)).to(device)
        return views

    def _more(
        self, views: Views, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], descriptors: torch.Tensor
    ) -> tuple[Weighted, dict[str, torch.Tensor]]:
        losses: Weighted = {}
        metrics: dict[str, torch.Tensor] = {}
        if self.config.ibot_weight:
            losses["ibot"] = (self.config.ibot_weight, self._ibot(views, theirs[self.level]))
            metrics["hidden_share"] = views["hidden"].float().mean()
        if self.config.koleo_weight:
            losses["koleo"] = (self.config.koleo_weight * self.koleo_factor, self._koleo(descriptors, views["case"]))
        if self.config.gram_weight and self.anchored:
            with torch.no_grad():
                anchor = flat_tokens(self.anchor.encoder(_joined(views, "global"))[self.level])
            gram = gram_loss(flat_tokens(ours[self.level]), anchor)
            losses["gram"] = (self.config.gram_weight, gram)
        return losses, metrics

    def _ibot(self, views: Views, theirs: torch.Tensor) -> torch.Tensor:
        """The loss at hidden tokens, of one global view of each sample.

        Args:
            views: Of the step.
            theirs: The teacher's map of both global views, (2 B, D, *tokens).
        """
        hidden, row = views["hidden"], torch.arange(len(views["case"]), device=theirs.device)
        counted, place = hidden_places(hidden, self._most_hidden(hidden[0].numel()))
        chosen = flat_tokens(theirs.unflatten(0, (NUM_GLOBALS, -1))[views["masked_view"], row])
        image = torch.stack([views["global0"], views["global1"]])[views["masked_view"], row]
        student = flat_tokens(self.fill_in(self.encoder, image, hidden))
        with torch.no_grad():
            asked = chosen.take_along_dim(place[..., None], 1)
            embedded = self.teacher.token_head.embed(self.teacher_token_standard(asked))
            scores = self.teacher.token_head.scores(embedded)
            targets = self.token_targets(scores, counted, self._earlier_tokens())
        student = student.take_along_dim(place[..., None], 1)
        logits = self.token_targets.close(self.token_head(self.token_standard(student)))
        if self.training:
            self.token_targets.centre.collect(scores, counted)
            self.token_standard.collect(student, counted)
            self.teacher_token_standard.collect(asked, counted)
            keys = torch.where(counted, views["case"][:, None], EMPTY)
            self.token_queue.push(all_rows(embedded.flatten(0, 1)), all_rows(keys.flatten()))
        return ibot_loss(logits, targets, counted, self.config.student_temperature)

    def _earlier_tokens(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scores of the queue's tokens that this rank brings into the balance, and which of its places are filled."""
        if not len(self.token_queue.keys):
            return None
        mine = slice(rank(), None, num_ranks())
        return self.teacher.token_head.scores(self.token_queue.rows[mine]), self.token_queue.keys[mine] != EMPTY

    def _koleo(self, descriptors: torch.Tensor, case: torch.Tensor) -> torch.Tensor:
        """The spread of each global view's descriptors from those of other cases, here, on other ranks, and before."""
        around = torch.cat([all_rows(case), self.queue.keys])
        excluded = (case[:, None] == around) | (around == EMPTY)
        losses = [
            koleo(view, torch.cat([all_rows(view), self.queue.rows]), excluded) for view in descriptors[:NUM_GLOBALS]
        ]
        if self.training:
            self.queue.push(all_rows(descriptors[0]), all_rows(case))
        return torch.stack(losses).mean()

    def after_step(self, step: int, total: int) -> None:
        """As `DINO.after_step`; and the teacher becomes the anchor once its time has come."""
        super().after_step(step, total)
        if self.config.gram_weight and step + 1 == max(1, round(self.config.gram_start * total)):
            self._cast_anchor()

    def _cast_anchor(self) -> None:
        self.anchor.follow(0, encoder=self.teacher.encoder)
        self.anchored.fill_(1)

    def respond(self, response: Response) -> str:
        """Turns the knobs of `DINO`, KoLeo's weight and the anchor; see `PretextTask`."""
        if response == "spread" and self.config.koleo_weight and self.koleo_factor < MAX_KOLEO:
            self.koleo_factor *= 2
            return f"KoLeo's weight {float(self.koleo_factor):g} times what it was at the start"
        if response == "anchor" and self.config.gram_weight:
            self._cast_anchor()
            return "tokens anchored to the teacher as it is now"
        return super().respond(response)


def _joined(views: Views, kind: str) -> torch.Tensor:
    """All views of a kind one after the other, (views * B, C, *size)."""
    return torch.cat([view for name, view in views.items() if name.startswith(kind)])


@TRAINERS.register
class DINOTrainer(PretrainTrainer):
    """Self-distillation on one descriptor per crop, with a recipe for small batches of volumes.

    Eight batches make up an update, so 125 epochs of updates see as many volumes as 1000 of other methods.
    """

    task: ClassVar[type[PretextTask]] = DINO
    cost = StepCost(views=2.5, copies=2, decoder=False)
    optim = OptimConfig(
        name="adamw",
        lr=2e-4,
        lr_size=30e6,  # so 6e-5 to 1.1e-4 at 100 to 300 million parameters, and 2e-3 at the fewest
        weight_decay=0.04,
        final_weight_decay=0.2,
        betas=(0.9, 0.99),
        clip=1.0,
        decay_vectors=False,
    )
    schedule = ScheduleConfig(name="cosine", warmup_steps=1000, warmup_share=0.05)
    accumulate = 8
    num_epochs = 125

    def step_cost(self, configuration: Configuration) -> StepCost:
        """Of the views that were asked for, and of the anchor where there is one; see `PretrainTrainer`."""
        config = self.task_config
        stride = [prod(steps) for steps in zip(*configuration.strides, strict=True)]
        scale = config.final_scale if config.final_share else 1.0
        passes = NUM_GLOBALS + (getattr(config, "ibot_weight", 0) > 0)
        views = num_patches(config.crops, passes, configuration.patch_size, stride, scale)
        return replace(self.cost, views=views, copies=2 + (getattr(config, "gram_weight", 0) > 0))


@TRAINERS.register
class DINOv2Trainer(DINOTrainer):
    """Self-distillation on descriptors and hidden tokens, with a recipe for small batches of volumes.

    Eight batches make up an update, so 125 epochs of updates see as many volumes as 1000 of other methods.
    """

    task = DINOv2
    cost = StepCost(views=3.5, copies=2, decoder=False)
