"""The pretext trio: labels that are the turns, holes that are asked for, partners that belong together."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.loading.batch import Batch
from nnssl_ext.losses.nt_xent import nt_xent
from nnssl_ext.trainers.swin_unetr import SwinUNETR, SwinUNETRTrainer
from tests.tasks import task_on

SAMPLES = (10, 11, 12)
RANDOM = SampleRandom(seed=3, step=5, samples=SAMPLES)


def make_batch(patch_size: tuple[int, ...], cases: str = "abc") -> Batch:
    """Three crops; the last is padded along the first axis, with rubbish that nothing may see."""
    data = torch.randn(3, 1, *patch_size, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    valid[2, :, -6:] = False
    spacing = torch.ones(3, len(patch_size))
    lower = torch.zeros_like(spacing, dtype=torch.int64)
    return Batch(torch.where(valid, data, 1e4), valid, tuple(cases), SAMPLES, lower, spacing)


make_task = partial(task_on, SwinUNETR)


def test_labels_are_the_turns(tiny_plan):
    """Catches labels that do not belong to what is shown: a square crop is compared with all its turns by rot90."""
    task = make_task(tiny_plan((16, 16)))
    batch = make_batch((16, 16))
    batch = replace(batch, valid=torch.ones_like(batch.valid), data=batch.data.clamp(-5, 5))
    seen = set()
    for step in range(6):
        views = task.views(batch, replace(RANDOM, step=step), train=True)
        for row in range(6):
            turn = int(views["turns"][row])
            errors = [
                (torch.rot90(batch.data[row % 3], turn, [1, 2]) - views["target"][row]).abs().max() for turn in range(4)
            ]
            assert int(torch.stack(errors).argmin()) == turn
            assert errors[turn] < 1e-4
            seen.add(turn)
    assert seen == {0, 1, 2, 3}


def test_the_two_views_are_turned_and_cut_on_their_own(tiny_plan):
    task = make_task(tiny_plan((24, 16)))
    batch = make_batch((24, 16))
    views = [task.views(batch, replace(RANDOM, step=step), train=True) for step in range(20)]
    first, second = torch.stack([each["turns"].view(2, 3) for each in views], 1)
    assert 0.1 < (first == second).float().mean() < 0.45
    assert all(not torch.equal(*each["asked"].chunk(2)) for each in views)


def test_cut_outs_hide_what_they_may_and_nothing_else(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size))
    views = task.views(make_batch(patch_size), RANDOM, train=True)
    share = views["asked"].flatten(1).sum(1) / views["valid"].flatten(1).sum(1)
    assert share.max() <= 0.3
    assert share.min() > 0.1
    assert torch.equal(views["image"], views["target"].masked_fill(views["asked"], 0))
    assert views["target"].abs().max() < 10


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_hidden_voxels_alone_are_asked_for(request, patch_size, kind):
    task = make_task(request.getfixturevalue(kind)(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    task(views).loss.backward()
    assert torch.equal(outputs[0].grad != 0, views["asked"].expand_as(outputs[0]))


def test_hidden_voxels_never_reach_the_network(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    spoilt = views | {"target": views["target"].masked_fill(views["asked"], 7.0)}
    with torch.no_grad():
        assert torch.equal(task(spoilt).images["output"], task(views).images["output"])


def test_the_loss_is_the_sum_of_its_parts(tiny_plan, patch_size):
    """Catches unequal weights, views paired wrongly, and turns told from the wrong features."""
    task = make_task(tiny_plan(patch_size)).eval()
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    with torch.no_grad():
        found = task(views)
        pooled = task.encoder.pooled(views["image"])  # no view holds padding
        turn = torch.nn.functional.cross_entropy(task.turn_head(pooled), views["turns"])
        contrast, chance = nt_xent(*task.projector(pooled).chunk(2), 0.5)
        restored = task.decoder(task.encoder(views["image"]))
    triples = zip(restored, views["target"], views["asked"], strict=True)
    errors = torch.stack([(output - target)[asked].abs().mean() for output, target, asked in triples])
    metrics = found.metrics
    assert metrics["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    assert metrics["contrast_chance"].item() == pytest.approx(math.log(5)) == pytest.approx(chance.item())
    assert found.loss.item() == pytest.approx((turn + contrast + metrics["l1"]).item(), rel=1e-5)
    assert metrics["l1"].item() == pytest.approx(errors.mean().item(), rel=1e-5)
    hits = (task.turn_head(pooled).argmax(1) == views["turns"]).float().mean()
    assert metrics["turn_accuracy"].item() == pytest.approx(hits.item())
    assert metrics["turn_accuracy_chance"] == 0.25


def test_a_turn_that_padding_tells_is_not_asked_for(tiny_plan):
    """The second crop is one voxel thin: of its two views, padding tells the turn, and neither is learned from.

    Catches a loss that rewards looking for padding, or for voxels that are stretched in one case alone, an accuracy
    that counts such views, and a batch of such views alone that lowers the mean of an epoch.
    """
    task, batch = make_task(tiny_plan((16, 16)), weights=(1, 0, 0)).eval(), make_batch((16, 16))
    valid = torch.ones_like(batch.valid)
    valid[1, :, 1:] = False
    batch = replace(batch, data=torch.where(valid, batch.data, 0), valid=valid)
    stretched = replace(batch, spacing=torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))
    assert task.views(stretched, RANDOM, train=False)["fair"].tolist() == [True, False, False] * 2
    views = task.views(batch, RANDOM, train=False)
    assert views["fair"].tolist() == [True, False, True] * 2
    logits = []
    task.turn_head.register_forward_hook(lambda module, args, output: logits.append(output) or output.retain_grad())
    output = task(views)
    output.loss.backward()
    assert (logits[0].grad != 0).any(1).tolist() == [True, False, True] * 2
    hits = (logits[0].argmax(1) == views["turns"])[views["fair"]]
    assert output.metrics["turn_accuracy"].item() == pytest.approx(hits.float().mean().item())
    metrics = task({**views, "fair": torch.zeros_like(views["fair"])}).metrics
    assert metrics["turn_accuracy"].isnan()
    assert metrics["turn_accuracy_chance"].isnan()


def test_weights_switch_parts_off(tiny_plan):
    task = make_task(tiny_plan((24, 16)), weights=(0, 2, 0)).eval()
    with torch.no_grad():
        output = task(task.views(make_batch((24, 16)), RANDOM, train=False))
    assert output.loss.item() == pytest.approx(2 * output.metrics["contrast"].item())


def test_a_sham_destroys_all_three_targets(tiny_plan, patch_size):
    task = make_task(tiny_plan(patch_size))
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    sham = task.sham(views, RANDOM)
    assert torch.equal(sham["image"], views["image"])
    assert torch.equal(sham["target"], views["target"].roll(1, 0))
    assert sham["partner"].tolist() == [2, 0, 1]
    many = [task.sham(views, replace(RANDOM, step=step))["turns"] for step in range(40)]
    assert torch.stack(many).unique().tolist() == [0, 1, 2, 3]
    assert (torch.stack(many) == views["turns"]).float().mean().item() == pytest.approx(0.25, abs=0.1)


def test_unequal_voxels_are_refused_at_the_start(tiny_plan):
    plan = tiny_plan((16, 24, 8))
    plan.raw["configurations"]["3d_fullres"]["spacing"] = [4.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="would tell the turn"):
        make_task(plan)


def test_a_single_crop_is_refused_where_it_should_contrast(tiny_plan):
    """Catches a run whose contrast is 0 from the first step to the last."""
    plan = tiny_plan((24, 16))
    (raw,) = plan.raw["configurations"].values()
    raw["batch_size"] = 1
    with pytest.raises(ValueError, match=r"-batch_size of 2 or more, or --set weights=\[1,0,1\]"):
        make_task(plan)
    make_task(plan, weights=(1, 0, 1))


def test_recipe_is_the_published_one():
    trainer = TRAINERS.get("SwinUNETRTrainer")()
    config = trainer.task_config
    assert (config.weights, config.temperature, config.width, config.hidden_share) == ((1, 1, 1), 0.5, 512, 0.3)
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.weight_decay) == ("adamw", 4e-4, 1e-5)
    assert (trainer.schedule.name, trainer.schedule.warmup_steps) == ("cosine", 500)


@pytest.mark.parametrize(
    "override",
    ["weights=[-1,1,1]", "temperature=0", "width=0", "hidden_share=1", "sides=[0.5,0.2]", "max_anisotropy=0.5"],
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        SwinUNETRTrainer.configured([override])
