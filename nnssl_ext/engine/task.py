"""The two ideas the engine runs on: a task is a self-supervised objective, a trainer is a task plus a recipe.

To add a method, write one file in `nnssl_ext/trainers` with a config, a task and a trainer; `trainers/rotation.py` is a
short example. The engine knows nothing but what stands here.
"""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from nnssl_ext.core.checks import at_least, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import apply_overrides
from nnssl_ext.core.registry import Registry
from nnssl_ext.engine.alarms import HealthConfig, Response
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.models.backbone import export_network
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import StepCost

Views = dict[str, torch.Tensor]
VIT_RECIPE: Mapping[str, Any] = {
    "optim": OptimConfig(name="adamw", lr=3e-4, weight_decay=5e-2, betas=(0.9, 0.98), clip=1.0, decay_vectors=False),
    "schedule": ScheduleConfig(name="poly", warmup_steps=50 * 250),
}
"""What transformers are pretrained with (Wald et al. 2024, arXiv:2412.17041): AdamW, 50 epochs of warm-up."""
TrainerT = TypeVar("TrainerT", bound="PretrainTrainer")


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What a method is, for `nnssl_train --list`, the generated documentation and the checkpoint."""

    idea: str
    """The method in one line."""
    paper: str
    """Where it was published, as "arXiv:2111.06377"."""
    encoders: AbstractSet[str]
    """Kinds of backbone it runs on: "cnn", "vit"."""
    trains_decoder: bool = False
    """Whether the decoder that a CNN exports, the task's module `decoder`, was trained as well, so that fine-tuning may
    start from it. That of a transformer never serves another task: its widths follow the number of classes."""
    needs: DataNeeds = field(default_factory=DataNeeds)
    """What it asks of the data; a run on data that cannot give it is refused at the start."""
    needs_if: str = ""
    """What it asks of the data with another setting, for the documentation: "with SETTING=VALUE: ..."."""
    choose: str = ""
    """When to choose it, for the documentation: the end of a sentence that begins "Choose it", with a full stop."""
    pooled: bool = False
    """Whether its loss sees of the encoder's features one vector of each image alone: the deepest map's mean."""
    negative: bool = False
    """Whether its loss may fall below 0."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What a joint-embedding task shows the collapse monitor: detached, taken from the pass that is made anyway.

    Every tensor has one row per row of the batch, in its order.
    """

    first: torch.Tensor
    """Projector outputs of one view of each case, (B, D)."""
    second: torch.Tensor
    """Projector outputs, of the same network, of another view of the same cases, (B, D)."""
    targets: torch.Tensor | None = None
    """Probabilities that a teacher assigns to the first view, centred and sharpened as in the loss, (B, K); rows sum
    to 1. None where the method has no prototypes."""
    token_spread: torch.Tensor | None = None
    """How far a volume's tokens differ, (B,), as `monitors.token_spread` gives it. None without tokens."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one forward pass of a task gives."""

    loss: torch.Tensor
    """Scalar to minimise: a mean over samples, so that the mean over ranks of equal batches is that of the whole."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Detached scalars to log by name; one that is not finite is left out of an epoch's mean. A metric with a known
    chance level has it beside it as `<name>_chance`. One that is called `asked_share` is of what a loss may ask for; a
    run ends where a whole validation asks for nothing."""
    images: Mapping[str, torch.Tensor] | None = None
    """Detached pictures (B, C, *patch) to log by name, such as input, masked and output."""
    embeddings: Embeddings | None = None
    """For the collapse monitor, from joint-embedding tasks, in training and in validation; None from all others."""


class PretextTask(nn.Module, ABC):
    """A self-supervised objective on the plan's encoder.

    A step is: `views` on the device without gradient, `forward` (through DDP, so the loss is made there), the
    optimiser, `after_step`. All randomness is drawn in `views` from the passed `SampleRandom`; dropout alone may use
    torch's global generator, which the engine seeds every step. All state lies in parameters and buffers, so teachers,
    queues and centres are saved, resumed, and placed on the device. In `eval()` mode `forward` changes no state.

    `encoder` is the first module that a subclass assigns: optimisers tell it from the rest by its name.
    """

    Config: ClassVar[type]
    """Frozen, keyword-only dataclass of the settings; its fields are documented beneath and validated."""
    info: ClassVar[TaskInfo]
    encoder: Encoder
    """The backbone that is pretrained; the only part that is always exported."""
    parent_scale: float = 1.0
    """Edge of the crops that the loader reads, as a multiple of the patch's: above 1 for tasks that cut several views
    from one place. A subclass may set it from its config."""
    first_look: int = 0
    """Training cases that `begin` is shown, as many as there are at most, 0 or more."""

    def __init__(self, config: Any, configuration: Configuration, num_cases: int) -> None:
        """Keeps the three arguments; subclasses build their modules after it.

        Args:
            config: An instance of `Config`.
            configuration: The plan's configuration: patch size, batch size, architecture, spacing.
            num_cases: Cases trained on, which bounds queues and the number of prototypes.
        """
        super().__init__()
        self.config = config
        self.configuration = configuration
        self.num_cases = num_cases

    @property
    def needs(self) -> DataNeeds:
        """What the loader has to deliver; a subclass may derive it from its config."""
        return self.info.needs

    @property
    def trains_decoder(self) -> bool:
        """Whether it trains the decoder of a U-Net that it exports; a subclass may derive it from its config."""
        return self.info.trains_decoder

    @abstractmethod
    def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        """What the loss needs of a batch: augmented, masked, cropped; batched, on the batch's device.

        Args:
            batch: Crops with their validity; `valid` is False on padding, which must reach no loss and no statistic.
            random: Draws keyed by (seed, step, sample). The engine keys validation so that every epoch sees the same.
            train: False in validation: no augmentation, though masks are still drawn.

        Returns:
            Tensors whose first dimension is the batch, by names of the task's own choice.
        """

    @abstractmethod
    def forward(self, views: Views) -> StepOutput:
        """The loss of what `views` gave, with metrics and pictures."""

    def begin(self, batches: Iterable[tuple[Batch, SampleRandom]]) -> None:
        """Called once before the first step, without gradient: what is to be known of the data before learning begins.

        Not called where `first_look` is 0, and not on resuming. What is found goes to buffers.

        Args:
            batches: Training batches of this rank, on the device, with their draws; on all ranks together they show
                `first_look` cases or more.
        """

    def after_step(self, step: int, total: int) -> None:
        """Called once after every optimiser step, without gradient: teachers, centres, temperature schedules.

        Args:
            step: The step just taken, from 0.
            total: Optimiser steps of the whole run.
        """

    def respond(self, response: Response) -> str:
        """Turns a knob because the collapse monitor asks for it; all that changes is state in buffers, so it is saved.

        Returns:
            What was changed, in words for the log; empty where the task has no such knob, or it is at its end.
        """
        return ""

    def predictor(self) -> Mapping[str, torch.Tensor]:
        """What of the state, by its names there, it takes beside the exported encoder to make this task's predictions.

        Checkpoints keep it. Empty where nobody asks for predictions.
        """
        return {}

    def sham(self, views: Views, random: SampleRandom) -> Views:
        """The views with their targets destroyed and all else alike, for control runs that must learn nothing.

        What is restored belongs to another case, positives come from other cases, classes are drawn anew.
        `views.sham` has the tools.

        Raises:
            ValueError: Where the method has no sham.
        """
        raise ValueError(f"{type(self).__name__} cannot be trained as a sham: it does not say what its targets are.")

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of the parameter of that name: layer-wise decay, a slow patch embedding."""
        return 1.0

    @property
    def exported_encoder(self) -> Encoder:
        """The encoder that `export_network` hands on: `encoder`, or a teacher's copy of it."""
        return self.encoder

    def export_network(self) -> nn.Module:
        """The full segmentation network in nnU-Net's own key names, holding what was learned.

        The encoder, and a U-Net's `decoder` where it is trained, share their memory with the task's; the rest is
        freshly initialised, the same every time.
        """
        decoder = self.get_submodule("decoder") if self.trains_decoder else None
        return export_network(self.configuration, self.exported_encoder, decoder)


@dataclass(frozen=True, kw_only=True)
class PretrainTrainer:
    """A task plus the recipe it is trained with. An instance is a resolved recipe, and `config.json` holds it.

    A subclass names its task and cost and assigns the settings that differ, without repeating their types:

        @TRAINERS.register
        class OurTrainer(PretrainTrainer):
            task = OurTask
            cost = StepCost(views=1, copies=1, decoder=True)
            optim = OptimConfig(name="sgd", lr=1e-2)
    """

    task: ClassVar[type[PretextTask]]
    cost: ClassVar[StepCost]
    """What a step holds in memory, for the planner."""
    vit: ClassVar[Mapping[str, Any]] = {}
    """Settings whose defaults are others where the plan's backbone is a transformer."""

    task_config: Any = None
    """The task's own settings; `--set` reaches them without a prefix."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    num_epochs: int = 1000
    """Epochs of the run, 1 or more."""
    steps_per_epoch: int = 250
    """Optimiser steps of an epoch, 1 or more. nnU-Net's number."""
    val_steps_per_epoch: int = 50
    """Validation batches at the end of an epoch, 1 or more. nnU-Net's number."""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimiser step, 1 or more."""
    val_fraction: float = 0.1
    """Share of the patients held out for validation, in (0, 1)."""
    min_foreground: float = 0.5
    """Share of a training crop that should be foreground, in [0, 1]; degrades gracefully on small or sparse cases."""
    sampling_weights: Literal["uniform", "dataset", "modality"] | dict[str, float] = "uniform"
    """How often training shows a case: `uniform` all cases, `dataset` all datasets, `modality` all modalities equally
    often, or a weight of 0 or more for each dataset or modality that is named; the others weigh 1. Within a group every
    case is shown equally often. Validation is uniform."""
    crops_per_case: int = 1
    """Consecutive training samples that show one case, 1 or more. Those in one batch open its file once, which pays
    where opening is slow (network storage, small patches); batches become less diverse, and tasks that contrast samples
    get negatives of the same patient."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """When the monitor of collapse sounds, and what it does."""
    sham: bool = False
    """Whether the targets are destroyed, for a control run that shows what optimiser and data do without the task."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the subclass a dataclass whose plain assignments are the fields' new defaults."""
        super().__init_subclass__(**kwargs)
        annotations = inspect.get_annotations(cls)
        for inherited in dataclasses.fields(PretrainTrainer):
            if inherited.name in cls.__dict__:
                annotations.setdefault(inherited.name, inherited.type)
        if "task_config" not in cls.__dict__:
            cls.task_config = cls.task.Config()
        annotations["task_config"] = cls.task.Config
        cls.__annotations__ = annotations
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        at_least(self, num_epochs=1, steps_per_epoch=1, val_steps_per_epoch=1, accumulate=1, crops_per_case=1)
        within(self, "(0, 1)", "val_fraction", note=": validation needs held-out patients")
        within(self, "[0, 1]", "min_foreground")
        if self.sham and self.crops_per_case > 1:
            raise ValueError(
                f"crops_per_case={self.crops_per_case} does not go with a sham: the other case that it takes its "
                "targets from would be the same one. Leave crops_per_case at 1."
            )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.num_epochs * self.steps_per_epoch

    @property
    def papers(self) -> dict[str, str]:
        """What to cite for weights that it trained: names of methods and where they were published."""
        return {type(self).__name__: self.task.info.paper}

    def step_cost(self, configuration: Configuration) -> StepCost:
        """What a step holds in memory with these settings; `cost` is that of the default ones."""
        return self.cost

    def build_task(self, configuration: Configuration, num_cases: int) -> PretextTask:
        """The task on the plan's backbone, initialised from torch's global generator.

        Raises:
            ValueError: Where the task does not run on that backbone or patch size.
        """
        if configuration.backbone not in self.task.info.encoders:
            kinds = " or ".join(sorted(self.task.info.encoders))
            raise ValueError(
                f"{type(self).__name__} runs on a {kinds}, and configuration {configuration.name!r} plans a "
                f"{configuration.backbone}. Plan another network: nnssl_plan_experiment -d DATASET -pl PLANNER"
            )
        return self.task(self.task_config, configuration, num_cases)

    @classmethod
    def configured(cls: type[TrainerT], overrides: Sequence[str] = (), backbone: str = "cnn") -> TrainerT:
        """The recipe with `name=value` settings applied, as `--set` takes them.

        A name is a field of the recipe (`num_epochs`, `optim.lr`) or of the task's config (`mask_ratio`).

        Args:
            overrides: The settings.
            backbone: Kind of the plan's network, `cnn` or `vit`; it decides the defaults.

        Raises:
            ValueError: If a name is unknown or a value does not fit; the message lists the valid names.
        """
        own = {setting.name for setting in dataclasses.fields(cls)} - {"task_config"}
        of_task = {setting.name for setting in dataclasses.fields(cls.task.Config)}
        paths = []
        for override in overrides:
            name = override.split("=")[0].strip().split(".")[0]
            if "=" in override and name not in own | of_task:
                raise ValueError(
                    f"{cls.__name__} has no setting {name!r}. Valid: {', '.join(sorted(of_task))} (task); "
                    f"{', '.join(sorted(own))} (recipe). See nnssl_train -tr {cls.__name__} --describe."
                )
            paths.append(f"task_config.{override}" if name in of_task else override)
        try:
            return apply_overrides(cls(**cls.vit) if backbone == "vit" else cls(), paths)
        except ValueError as error:
            raise ValueError(str(error).replace("task_config.", "")) from error  # which is not to be typed


TRAINERS: Registry[type[PretrainTrainer]] = Registry("trainer", "nnssl_ext.trainers")
"""Every trainer by name. The modules of `nnssl_ext.trainers` are imported when a name is first asked for."""
