"""Several tasks at once: those of other trainers, as many as are asked for, all on one encoder.

Every task has views, heads, queues and metrics of its own and runs the encoder as it would alone; the gradients of all
meet in the encoder's weights. A task's random numbers are keyed by its name, so they are the same whichever others
there are. Losses are divided by their mean size in the first steps of the run, or weighed by learned variances.

Papers: Doersch and Zisserman 2017 (arXiv:1708.07860); Kendall et al. 2018 (arXiv:1705.07115) for the variances; Lee et
al. 2015 (arXiv:1409.5185) for losses on inner levels. Other than in the first, tasks share weights but no features,
since each changes images in its own way; and a loss is measured at the start to find its weight.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, tee
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import Self

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import from_dict, to_dict
from nnssl_ext.engine.alarms import Response
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.task import TRAINERS, VIT_RECIPE, PretextTask, PretrainTrainer, StepOutput, TaskInfo, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.models.backbone import export_network
from nnssl_ext.models.ema import Teacher
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.sharing import InnerLevel, share_weights
from nnssl_ext.models.weighting import FirstSteps, Uncertainty
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost
from nnssl_ext.views.crops import centre_view

DEEPEST = -1
"""The level that every task looks at."""


@dataclass(frozen=True, kw_only=True)
class MultiTaskConfig:
    """Settings of joint training."""

    tasks: tuple[str, ...] = ("mae", "rotation", "simclr")
    """Trainers without that word, as in `tasks=[mae,rotation,simclr]`. Settings of each task are set behind its name,
    as in `rotation.max_anisotropy=1.2`; its recipe is not used. Of several that train a decoder the first one's is
    handed on, and of several that embed crops the first one's embeddings are watched for collapse; nothing else depends
    on the order."""
    weighting: Literal["mean", "uncertainty"] = "mean"
    """How losses are weighed: `mean` divides each by its mean size in the first 50 steps, or the first tenth of a
    shorter run; `uncertainty` learns a variance of each, which takes losses that cannot be negative."""
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """At which levels of a U-Net's encoder a task's loss is taken, as in `'levels={"rotation":[-1,-2]}'`; the deepest,
    -1, is one of them, and their mean is the task's loss. Each further level has a head of its own and costs a pass.
    For tasks that look at nothing but one pooled vector of each image."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All settings of each task, filled in from `NAME.SETTING=VALUE`. A task that is not in it has its defaults."""


class MultiTask(PretextTask):
    """Several tasks on one encoder; see the module."""

    Config = MultiTaskConfig
    info = TaskInfo(
        idea="learn several of the other tasks at once, on one encoder",
        paper="arXiv:1708.07860",
        choose="where no task alone gives all that is wanted, such as a decoder and a descriptor. A step costs what "
        "those of its tasks cost together.",
        encoders={"cnn", "vit"},
        trains_decoder=True,
    )
    config: MultiTaskConfig

    def __init__(self, config: MultiTaskConfig, configuration: Configuration, num_cases: int) -> None:
        """Builds every task as it would be alone, from the same seed, and makes their encoders one.

        Raises:
            ValueError: Where a task does not run here, or tasks do not go together.
        """
        super().__init__(resolved(config), configuration, num_cases)
        trainers, state = member_trainers(self.config), torch.get_rng_state()

        def alone(name: str, images: int = 1) -> PretextTask:
            torch.set_rng_state(state)
            seen = replace(configuration, batch_size=images * configuration.batch_size)
            return trainers[name].build_task(seen, num_cases)

        tasks = {name: alone(name) for name in trainers}
        self._needs = united({name: task.needs for name, task in tasks.items()})
        images = {name: self._needs.images // task.needs.images for name, task in tasks.items()}
        tasks |= {name: alone(name, number) for name, number in images.items() if number > 1}
        self.encoder = next(iter(tasks.values())).encoder
        self.parent_scale = max(task.parent_scale for task in tasks.values())
        self.first_look = max(task.first_look for task in tasks.values())
        self.members: Any = nn.ModuleDict(tasks)
        self.inner: Any = nn.ModuleDict()
        for task in tasks.values():
            share_weights(task.encoder, self.encoder)
            adopt(task, task.encoder)
        for name, levels in self.config.levels.items():
            for level in inner_levels(levels, self.encoder):
                task = self.inner[f"{name}_level{level}"] = alone(name, images[name])
                adopt(task, InnerLevel(self.encoder, level))
        self.weighting = (FirstSteps if config.weighting == "mean" else Uncertainty)(len(tasks))

    @property
    def needs(self) -> DataNeeds:
        """What all tasks together want; one that looks at single images gets every image as a sample."""
        return self._needs

    @property
    def trains_decoder(self) -> bool:
        """Whether one of the tasks does."""
        return any(task.trains_decoder for task in self.members.values())

    def parts(self, name: str) -> Iterator[tuple[str, PretextTask]]:
        """A task and its copies on inner levels, by name."""
        yield name, self.members[name]
        yield from ((part, task) for part, task in self.inner.items() if part.rpartition("_level")[0] == name)

    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """The views of all tasks, as `task/view`; tasks that want smaller crops get the middle of what is read."""
        found: Views = {}
        for name, task in self.members.items():
            own = task.views(self._seen(task, batch), random.child(name), train)
            found |= {f"{name}/{view}": values for view, values in own.items()}
        return found

    def _seen(self, task: PretextTask, batch: Batch) -> Batch:
        """The crops that a task would read, alone."""
        size = [ceil(edge * task.parent_scale) for edge in self.configuration.patch_size]
        return batch if task.parent_scale == self.parent_scale else middle(batch, size)

    def forward(self, views: Views) -> StepOutput:
        """The joint loss; every task's metrics and pictures under its name, with its loss and the factor of that."""
        losses: list[torch.Tensor] = []
        metrics: dict[str, torch.Tensor] = {}
        images: dict[str, torch.Tensor] = {}
        shown: dict[str, Any] = {}
        for name in self.members:
            own = views_of(name, views)
            outputs = {part: task(own) for part, task in self.parts(name)}
            losses.append(torch.stack([output.loss.float() for output in outputs.values()]).mean())
            for part, output in outputs.items():
                metrics |= {f"{part}_{metric}": value for metric, value in output.metrics.items()}
            images |= {f"{name}_{image}": value for image, value in (outputs[name].images or {}).items()}
            shown[name] = outputs[name].embeddings
        loss, factors = self.weighting(torch.stack(losses))
        for name, value, factor in zip(self.members, losses, factors, strict=True):
            metrics |= {f"{name}_loss": value.detach(), f"{name}_factor": factor}
        watched = (shown[name] for name in self.config.tasks if shown[name] is not None)
        return StepOutput(loss=loss, metrics=metrics, images=images or None, embeddings=next(watched, None))

    def begin(self, batches: Iterable[tuple[Batch, SampleRandom]]) -> None:
        """Shows every task that asks for it what all look at first; see `PretextTask.begin`."""
        looking = [name for name, task in self.members.items() if task.first_look]
        for name, copy in zip(looking, tee(batches, len(looking)), strict=True):
            task = self.members[name]
            task.begin((self._seen(task, batch), random.child(name)) for batch, random in copy)

    def after_step(self, step: int, total: int) -> None:
        """What each task does; and the measuring of losses ends in time."""
        for task in (*self.members.values(), *self.inner.values()):
            task.after_step(step, total)
        self.weighting.update(step, total)

    def respond(self, response: Response) -> str:
        """Turns the knob of the first task that has one; see `PretextTask`."""
        said = ((name, self.members[name].respond(response)) for name in self.config.tasks)
        return next((f"{name}: {words}" for name, words in said if words), "")

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """Every task's sham; see `PretextTask.sham`."""
        found: Views = {}
        for name, task in self.members.items():
            destroyed = task.sham(views_of(name, views), random.child(name))
            found |= {f"{name}/{view}": values for view, values in destroyed.items()}
        return found

    def lr_scale(self, name: str) -> float:
        """That of the task that a parameter belongs to; for the encoder's, the smallest that a task asks for."""
        part, _, rest = name.partition(".")
        if part == "members":
            member, _, rest = rest.partition(".")
            return self.members[member].lr_scale(rest)
        return min(task.lr_scale(name) for task in self.members.values()) if part == "encoder" else 1.0

    def predictor(self) -> Mapping[str, torch.Tensor]:
        """What every task takes for its predictions; see `PretextTask`."""
        found = {name: task.predictor() for name, task in self.members.items()}
        return {f"members.{name}.{key}": value for name, state in found.items() for key, value in state.items()}

    def export_network(self) -> nn.Module:
        """The encoder, and the decoder of the first task that trains one; see `PretextTask`."""
        tasks = (self.members[name] for name in self.config.tasks)
        trained = next((task for task in tasks if task.trains_decoder), None)
        return export_network(self.configuration, self.encoder) if trained is None else trained.export_network()


def views_of(name: str, views: Views) -> Views:
    """Those of one task, by its own names for them."""
    prefix = f"{name}/"
    return {view.removeprefix(prefix): values for view, values in views.items() if view.startswith(prefix)}


def middle(batch: Batch, size: Sequence[int]) -> Batch:
    """Smaller crops: the middle of each, moved by what it takes to lie in the real voxels.

    Args:
        batch: Crops.
        size: Voxels per axis; a rounded size may be one too large.
    """
    size = [min(edges) for edges in zip(size, batch.data.shape[2:], strict=True)]
    view = centre_view(batch.data, batch.valid, size)
    first = view.transform.centre - (torch.tensor(size, device=batch.valid.device) - 1) / 2
    return replace(batch, data=view.data, valid=view.valid, lower=batch.lower + first.round().long())


def adopt(task: PretextTask, encoder: Encoder) -> None:
    """Gives a task that has taken no step an encoder, and its teachers a copy of that, which they equal at first."""
    task.encoder = encoder
    for module in task.modules():
        if isinstance(module, Teacher):
            module.add(encoder=encoder)


def inner_levels(levels: Iterable[int], encoder: Encoder) -> list[int]:
    """Levels but the deepest, counted from the finest.

    Raises:
        ValueError: Where the encoder has no such map.
    """
    number = len(encoder.channels)
    wrong = [level for level in levels if not -number <= level < 0]
    if wrong:
        raise ValueError(
            f"level {wrong[0]} is none of the encoder's: its {number} map(s) are -1, the deepest, to {-number}. A "
            "transformer has no other than the last"
        )
    return [level % number for level in levels if level != DEEPEST]


def united(needs: Mapping[str, DataNeeds]) -> DataNeeds:
    """What gives every task what it needs.

    Args:
        needs: Of each task, by name.

    Raises:
        ValueError: Where two want samples of several images that are made differently.
    """
    several = {name: each for name, each in needs.items() if each.images > 1}
    makes = {(each.images, each.same) for each in several.values()}
    if len(makes) > 1:
        wanted = ", ".join(
            f"{name} {each.images} that share {each.same or 'nothing'}" for name, each in several.items()
        )
        raise ValueError(
            f"no sample suits these tasks, which want several images each: {wanted}. Leave one out of tasks"
        )
    images, same = makes.pop() if makes else (1, None)
    return DataNeeds(channels=max(each.channels for each in needs.values()), images=images, same=same)


def trainers_by_task() -> dict[str, str]:
    """Names of all trainers but this one, by the names that their tasks go by here."""
    return {plain(name): name for name in TRAINERS.names() if name != MultiTaskTrainer.__name__}


def plain(name: str) -> str:
    """The name that a trainer's task goes by: `MAETrainer`, `MAE` and `mae` are one."""
    return name.lower().replace("_", "").removesuffix("trainer")


def resolved(config: MultiTaskConfig) -> MultiTaskConfig:
    """The settings with every task's one name.

    Raises:
        ValueError: Where a task is unknown, named twice or not at all, or cannot be learned as asked for.
    """
    known, tasks = trainers_by_task(), tuple(map(plain, config.tasks))
    for name in tasks:
        if name not in known:
            raise ValueError(f"tasks={list(config.tasks)}: there is no {name!r}. Valid: {', '.join(sorted(known))}")
    if len(set(tasks)) < max(len(tasks), 1):
        raise ValueError(f"tasks={list(config.tasks)} must name one task or more, each once.")
    infos = {name: TRAINERS.get(known[name]).task.info for name in tasks}
    negative = [name for name, info in infos.items() if info.negative]
    if config.weighting == "uncertainty" and negative:
        raise ValueError(
            f"weighting='uncertainty' needs losses of 0 or more, and that of {negative[0]} may fall below: its "
            "variance would then shrink without end. Leave it at weighting=mean"
        )
    levels = {plain(name): chosen for name, chosen in config.levels.items()}
    for name, chosen in levels.items():
        if name not in infos or not infos[name].pooled:
            able = ", ".join(each for each in sorted(tasks) if infos[each].pooled) or "none"
            raise ValueError(
                f"levels: {name} is no task here whose loss sees the encoder by one pooled vector of each image alone, "
                f"which a level could give as well. Those are: {able}"
            )
        if DEEPEST not in chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"levels of {name}: {list(chosen)} must hold {DEEPEST}, the deepest, and each level once.")
    return replace(config, tasks=tasks, levels=levels)


def member_trainers(config: MultiTaskConfig) -> dict[str, PretrainTrainer]:
    """The trainers of resolved settings, with the settings of their tasks; sorted, so that no order matters."""
    known = trainers_by_task()
    found: dict[str, PretrainTrainer] = {}
    for name in sorted(config.tasks):
        cls = TRAINERS.get(known[name])
        settings = config.settings.get(name)
        found[name] = cls() if settings is None else cls(task_config=from_dict(cls.task.Config, settings, name))
    return found


@TRAINERS.register
class MultiTaskTrainer(PretrainTrainer):
    """Joint training with AdamW at 1e-3, warm-up and a cosine; on a transformer as masked autoencoders."""

    task = MultiTask
    cost = StepCost(views=4, copies=2, decoder=True, tokens=0.8125)
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), clip=1.0, decay_vectors=False)
    schedule = ScheduleConfig(name="cosine", warmup_steps=1500)
    vit = VIT_RECIPE

    def step_cost(self, configuration: Configuration) -> StepCost:
        """Of all tasks together, whose passes are all kept for the gradient; see `PretrainTrainer`."""
        config = resolved(self.task_config)
        costs = {name: trainer.step_cost(configuration) for name, trainer in member_trainers(config).items()}
        views = {name: cost.views * len(config.levels.get(name, (DEEPEST,))) for name, cost in costs.items()}
        return StepCost(
            views=sum(views.values()),
            copies=1 + sum(cost.copies - 1 for cost in costs.values()),
            decoder=any(cost.decoder for cost in costs.values()),
            tokens=sum(views[name] * cost.tokens for name, cost in costs.items()) / sum(views.values()),
        )

    @property
    def papers(self) -> dict[str, str]:
        """This method's and those of its tasks; see `PretrainTrainer`."""
        members = member_trainers(resolved(self.task_config)).values()
        return dict(chain(super().papers.items(), *(member.papers.items() for member in members)))

    @classmethod
    def configured(cls, overrides: Sequence[str] = (), backbone: str = "cnn") -> Self:
        """The recipe with settings applied, those of tasks behind their names; see `PretrainTrainer`.

        Raises:
            ValueError: Also where a task is set that is not learned.
        """
        known, own = trainers_by_task(), []
        theirs: dict[str, list[str]] = defaultdict(list)
        for override in overrides:
            first, dot, rest = override.partition(".")
            if dot and plain(first) in known:
                theirs[plain(first)].append(rest)
            elif override.split("=")[0].strip() == "settings":
                raise ValueError(f"{override}: set each by its task's name, as in rotation.max_anisotropy=1.2.")
            else:
                own.append(with_quotes(override))
        trainer = super().configured(own, backbone)
        config = resolved(trainer.task_config)
        for name, asked in theirs.items():
            if name not in config.tasks:
                raise ValueError(f"{name}.{asked[0]}: {name} is none of tasks={list(config.tasks)}.")
        every = {name: configured_task(known[name], theirs[name], backbone) for name in sorted(config.tasks)}
        settings = {name: {**to_dict(each), **paths_of(each)} for name, each in every.items()}
        return replace(trainer, task_config=replace(config, settings=settings))


def with_quotes(override: str) -> str:
    """`tasks=[mae,rotation]` with its names in the quotes that a list of words is read with; all else as it is."""
    name, _, value = override.partition("=")
    value = value.strip()
    if name.strip() != "tasks" or not value.startswith("[") or not value.endswith("]"):
        return override
    words = [word.strip().strip("\"'") for word in value[1:-1].split(",")]
    return f"tasks={json.dumps([word for word in words if word])}"


def paths_of(config: Any) -> dict[str, Path]:
    """The settings that are files, as such, so that checkpoints can leave them out."""
    values = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, Path)}


def configured_task(trainer: str, overrides: Sequence[str], backbone: str) -> Any:
    """A task's settings with overrides applied.

    Raises:
        ValueError: If one is none of the task's: the recipe is that of the joint run.
    """
    cls = TRAINERS.get(trainer)
    names = [setting.name for setting in fields(cls.task.Config)]
    for override in overrides:
        if override.split("=")[0].split(".")[0].strip() not in names:
            raise ValueError(f"the task of {trainer} has no setting {override!r}. Valid: {', '.join(sorted(names))}")
    return cls.configured(overrides, backbone).task_config
