"""Joint training: every task as it is alone, one encoder that all of them train, and what does not go together."""

import json

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import from_dict, to_dict
from nnssl_ext.engine.checkpoint import build_checkpoint
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.planners.plan import Plan
from nnssl_ext.trainers.multi_task import MultiTask, MultiTaskTrainer, middle, united, views_of

PATCH, LARGE = (24, 16), (32, 21)
SAMPLES = (10, 11, 12, 13)
RANDOM = SampleRandom(seed=3, step=5, samples=SAMPLES)
NAMES = {"mae": "MAETrainer", "rotation": "RotationTrainer", "simclr": "SimCLRTrainer", "dinov2": "DINOv2Trainer"}


def make_task(plan: Plan, tasks: str, *overrides: str) -> MultiTask:
    torch.manual_seed(0)
    trainer = MultiTaskTrainer.configured([f"tasks=[{tasks}]", *overrides], plan.configuration("2d").backbone)
    return trainer.build_task(plan.configuration("2d"), num_cases=9)


def make_batch(size: tuple[int, ...] = PATCH) -> Batch:
    data = torch.randn(len(SAMPLES), 1, *size, generator=torch.Generator().manual_seed(0))
    places = torch.zeros(len(SAMPLES), 2, dtype=torch.int64), torch.ones(len(SAMPLES), 2)
    return Batch(data, torch.ones_like(data, dtype=torch.bool), tuple("abcd"), SAMPLES, *places)


@pytest.mark.parametrize("name", NAMES)
def test_alone_a_task_is_what_its_own_trainer_makes_of_it(tiny_plan, name):
    """Weights at the start, views, loss, gradients, and all state after a step, teachers too. The joint run differs by
    the key of its random numbers, and by the loss's size.

    Catches another initialisation, a teacher that follows another encoder than the shared one, twice or not at all,
    and state that a pass leaves out.
    """
    plan = tiny_plan(PATCH)
    joint = make_task(plan, name)
    torch.manual_seed(0)
    single = TRAINERS.get(NAMES[name])().build_task(plan.configuration("2d"), num_cases=9)
    batch = make_batch(PATCH if single.parent_scale == 1 else LARGE)
    views = joint.views(batch, RANDOM, train=True)
    alone = single.views(batch, RANDOM.child(name), train=True)
    assert {f"{name}/{view}" for view in alone} == set(views)
    assert all(torch.equal(views[f"{name}/{view}"], values) for view, values in alone.items())
    ours, theirs = joint(views), single(alone)
    assert torch.equal(ours.metrics[f"{name}_loss"], theirs.loss.detach())
    assert ours.loss.item() == pytest.approx(1)
    ours.loss.backward()
    theirs.loss.backward()
    for each, weight in single.named_parameters():
        if weight.requires_grad:
            found = joint.members[name].get_parameter(each).grad
            torch.testing.assert_close(found * theirs.loss.detach().abs(), weight.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for task in (joint, single):
            for number, weight in enumerate(task.parameters()):
                weight.add_(0.1 * number % 0.3)
            task.after_step(0, 100)
    state = joint.members[name].state_dict()
    assert all(torch.equal(state[key], value) for key, value in single.state_dict().items())


def test_gradients_of_all_tasks_meet_in_the_encoder(tiny_plan):
    """Catches tasks that train encoders of their own, of which one is exported, and one that is left out of the sum."""
    task = make_task(tiny_plan(PATCH), "mae,rotation,simclr").eval()
    views = task.views(make_batch(LARGE), RANDOM, train=False)
    weights = list(task.encoder.parameters())
    parts = []
    for name, member in task.members.items():
        assert {id(weight) for weight in member.encoder.parameters()} == {id(weight) for weight in weights}
        loss = member(views_of(name, views)).loss
        parts.append(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
        assert any(gradient.any() for gradient in parts[-1])
    whole = torch.autograd.grad(task(views).loss, weights)
    for found, *each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(found, sum(each), rtol=1e-4, atol=1e-6)


def test_a_tasks_views_depend_on_its_name_alone(tiny_plan):
    """Catches draws that are shared by tasks, and such that depend on which others there are, or on their order."""
    plan = tiny_plan(PATCH)
    every = {
        tasks: make_task(plan, tasks).views(make_batch(), RANDOM, train=True)
        for tasks in ("rotation", "mae,rotation", "Rotation,exemplar,MAETrainer,models_genesis")
    }
    *some, most = every.values()
    assert all(torch.equal(values, most[view]) for views in some for view, values in views.items())
    assert not torch.equal(most["mae/target"], most["modelsgenesis/target"])


def test_the_order_of_tasks_changes_no_number(tiny_plan):
    """Nor do others change a head at the start. Catches weights drawn, or losses added, in the order of the tasks."""
    plan = tiny_plan(PATCH)
    first, second, alone = (make_task(plan, t) for t in ("rotation,volumefusion", "volumefusion,rotation", "rotation"))
    found, other = (task(task.views(make_batch(), RANDOM, train=True)).metrics for task in (first, second))
    assert all(torch.equal(other[name], value) for name, value in found.items())
    heads = (task.members["rotation"].head.parameters() for task in (first, alone))
    assert all(torch.equal(*pair) for pair in zip(*heads, strict=True))


def test_teachers_begin_as_the_shared_encoder(tiny_plan):
    """Catches a teacher that is a copy of the encoder its task would have had alone: where another task has other
    outputs, the weights at the start are others."""
    task = make_task(tiny_plan(PATCH), "densecontrastive,simclr")
    pairs = zip(task.members["simclr"].teacher.encoder.parameters(), task.encoder.parameters(), strict=True)
    assert all(torch.equal(*pair) and pair[0] is not pair[1] for pair in pairs)


def test_a_run_that_is_resumed_in_its_first_steps_goes_on_alike(tiny_plan):
    """Catches means of the losses that a resumed run begins anew."""

    def step(task: MultiTask, number: int) -> torch.Tensor:
        views = task.views(make_batch(LARGE), SampleRandom(seed=3, step=number, samples=SAMPLES), train=True)
        loss = task.train()(views).loss
        task.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in filter(lambda each: each.grad is not None, task.parameters()):
                weight -= 0.01 * weight.grad
            task.after_step(number, 1000)
        return loss

    task, resumed = (make_task(tiny_plan(PATCH), "rotation,simclr") for _ in range(2))
    step(task, 0)
    resumed.load_state_dict(task.state_dict())
    assert torch.equal(step(task, 1), step(resumed, 1))
    assert task.weighting.count.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=[pcrlv2,mae]", "weighting=uncertainty"], "pcrlv2 may fall below"),
        (["tasks=[mae,dinov2]", "weighting=uncertainty"], "dinov2 may fall below"),
        (["tasks=[mae,nope]"], "there is no 'nope'. Valid: cpc"),
        (["tasks=[mae,MAETrainer]"], "each once"),
        (["tasks=[]"], "one task or more"),
        (["tasks=[multitask,mae]"], "no 'multitask'"),
        (['levels={"mae":[-1,-2]}'], "mae is no task here .* Those are: rotation, simclr"),
        (['levels={"rotation":[-2]}'], "must hold -1"),
        (["jigsaw.permutations=5"], "jigsaw is none of tasks"),
        (["rotation.optim.lr=1"], "no setting 'optim.lr=1'. Valid: intensity"),
        (["settings={}"], "by its task's name"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        MultiTaskTrainer.configured(overrides)


def test_what_a_plan_cannot_give_is_refused(tiny_plan, tiny_vit_plan):
    with pytest.raises(ValueError, match="none of the encoder's: its 3"):
        make_task(tiny_plan(PATCH), "rotation", 'levels={"rotation":[-1,-4]}')
    with pytest.raises(ValueError, match="transformer has no other"):
        make_task(tiny_vit_plan(PATCH), "rotation", 'levels={"rotation":[-1,-2]}')
    with pytest.raises(ValueError, match="SimMIMTrainer runs on a vit"):
        make_task(tiny_plan(PATCH), "mae,simmim")
    with pytest.raises(ValueError, match="MultiMAE restores modalities"):
        make_task(tiny_vit_plan(PATCH), "mae,multimae")


def test_every_task_that_asks_sees_the_first_batches(tiny_plan, monkeypatch):
    """Catches batches that the first of several tasks uses up, and draws and crops that are not the task's own."""
    seen = {}
    for name in ("MAE", "Exemplar"):
        cls = TRAINERS.get(f"{name}Trainer").task
        monkeypatch.setattr(cls, "first_look", len(name))
        monkeypatch.setattr(cls, "begin", lambda self, batches, name=name: seen.update({name: list(batches)}))
    task = make_task(tiny_plan(PATCH), "mae,exemplar,simclr")
    assert task.first_look == len("Exemplar")
    task.begin((make_batch(LARGE), RANDOM) for _ in range(3))
    assert [len(batches) for batches in seen.values()] == [3, 3]
    batch, random = seen["MAE"][2]
    assert batch.data.shape[2:] == PATCH
    assert random == RANDOM.child("mae")


def test_data_gives_every_task_what_it_needs(tiny_plan):
    """Catches a task that looks at single images and gets only the first of each sample, so that what the monitor of
    collapse sees belongs to other cases than it is told."""
    task = make_task(tiny_plan(PATCH), "simclr,volumefusion")
    assert task.needs == DataNeeds(images=2, same="modality")
    views = task.views(make_batch(LARGE), RANDOM, train=True)
    assert len(views["simclr/first"]) == len(SAMPLES)
    assert len(views["volumefusion/image"]) == len(SAMPLES) / 2
    assert len(task(views).embeddings.first) == len(SAMPLES)
    assert task.members["simclr"].configuration.batch_size == 2 * task.configuration.batch_size
    session, pair = DataNeeds(images=2, same="session"), DataNeeds(images=2, same="modality")
    assert united({"a": DataNeeds(channels=2), "b": session}) == DataNeeds(channels=2, images=2, same="session")
    with pytest.raises(ValueError, match="a 2 that share session, b 2 that share modality"):
        united({"a": session, "b": pair, "c": DataNeeds()})


def test_a_task_of_smaller_crops_gets_the_middle_of_what_is_real():
    """Catches crops that show the padding beside a volume although there is room in it, and places that are lost."""
    batch = make_batch(LARGE)
    batch.valid[1, :, :, :10] = False
    batch.data[~batch.valid] = 99
    found = middle(batch, PATCH)
    assert torch.equal(found.data[0], batch.data[0, :, 4:28, 2:18])
    assert found.lower.tolist()[:2] == [[4, 2], [4, 5]]
    assert torch.equal(found.data[1, :, :, 5:], batch.data[1, :, 4:28, 10:])
    assert found.valid[1].sum() == 24 * 11


def test_the_first_task_with_a_decoder_hands_it_on(tiny_plan):
    for tasks, name in (("rotation,modelsgenesis,mae", "modelsgenesis"), ("mae,modelsgenesis", "mae")):
        task = make_task(tiny_plan(PATCH), tasks)
        assert task.trains_decoder
        exported, own = task.export_network().decoder, task.members[name].decoder
        assert exported.transpconvs[0].weight.data_ptr() == own.transpconvs[0].weight.data_ptr()
    assert not make_task(tiny_plan(PATCH), "rotation,exemplar").trains_decoder


def test_checkpoints_keep_what_tasks_predict_with(tiny_plan):
    """Catches heads that are gone with the state that only resuming needs, and names that the state does not have."""
    task = make_task(tiny_plan(PATCH), "rotation,patchclustering")
    found, state = task.predictor(), task.state_dict()
    assert all(torch.equal(state[name], value) for name, value in found.items())
    assert len(found) == len(task.members["patchclustering"].predictor()) > 0


def test_the_first_task_that_embeds_is_watched(tiny_plan):
    task = make_task(tiny_plan(PATCH), "mae,simclr,exemplar", "exemplar.width=7")
    shown = task(task.views(make_batch(LARGE), RANDOM, train=True)).embeddings
    assert shown.first.shape == (len(SAMPLES), 128)


@pytest.mark.parametrize("name", ["rotation", "simclr"])
def test_a_loss_on_an_inner_level_has_a_head_of_its_own_and_the_same_views(tiny_plan, name):
    """Catches an inner level that is the deepest one again, and its teacher, which must look at that level too."""
    task = make_task(tiny_plan(PATCH), name, f'levels={{"{name}":[-2,-1]}}')
    views = task.views(make_batch(LARGE if name == "simclr" else PATCH), RANDOM, train=True)
    assert all(view.startswith(f"{name}/") for view in views)
    inner = task.inner[f"{name}_level1"]
    own = views_of(name, views)
    task.eval()
    losses = [part(own).loss for part in (task.members[name], inner)]
    assert not torch.equal(*losses)
    output = task(views)
    assert output.loss.item() == pytest.approx(sum(losses).item() / 2)
    assert {metric.removeprefix(f"{name}_level1_") for metric in output.metrics} >= set(inner(own).metrics)
    losses[1].backward()
    deepest = dict(task.encoder.module.stages[2].named_parameters())
    assert all(weight.grad is None for weight in deepest.values())
    assert inner.encoder.project.weight.grad.any()
    if name == "simclr":
        before = inner.teacher.encoder.project.weight.clone()
        inner.encoder.project.weight.data += 1
        task.after_step(0, 100)
        torch.testing.assert_close(inner.teacher.encoder.project.weight, before + 0.01)


def test_settings_of_a_task_reach_it_and_survive_json(tiny_plan):
    trainer = MultiTaskTrainer.configured(
        [
            "tasks=[rotation, 'MAE']",
            "rotation.max_anisotropy=3",
            "mae.mask_ratio=0.5",
            "mae.spatial.flip=0",
            "optim.lr=1",
        ]
    )
    again = from_dict(MultiTaskTrainer, json.loads(json.dumps(to_dict(trainer))))
    assert again == trainer
    assert trainer.optim.lr == 1
    task = again.build_task(tiny_plan(PATCH).configuration("2d"), 9)
    assert task.members["rotation"].config.max_anisotropy == 3
    assert (task.members["mae"].config.mask_ratio, task.members["mae"].config.spatial.flip) == (0.5, 0)
    assert {"MultiTaskTrainer", "MAETrainer", "RotationTrainer"} == set(trainer.papers)


def test_files_of_a_task_stay_out_of_checkpoints(tiny_plan):
    """Catches a path that is handed on, written into the settings of a task as text."""
    trainer = MultiTaskTrainer.configured(
        ["tasks=[pixelclustering]", "pixelclustering.clustering=/home/me/clusters.npz"]
    )
    assert "/home/me" in json.dumps(to_dict(trainer))
    plan = tiny_plan(PATCH)
    checkpoint = build_checkpoint(make_task(plan, "rotation"), trainer, plan, content_hashes=[])
    assert "/home/me" not in json.dumps(checkpoint["nnssl_pretraining"]["recipe"])


def test_a_step_costs_what_those_of_its_tasks_cost(tiny_plan):
    configuration = tiny_plan(PATCH).configuration("2d")
    assert MultiTaskTrainer().step_cost(configuration) == MultiTaskTrainer.cost
    deep = MultiTaskTrainer.configured(['levels={"simclr":[-1,-2,-3]}'])
    assert deep.step_cost(configuration).views == 1 + 1 + 3 * 2


def test_the_encoder_learns_at_the_slowest_rate_that_a_task_asks_for(tiny_plan):
    task = make_task(tiny_plan(PATCH), "dino,mae")
    names = [name for name, _ in task.named_parameters()]
    alone = task.members["dino"]
    first = next(name for name in names if name.startswith("encoder."))
    assert task.lr_scale(first) == alone.lr_scale(first) < 1
    decoder = next(name for name in names if name.startswith("members.mae.decoder"))
    assert task.lr_scale(decoder) == 1
