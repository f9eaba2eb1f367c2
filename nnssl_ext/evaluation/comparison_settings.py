"""What a comparison of methods is asked for: its budget, and how each method is pretrained, probed and fine-tuned.

A settings file is JSON:

    {"pretraining": {"*": {"patch_size": [32, 40, 24], "settings": ["optim.name=adamw"]}, "DINO*": {"batch_size": 6}},
     "finetuning": {"settings": ["num_epochs=6", "iterations_per_epoch=50"]},
     "probe": {"num_pool": 20}}

Beneath `pretraining` stand patterns of trainers' names. All that match a trainer apply, in the order of the file:
`settings` and `settings_if_known` add up, everything else is replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from nnssl_ext.core.records import from_dict, read_json
from nnssl_ext.downstream.probing import ProbeConfig
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer
from nnssl_ext.evaluation.folds import check_choices
from nnssl_ext.evaluation.records import NumTrain

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
STEPS_PER_EPOCH = 250
"""Longest epoch; nnU-Net's number."""
MIN_EPOCHS = 5
"""Shorter runs have shorter epochs, so that their curves have this many points."""
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)|(\d+)(?:steps)?")

Sham = Literal["no", "probe", "finetune"]


@dataclass(frozen=True)
class Budget:
    """What every method may spend on one pretraining run: steps, or time from which the steps are measured once."""

    text: str
    steps: int | None
    seconds: float | None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `500`, `500steps`, `90s`, `10min` or `1.5h`.

        Raises:
            ValueError: If it is none of these, or nothing.
        """
        found = _BUDGET.fullmatch(text)
        amount = float(found[1] or found[3]) if found else 0.0
        if found is None or amount == 0:
            raise ValueError(
                f"budget {text!r} is not possible: give steps, such as 500, or time, such as 90s, 10min, 2h"
            )
        if found[2]:
            return cls(text, None, amount * SECONDS[found[2]])
        return cls(f"{int(amount)}steps", int(amount), None)

    def num_steps(self, seconds_per_step: float) -> int:
        """Steps that it buys, at least one."""
        return self.steps if self.seconds is None else max(1, math.floor(self.seconds / seconds_per_step))  # type: ignore[return-value]


def epochs_of(steps: int) -> tuple[int, int]:
    """Epochs of a run and steps of each; their product exceeds no budget, and misses it by less than an epoch's share.

    Epochs are up to `STEPS_PER_EPOCH` long, and there are `MIN_EPOCHS` or more where there are as many steps.
    """
    num_epochs = min(steps, max(MIN_EPOCHS, math.ceil(steps / STEPS_PER_EPOCH)))
    return num_epochs, steps // num_epochs


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one method is pretrained."""

    plans: str = "nnsslPlans"
    """Plans of the pretraining dataset."""
    configuration: str = "3d_fullres"
    """Configuration of the plans."""
    patch_size: tuple[int, ...] | None = None
    """Voxels z y x; None: the plans'."""
    batch_size: int | None = None
    """Samples per step; None: the plans'."""
    transformer: str | None = None
    """A size of `planners.primus.PRIMUS_SIZES`, such as XS, that takes the place of the plans' network."""
    token: tuple[int, ...] | None = None
    """Voxels of that transformer's token; None: by the spacing."""
    steps: int | None = None
    """Optimiser steps instead of the budget's; the report then says that budgets are not equal."""
    settings: tuple[str, ...] = ("val_steps_per_epoch=10",)
    """Settings of the method, as `nnssl_train --set` takes them."""
    settings_if_known: tuple[str, ...] = ()
    """The same, for those methods alone that have such a setting by themselves, not in tasks that they join."""
    transfer: Literal["auto", "encoder", "encoder_decoder"] = "auto"
    """Weights that fine-tuning takes over; `auto`: the decoder too where the method has trained it."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more; leave it out for those of the budget")

    def with_changes(self, changes: Mapping[str, Any], where: str) -> Protocol:
        """With the values of a settings file; lists of settings add up.

        Raises:
            ValueError: If a name is unknown or a value does not fit.
        """
        lists = [name for name in ("settings", "settings_if_known") if isinstance(changes.get(name), list)]
        added = {name: [*getattr(self, name), *changes[name]] for name in lists}
        return from_dict(Protocol, {**asdict(self), **changes, **added}, where)

    def resolved(self, trainer: type[PretrainTrainer]) -> Protocol:
        """With the settings that the trainer knows, and no conditional ones."""
        known = {setting.name for setting in (*fields(trainer), *fields(trainer.task.Config))}
        kept = (text for text in self.settings_if_known if re.split(r"[.=]", text, maxsplit=1)[0].strip() in known)
        return replace(self, settings=(*self.settings, *kept), settings_if_known=())


@dataclass(frozen=True, kw_only=True)
class FinetuningProtocol:
    """How all arms are fine-tuned."""

    mode: Literal["like_pretrained", "default_nnunet", "no_resample"] = "like_pretrained"
    """How images are prepared, see `nnssl_plan_finetuning -m`."""
    patch_size: tuple[int, ...] | None = None
    """Voxels; None: that of the plans that the first method was pretrained with, for all arms."""
    batch_size: int | None = None
    """Samples per step; None: 2 in 3D and 12 in 2D."""
    settings: tuple[str, ...] = ()
    """Settings of every arm, the one from scratch included, as `nnssl_plan_finetuning --set` takes them."""


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """How frozen features are probed: on the first of the folds, learned from its training cases."""

    num_pool: int = 20
    """Training cases that subsets are drawn from, at most."""
    num_test: int = 30
    """Validation cases that are scored, at most."""
    patch_size: tuple[int, ...] | None = None
    """Windows in which a U-Net's features are computed, whatever its patch was; None: those of fine-tuning."""
    config: ProbeConfig = field(default_factory=lambda: ProbeConfig(neighbours=0))
    """The probe itself."""

    def __post_init__(self) -> None:
        if self.num_test < 2 or self.num_pool < self.config.num_labelled:
            raise ValueError(
                f"a probe needs 2 test cases and {self.config.num_labelled} to learn from (given: num_test="
                f"{self.num_test}, num_pool={self.num_pool})"
            )


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """A whole comparison."""

    dataset: int | str
    """Id or name of the labelled dataset."""
    trainers: tuple[str, ...]
    """Methods."""
    budget: Budget
    """Of each pretraining run."""
    pretrain_dataset: int | str | None = None
    """Id or name of the preprocessed dataset without labels; None: the only other one with plans for pretraining."""
    protocols: Mapping[str, Protocol] = field(default_factory=dict)
    """By trainer."""
    finetuning: FinetuningProtocol = field(default_factory=FinetuningProtocol)
    probe: ProbeProtocol = field(default_factory=ProbeProtocol)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a pretraining of every method, and the seed of its fine-tuning."""
    folds: tuple[int, ...] = ()
    num_train: tuple[NumTrain, ...] = ("all",)
    fractions: tuple[float, ...] = ()
    sham: Sham = "no"
    """Whether control runs with destroyed targets are pretrained and probed, or fine-tuned as well."""
    splits: Path | None = None
    """JSON of folds; None: those of `splits_final.json`."""
    name: str | None = None
    """Name of the results' folder; None: made from the budget."""

    def __post_init__(self) -> None:
        if len(set(self.trainers)) != len(self.trainers) or not self.trainers:
            raise ValueError(
                f"-tr must name one or more different methods (given: {' '.join(self.trainers) or 'none'})"
            )
        for trainer in self.trainers:
            TRAINERS.get(trainer)
        check_choices(self.folds, self.num_train, self.seeds)

    def protocol(self, trainer: str) -> Protocol:
        """How a method is pretrained."""
        return self.protocols.get(trainer, Protocol())

    @property
    def folder_name(self) -> str:
        """Name of the results' folder."""
        return self.name or f"compare-{self.budget.text}"


def has_sham(trainer: str) -> bool:
    """Whether a method says what its targets are, so that they can be destroyed."""
    return TRAINERS.get(trainer).task.sham is not PretextTask.sham


def read_settings(path: Path | None, trainers: tuple[str, ...]) -> dict[str, Any]:
    """The parts of `ComparisonSettings` that a settings file gives: `protocols`, `finetuning` and `probe`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a part, a name or a value is not known, or a pattern matches no method.
    """
    content = {} if path is None else read_json(path)
    parts = {"pretraining", "finetuning", "probe"}
    if not isinstance(content, Mapping) or not parts >= set(content):
        raise ValueError(f"{path} must hold nothing but {', '.join(sorted(parts))} (docs/comparison.md)")
    patterns = content.get("pretraining", {})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in TRAINERS.names()):
            raise ValueError(f"{path}: no method matches {pattern!r}. Valid: {', '.join(TRAINERS.names())}")
    protocols = {}
    for trainer in trainers:
        protocol = Protocol()
        for pattern, changes in patterns.items():
            if fnmatchcase(trainer, pattern):
                protocol = protocol.with_changes(changes, f"{path}, {pattern}")
        protocols[trainer] = protocol.resolved(TRAINERS.get(trainer))
    return {
        "protocols": protocols,
        "finetuning": from_dict(FinetuningProtocol, content.get("finetuning", {}), f"{path}, finetuning"),
        "probe": from_dict(ProbeProtocol, content.get("probe", {}), f"{path}, probe"),
    }
