"""Trainers as resolved recipes: defaults, overrides, and what is refused."""

from dataclasses import dataclass, field

import pytest

from nnssl_ext.core.records import describe, from_dict, to_dict
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.task import PretextTask, PretrainTrainer, TaskInfo
from nnssl_ext.planners.rules import StepCost


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 2
    """How deep."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    width: float = 0.5
    """How wide."""
    inner: Inner = field(default_factory=Inner)
    """More of it."""


class ToyTask(PretextTask):
    Config = ToyConfig
    info = TaskInfo(idea="nothing", paper="none", encoders={"cnn"})


class ToyTrainer(PretrainTrainer):
    task = ToyTask
    cost = StepCost(views=2)
    optim = OptimConfig(name="adamw", lr=3e-4)
    num_epochs = 7


class WideTrainer(PretrainTrainer):
    task = ToyTask
    cost = StepCost()
    task_config = ToyConfig(width=0.9)


def test_assignments_become_defaults_and_the_rest_is_inherited():
    trainer = ToyTrainer()
    assert (trainer.optim.lr, trainer.num_epochs, trainer.steps_per_epoch) == (3e-4, 7, 250)
    assert trainer.total_steps == 7 * 250
    assert trainer.task_config == ToyConfig()
    assert WideTrainer().task_config.width == 0.9
    assert (WideTrainer().num_epochs, WideTrainer().optim) == (1000, OptimConfig())


def test_a_sham_takes_one_crop_of_a_case():
    """Fault: crops of one case fill the batch, so the sham's targets come from the same case and can be learned."""
    with pytest.raises(ValueError, match=r"crops_per_case=2 does not go with a sham.*Leave crops_per_case at 1"):
        ToyTrainer.configured(["sham=true", "crops_per_case=2"])
    assert ToyTrainer.configured(["crops_per_case=2"]).crops_per_case == 2
    assert ToyTrainer.configured(["sham=true"]).sham


def test_overrides_reach_recipe_and_task():
    trainer = ToyTrainer.configured(["width=0.25", "inner.depth=5", "optim.lr=1e-3", "num_epochs=3"])
    assert trainer.task_config == ToyConfig(width=0.25, inner=Inner(depth=5))
    assert (trainer.optim.lr, trainer.optim.name, trainer.num_epochs) == (1e-3, "adamw", 3)
    assert ToyTrainer().task_config == ToyConfig()


def test_a_recipe_survives_json():
    trainer = ToyTrainer.configured(["inner.depth=5", "accumulate=2"])
    assert from_dict(ToyTrainer, to_dict(trainer)) == trainer


def test_settings_are_described():
    rows = {row.name: row for row in describe(ToyTrainer())}
    assert rows["task_config.inner.depth"].doc == "How deep."
    assert rows["num_epochs"].default == 7
    assert all(row.doc for row in rows.values())


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"ToyTrainer has no setting 'with'\. Valid: inner, width \(task\); accumulate, "
    ):
        ToyTrainer.configured(["with=0.2"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_epochs", "not of the form name=value"),
        ("width=wide", "^overrides: width: "),
        ("num_epochs=0", "num_epochs=0 must be 1 or more"),
        ("accumulate=0", "accumulate=0 must be 1 or more"),
        ("val_fraction=1", r"val_fraction=1\.0 must lie in \(0, 1\)"),
        ("min_foreground=2", r"min_foreground=2\.0 must lie in \[0, 1\]"),
    ],
)
def test_bad_values_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        ToyTrainer.configured([override])
