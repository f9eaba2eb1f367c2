"""What holds for every method, whatever it is: one set of tests for all registered trainers, in 2D and in 3D.

Networks and crops are tiny, so a method says nothing about its merit here: only that it is built, that it learns, that
it goes on where it stopped, and that nnU-Net takes what it made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import apply_overrides, describe
from nnssl_ext.engine.checkpoint import build_checkpoint, load_checkpoint, save_checkpoint
from nnssl_ext.engine.optim import OptimConfig, build_optimizer, parameter_groups
from nnssl_ext.engine.task import TRAINERS, PretextTask, PretrainTrainer, StepOutput
from nnssl_ext.loading.batch import Batch
from nnssl_ext.planners.plan import Plan
from nnssl_ext.views.tokens import hidden_voxels

PATCHES = {2: (24, 16), 3: (16, 24, 8)}
SMALL = {"block_size": 4, "decoder_depth": 2, "margin": 2.0, "positions": 64}
"""Settings that fit a method to so small a patch, or to cases so unlike, for those that have them."""
NUM_CASES = 4
GRADIENT_STEPS = 20
LEARNING_STEPS = 40
TAKEN, DRAWN = {"target", "classes", "partner"}, {"turns", "order", "place"}
"""Views that a sham takes from another sample, and that it draws anew."""
STILL = [
    f"{name}=0" for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "inverted_gamma")
]
STRONG = [change for name in ("brightness", "contrast", "gamma") for change in (f"{name}=1", f"{name}_range=[3,3]")]
"""No change of intensity, and those that CT must not undergo."""
INTENSITIES = {
    name: setting
    for name in TRAINERS.names()
    for setting in ("intensity", "crops.intensity")
    if setting.split(".")[0] in {each.name for each in fields(TRAINERS.get(name).task.Config)}
}
"""The setting that says how intensities change, of the methods that have one."""
SEE_ALL = ("Inpainting", "ModelsGenesis", "PixelClustering", "Registration", "VolumeFusion")
"""Methods that show a transformer every token without padding, wherever padding lies."""
NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)

PLANS = {"cnn": "tiny_plan", "vit": "tiny_vit_plan"}
"""The fixture that plans each kind of backbone."""
METHODS = [(name, kind) for name in TRAINERS.names() for kind in sorted(TRAINERS.get(name).task.info.encoders)]


@pytest.fixture(params=METHODS, ids="-".join)
def method(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def trainer(method: tuple[str, str]) -> PretrainTrainer:
    cls = TRAINERS.get(method[0])
    names = {setting.name for setting in fields(cls.task.Config)}
    small = [f"{name}={value}" for name, value in SMALL.items() if name in names]
    return cls.configured([*small, "num_epochs=2", f"steps_per_epoch={LEARNING_STEPS // 2}"], method[1])


@pytest.fixture(params=sorted(PATCHES), ids=lambda dims: f"{dims}d")
def plan(request, method: tuple[str, str]) -> Plan:
    channels = TRAINERS.get(method[0]).task.info.needs.channels
    return request.getfixturevalue(PLANS[method[1]])(PATCHES[request.param], channels)


def build(trainer: PretrainTrainer, plan: Plan, seed: int = 0) -> PretextTask:
    torch.manual_seed(seed)
    (name,) = plan.configuration_names
    return trainer.build_task(plan.configuration(name), NUM_CASES)


def make_batch(task: PretextTask, step: int = 0) -> Batch:
    """What the task asks for: smooth crops of different cases, each a wave of its own; the last is partly padding.

    Co-registered images of one session show one wave, moved along by a phase.
    """
    configuration, needs = task.configuration, task.needs
    rows = configuration.batch_size * needs.images
    size = [round(edge * task.parent_scale) for edge in configuration.patch_size]
    grid = torch.stack(torch.meshgrid(*(torch.arange(edge) / 4 for edge in size), indexing="ij")).sum(0)
    samples = tuple(range(step * rows, (step + 1) * rows))
    shared = needs.images if needs.same == "session" else 1
    waves = [grid * (1 + sample // shared % NUM_CASES) / 2 + sample % shared for sample in samples]
    phases = torch.arange(configuration.num_input_channels).view(-1, *[1] * len(size))
    data = torch.stack([torch.sin(wave + phases) for wave in waves])
    valid = torch.ones(len(samples), 1, *size, dtype=torch.bool)
    valid[-1, :, -3:] = False
    spacing = torch.tensor(configuration.spacing).expand(len(samples), -1)
    return Batch(
        data=data * valid,
        valid=valid,
        cases=tuple(f"case{sample % NUM_CASES}" for sample in samples),
        samples=samples,
        lower=torch.zeros(len(samples), len(size), dtype=torch.int64),
        spacing=spacing,
    )


def forward(task: PretextTask, batch: Batch, step: int, train: bool) -> StepOutput:
    torch.manual_seed(step)  # dropped paths
    random = SampleRandom(seed=1, step=step, samples=batch.samples)
    with torch.no_grad():
        views = task.train(train).views(batch, random, train)
    return task(views)


class Loop:
    """The least that trains a task: what the engine does, without its comforts."""

    def __init__(self, task: PretextTask, trainer: PretrainTrainer) -> None:
        self.task, self.total = task, trainer.total_steps
        self.optimizer = build_optimizer(
            parameter_groups(task.named_parameters(), trainer.optim, task.lr_scale), trainer.optim
        )

    def step(self, step: int, batch: Batch, draws: int | None = None) -> StepOutput:
        output = forward(self.task, batch, step if draws is None else draws, train=True)
        self.optimizer.zero_grad()
        output.loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.task.after_step(step, self.total)
        return output

    def state(self) -> dict[str, Any]:
        return {"task": self.task.state_dict(), "optimizer": self.optimizer.state_dict()}


def conv_biases_before_norms(module: nn.Module) -> Iterator[nn.Parameter]:
    """Biases that the next layer, a norm over positions, takes out again: their true gradient is 0."""
    for child in module.modules():
        layers = list(child.children()) if isinstance(child, nn.Sequential) else []
        for layer, following in pairwise(layers):
            if isinstance(following, NORMS) and getattr(layer, "bias", None) is not None:
                yield layer.bias


def test_settings_and_idea_are_documented(trainer):
    assert type(trainer).__doc__
    assert trainer.task.info.idea
    assert trainer.task.info.paper
    assert trainer.task.info.encoders <= {"cnn", "vit"}
    assert all(row.doc for row in describe(trainer))


@pytest.mark.parametrize("name", TRAINERS.names())
def test_every_number_set_refuses_nan(name):
    """Catches a setting that is checked by `value < least`, or not at all: NaN passes, and the run learns nothing."""
    records = [TRAINERS.get(name)()]
    for record in records:
        records += [value for value in vars(record).values() if is_dataclass(value)]
        for setting, hint in get_type_hints(type(record)).items():
            value = getattr(record, setting)
            if "float" in str(hint) and not isinstance(value, Mapping | str):
                several = value if isinstance(value, tuple) else (value,)
                for place in range(len(several)):
                    bad = (*several[:place], math.nan, *several[place + 1 :])
                    with pytest.raises(ValueError, match=f"{setting}=.*nan"):
                        replace(record, **{setting: bad if isinstance(value, tuple) else math.nan})


def test_encoder_is_found_by_name(trainer, plan):
    """Optimisers tell the encoder's parameters by their names, so it has to be assigned first."""
    task = build(trainer, plan)
    named = {name for name, parameter in task.named_parameters() if name.startswith("encoder.")}
    assert len(named) == len(list(task.encoder.parameters())) > 0


def test_loss_is_finite_and_what_is_logged_carries_no_gradient(trainer, plan):
    task = build(trainer, plan)
    for train in (True, False):
        output = forward(task, make_batch(task), step=0, train=train)
        assert output.loss.shape == ()
        assert torch.isfinite(output.loss)
        for values in (output.metrics, output.images or {}):
            assert all(torch.isfinite(value).all() and not value.requires_grad for value in values.values())
        assert all(value.ndim == task.configuration.dims + 2 for value in (output.images or {}).values())


@pytest.mark.parametrize("plan", [2], ids=["2d"], indirect=True)
def test_the_loss_is_float32_in_a_pass_in_half_precision(trainer, plan):
    """Fails if a loss is left to autocast, or a task mixes types that do not mix."""
    task = build(trainer, plan)
    batch = make_batch(task)
    views = task.views(batch, SampleRandom(seed=1, step=0, samples=batch.samples), train=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(views).loss
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_chance_stands_beside_its_metric(trainer, plan):
    task = build(trainer, plan)
    metrics = forward(task, make_batch(task), step=0, train=False).metrics
    assert all(name.removesuffix("_chance") in metrics for name in metrics)


def test_same_draws_give_the_same_loss_and_other_draws_another(trainer, plan):
    task = build(trainer, plan)
    batch = make_batch(task)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    first, second = (forward(task, batch, step=3, train=False).loss for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert not torch.equal(first, forward(task, batch, step=4, train=False).loss)


@pytest.mark.parametrize("train", [True, False], ids=["train", "validation"])
def test_padding_has_no_influence(trainer, plan, train):
    task = build(trainer, plan)
    batch = make_batch(task)
    spoilt = replace(batch, data=torch.where(batch.valid, batch.data, 1e4))
    other = deepcopy(task)  # a pass in training may fill queues
    losses = [forward(*each, step=0, train=train).loss for each in ((task, batch), (other, spoilt))]
    assert torch.equal(*losses)


@pytest.mark.parametrize("method", [(f"{name}Trainer", "vit") for name in SEE_ALL], ids="-".join, indirect=True)
@pytest.mark.parametrize("plan", [2], ids=["2d"], indirect=True)
def test_a_transformer_is_asked_for_no_voxel_that_it_did_not_see(trainer, plan):
    """Catches targets in tokens that hold padding, which are dropped: no input tells what stands there."""
    task = build(trainer, plan).eval()
    batch = make_batch(task)
    batch.valid[:, :, 9:] = False  # no view fits in
    views = task.views(batch, SampleRandom(seed=1, step=0, samples=batch.samples), False)
    asked = views.get("asked", views["valid"]).reshape(-1, 1, *task.configuration.patch_size)
    unseen = hidden_voxels(views["kept"], task.encoder.token_size, task.configuration.patch_size)
    assert asked.any()
    assert unseen.any()
    assert not (asked & unseen).any()


@pytest.mark.parametrize(
    "method", [row for row in dict(METHODS).items() if row[0] in INTENSITIES], ids="-".join, indirect=True
)
@pytest.mark.parametrize("plan", [2], ids=["2d"], indirect=True)
def test_measured_values_are_not_rescaled(method, trainer, plan):
    """Catches a method that changes brightness, contrast or gamma of CT; with z-scores it does what it is told."""
    task = build(trainer, plan)
    batch = make_batch(task)
    changed = {}
    for scheme in ("CTNormalization", "ZScoreNormalization"):
        task.configuration = replace(
            task.configuration, normalization_schemes=(scheme,) * task.configuration.num_input_channels
        )
        shown = []
        for changes in (STILL, STILL + STRONG):
            task.config = apply_overrides(task.config, [f"{INTENSITIES[method[0]]}.{change}" for change in changes])
            shown.append(task.views(batch, SampleRandom(seed=1, step=0, samples=batch.samples), train=True))
        changed[scheme] = any(not torch.equal(view, shown[1][name]) for name, view in shown[0].items())
    assert changed == {"CTNormalization": False, "ZScoreNormalization": True}


def test_every_parameter_gets_a_gradient(trainer, plan):
    """In the union of some steps: heads may begin at zero, and a step may leave some of them out."""
    loop = Loop(build(trainer, plan), trainer)
    exempt = {id(bias) for bias in conv_biases_before_norms(loop.task)}
    waiting = {name: p for name, p in loop.task.named_parameters() if p.requires_grad and id(p) not in exempt}
    assert waiting
    for step in range(GRADIENT_STEPS):
        loop.step(step, make_batch(loop.task, step))
        waiting = {name: p for name, p in waiting.items() if p.grad is None or not p.grad.any()}
        if not waiting:
            break
    assert list(waiting) == []


def mutual_information(probabilities: torch.Tensor) -> float:
    """How much targets (B, K) say about which sample they belong to, in nats: 0 when collapsed, ln B at most."""
    mean = probabilities.mean(0)
    return float(torch.special.entr(mean).sum() - torch.special.entr(probabilities).sum(1).mean())


def test_it_learns_on_one_batch(trainer, plan):
    """The loss falls. That against a teacher falls in a collapse, and rises as targets sharpen: there it tells nothing,
    and targets must tell samples apart instead.

    Fails on a network whose targets are flat or all the same: then they say nothing about their sample.
    """
    batch = make_batch(build(trainer, plan))
    shown = forward(build(trainer, plan), batch, step=0, train=False).embeddings
    has_teacher = shown is not None and shown.targets is not None
    fast = replace(trainer, optim=OptimConfig(name="adamw", lr=5e-4 if has_teacher else 3e-3))
    loop = Loop(build(fast, plan), fast)
    outputs = [loop.step(step, batch, draws=0) for step in range(LEARNING_STEPS)]  # the same views every time
    losses = [output.loss.item() for output in outputs]
    if has_teacher:
        known = [mutual_information(output.embeddings.targets) for output in outputs[-5:]]
        assert min(known) > math.log(len(batch.cases)) / 3
    else:
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_resuming_gives_the_very_same_numbers(trainer, plan, tmp_path: Path):
    loop = Loop(build(trainer, plan), trainer)
    batches = [make_batch(loop.task, step) for step in range(4)]
    for step in (0, 1):
        loop.step(step, batches[step])
    saved = build_checkpoint(loop.task, trainer, plan, content_hashes=[], resume=loop.state())
    save_checkpoint(tmp_path / "checkpoint_latest.pth", saved)
    expected = [loop.step(step, batches[step]).loss for step in (2, 3)]

    resumed = Loop(build(trainer, plan, seed=99), trainer)
    state = load_checkpoint(tmp_path / "checkpoint_latest.pth")["resume"]
    resumed.task.load_state_dict(state["task"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    assert [resumed.step(step, batches[step]).loss.item() for step in (2, 3)] == [loss.item() for loss in expected]
    pairs = zip(resumed.task.state_dict().items(), loop.task.state_dict().values(), strict=True)
    assert all(torch.equal(value, wanted) for (_, value), wanted in pairs)


def test_a_stock_nnunet_loads_the_export_and_computes_the_same(trainer, plan, tmp_path: Path):
    loop = Loop(build(trainer, plan), trainer)
    for step in range(2):
        loop.step(step, make_batch(loop.task, step))
    path = tmp_path / "checkpoint_final.pth"
    save_checkpoint(path, build_checkpoint(loop.task, trainer, plan, content_hashes=[]))
    (name,) = plan.configuration_names
    configuration = plan.configuration(name)
    architecture = configuration.architecture
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        configuration.num_input_channels,
        3,
        deep_supervision=True,
    )
    load_pretrained_weights(network, str(path))
    network.eval()
    x = torch.randn(1, configuration.num_input_channels, *configuration.patch_size)
    exported = loop.task.export_network()
    with torch.no_grad():
        outputs = network(x)
        its = network.encoder(x) if configuration.backbone == "cnn" else [network.token_map(x)]
        assert all(map(torch.equal, loop.task.eval().exported_encoder.feature_maps(x), its))
        network.decoder.seg_layers = exported.decoder.seg_layers
        network.decoder.deep_supervision = False
        assert torch.equal(network(x), exported(x))
    assert outputs[0].shape == (1, 3, *configuration.patch_size)
    assert all(output.shape[1] == 3 for output in outputs)


def test_a_sham_destroys_every_target_and_leaves_the_rest(trainer, plan):
    """Catches a sham that leaves a target, or one sample's, as it was, or takes it from elsewhere than another case,
    that changes what the network sees, that asks for padding of either case or for less than both have, or whose loss
    is no number. Targets that a teacher gives are no views: of those the loss alone tells.
    """
    task = build(trainer, plan).eval()
    batch = make_batch(task)
    random = SampleRandom(seed=1, step=0, samples=batch.samples)
    with torch.no_grad():
        views = task.views(batch, random, train=False)
        sham = task.sham(views, random.child("sham"))
        honest, destroyed = (task(each).loss for each in (views, sham))
    assert torch.isfinite(destroyed)
    assert not torch.equal(honest, destroyed)
    for name, view in views.items():
        kind = name.rpartition("/")[2]  # those of joint training begin with the task
        if kind in TAKEN:
            assert (sham[name] != view).view(len(view), -1).any(1).all(), name
            assert torch.equal(sham[name], view.roll(1, 0)), name
        elif kind in DRAWN:
            assert not torch.equal(sham[name], view), name
        elif kind == ("asked" if name.removesuffix(kind) + "asked" in views else "valid"):
            real = views[name.removesuffix(kind) + "valid"]
            assert not (sham[name] & ~(view & real.roll(1, 0))).any(), name
            assert not (view & view.roll(1, 0) & ~sham[name]).any(), name
        else:
            assert torch.equal(sham[name], view), name


def test_a_copy_learns_on_its_own(trainer, plan):
    """Teachers and anchors are deep copies: a copy must hold its own weights, whole, and go on without the original."""
    task = build(trainer, plan)
    copy = deepcopy(task)
    assert not {p.data_ptr() for p in task.parameters()} & {p.data_ptr() for p in copy.parameters()}
    batch = make_batch(task)
    assert torch.equal(*(forward(each, batch, step=0, train=False).loss for each in (task, copy)))
