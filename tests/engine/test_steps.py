"""Single steps: schedule, clipping, what is not finite, reseeding, several names of precision."""

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from nnssl_ext.engine.device import loss_scaler, resolve_precision
from nnssl_ext.engine.distributed import World, any_rank, current_world, gather, mean_over_ranks
from nnssl_ext.engine.optim import OptimConfig
from nnssl_ext.engine.schedules import ScheduleConfig
from nnssl_ext.engine.steps import MAX_SKIPPED_STEPS, Stepper, centre
from nnssl_ext.engine.task import PretextTask, PretrainTrainer, StepOutput, TaskInfo
from nnssl_ext.loading.batch import Batch
from nnssl_ext.planners.rules import StepCost


class Line(nn.Module):
    strides = ((1, 1, 1),)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)

    def feature_maps(self, x):
        return [self.conv(x)]


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    scale: float = 1.0
    """Factor on the loss."""


class Toy(PretextTask):
    """The mean of the features' squares, with dropout, which uses torch's own generator."""

    Config = NoSettings
    info = TaskInfo(idea="toy", paper="none", encoders={"cnn"})

    def __init__(self, config, configuration, num_cases):
        super().__init__(config, configuration, num_cases)
        self.encoder = Line()
        self.steps_seen = []

    def views(self, batch, random, train):
        return {"x": batch.data, "noise": torch.from_numpy(random.normal("noise"))}

    def forward(self, views):
        features = nn.functional.dropout(self.encoder.feature_maps(views["x"])[0], 0.5, self.training)
        loss = self.config.scale * features.float().square().mean()
        return StepOutput(loss=loss, metrics={"noise": views["noise"].mean()})

    def after_step(self, step, total):
        self.steps_seen.append((step, total))

    def export_network(self):
        return self.encoder


class ToyTrainer(PretrainTrainer):
    task = Toy
    cost = StepCost()
    optim = OptimConfig(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)
    num_epochs = 2
    steps_per_epoch = 5


def batch_of(value: float = 1.0, first: int = 0) -> Batch:
    return Batch(
        data=torch.full((2, 1, 4, 4, 4), value),
        valid=torch.ones(2, 1, 4, 4, 4, dtype=torch.bool),
        cases=("a", "b"),
        samples=(first, first + 1),
        lower=torch.zeros(2, 3, dtype=torch.int64),
        spacing=torch.ones(2, 3),
    )


@pytest.fixture
def make_stepper(tiny_plan):
    def make(precision: str = "fp32", **changes: object) -> Stepper:
        trainer = replace(ToyTrainer(), **changes)
        torch.manual_seed(0)
        task = trainer.build_task(tiny_plan((4, 4, 4)).configuration("3d_fullres"), 4)
        world, device = World(), torch.device("cpu")
        return Stepper(task, trainer, device=device, world=world, seed=0, precision=precision)

    return make


def weights(stepper: Stepper) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in stepper.parameters]).clone()


def test_the_schedule_moves_per_optimiser_step(make_stepper):
    stepper = make_stepper(schedule=ScheduleConfig(name="poly"))
    rates = [stepper.train_step([batch_of()], step)["lr"] for step in (0, 5, 9)]
    assert rates == pytest.approx([0.1, 0.1 * 0.5**0.9, 0.1 * 0.1**0.9])
    assert stepper.task.steps_seen == [(0, 10), (5, 10), (9, 10)]


def test_a_step_is_the_optimisers_formula_after_clipping(make_stepper):
    optim = replace(ToyTrainer().optim, clip=1e-3)
    stepper = make_stepper(optim=optim)
    before = weights(stepper)
    values = stepper.train_step([batch_of()], 0)
    assert values["gradient_norm"] > 1e-3
    assert (weights(stepper) - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_without_clipping_the_step_is_as_long_as_the_gradient(make_stepper):
    stepper = make_stepper(optim=replace(ToyTrainer().optim, clip=0.0))
    before = weights(stepper)
    values = stepper.train_step([batch_of(50.0)], 0)
    assert values["gradient_norm"] > 12
    assert (weights(stepper) - before).norm().item() == pytest.approx(0.1 * values["gradient_norm"], rel=1e-4)


def test_dropout_depends_on_the_step_alone(make_stepper):
    losses = []
    for burn in (0, 17):
        stepper = make_stepper()
        torch.rand(burn)
        losses.append([stepper.train_step([batch_of()], step)["loss"] for step in (0, 1)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_one_step_that_is_not_finite_is_skipped_and_named(make_stepper, caplog):
    stepper = make_stepper()
    before = weights(stepper)
    stepper.train_step([batch_of(float("nan"))], 0)
    assert torch.equal(weights(stepper), before)
    assert "a, b" in caplog.text
    stepper.train_step([batch_of()], 1)
    assert not torch.equal(weights(stepper), before)
    assert stepper.skipped_in_a_row == 0


def test_several_in_a_row_end_the_run_with_advice(make_stepper):
    stepper = make_stepper()
    for step in range(MAX_SKIPPED_STEPS - 1):
        stepper.train_step([batch_of(float("inf"))], step)
    with pytest.raises(ValueError, match=r"diverged.*optim\.lr=0\.05"):
        stepper.train_step([batch_of(float("inf"))], MAX_SKIPPED_STEPS - 1)


def test_fp16_scales_the_loss_and_unscales_the_gradient(make_stepper):
    small = NoSettings(scale=0.01)
    full, half = make_stepper(task_config=small), make_stepper("fp16", task_config=small)
    assert half.scaler.get_scale() > 1
    expected, values = full.train_step([batch_of()], 0), half.train_step([batch_of()], 0)
    assert values["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-2)
    assert torch.allclose(weights(half), weights(full), atol=1e-3)


def test_an_overflow_under_fp16_is_no_divergence(make_stepper):
    stepper = make_stepper("fp16", task_config=NoSettings(scale=1e4))
    before, scale = weights(stepper), stepper.scaler.get_scale()
    stepper.train_step([batch_of(5.0)], 0)
    assert torch.equal(weights(stepper), before)
    assert stepper.scaler.get_scale() == scale / 2
    assert stepper.skipped_in_a_row == 0


def test_the_optimisers_state_survives_a_round_trip(make_stepper):
    optim = replace(ToyTrainer().optim, momentum=0.9)
    first = make_stepper(optim=optim)
    for step in range(3):
        first.train_step([batch_of()], step)
    second = make_stepper(optim=optim)
    second.task.load_state_dict(first.task.state_dict())
    second.load_state(deepcopy(first.state()))
    results = [stepper.train_step([batch_of()], 3) for stepper in (first, second)]
    assert results[0] == results[1]
    assert torch.equal(weights(first), weights(second))


def test_a_compiled_task_computes_the_same(make_stepper, monkeypatch, tiny_plan):
    plain = make_stepper()
    original = torch.compile
    compiled = []

    def eager(module):
        compiled.append(module)
        return original(module, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    trainer = ToyTrainer()
    torch.manual_seed(0)
    task = trainer.build_task(tiny_plan((4, 4, 4)).configuration("3d_fullres"), 4)
    device, world = torch.device("cpu"), World()
    other = Stepper(task, trainer, device=device, world=world, seed=0, precision="fp32", compile_task=True)
    values = [stepper.train_step([batch_of()], 0) for stepper in (plain, other)]
    assert compiled == [task]
    assert values[1] == pytest.approx(values[0])
    assert set(task.state_dict()) == set(plain.task.state_dict())


def test_channels_last_concerns_images_and_kernels_alone(tiny_plan):
    task = ToyTrainer().build_task(tiny_plan((4, 4, 4)).configuration("3d_fullres"), 4)
    task.position = nn.Parameter(torch.zeros(1, 2, 3, 4))
    device, world = torch.device("cpu"), World()
    Stepper(task, ToyTrainer(), device=device, world=world, seed=0, precision="fp32", channels_last=True)
    assert task.encoder.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert task.position.is_contiguous()


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert not loss_scaler("bf16", cpu).is_enabled()
    with pytest.raises(ValueError, match="auto, bf16, fp16 or fp32"):
        resolve_precision("int8", cpu)  # type: ignore[arg-type]


def test_a_single_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert current_world() == World(rank=0, size=1, local_rank=0)
    values = torch.tensor([1.0, 2.0])
    assert mean_over_ranks(values) is values
    assert gather("x") == ["x"]
    assert any_rank(True, torch.device("cpu"))


def test_torchruns_environment_is_read(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    world = current_world()
    assert world == World(rank=5, size=8, local_rank=1)
    assert not world.main


def test_the_centre_of_a_larger_crop_is_what_a_patch_sees():
    crop = torch.arange(2 * 6 * 5).reshape(1, 2, 6, 5)
    assert torch.equal(centre(crop, (4, 5)), crop[:, :, 1:5])
    assert torch.equal(centre(crop, (6, 5)), crop)
