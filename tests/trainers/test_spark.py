"""What makes SparK: only visible cells reach the encoder, only hidden real voxels are asked for, and the stock network
comes out. That features are kept to visible positions at every scale is tested in tests/models/test_visible.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from nnssl_ext.engine.checkpoint import build_checkpoint
from nnssl_ext.models.visible import scale_masks, visible_feature_maps
from nnssl_ext.trainers.spark import Spark, SparkTrainer
from nnssl_ext.views.spatial import SpatialConfig
from tests.tasks import disturb, task_on
from tests.trainers.masked import RANDOM, make_batch

CELL = 4


make_task = partial(task_on, Spark)


@pytest.fixture
def task(tiny_plan, patch_size) -> Spark:
    return make_task(tiny_plan(patch_size)).eval()


def prediction(task: Spark, views: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return task(views).images["output"]


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_hidden_voxels_and_padding_never_reach_the_network(task, patch_size, rubbish):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    assert not (~views["hidden"] & ~views["valid"]).any()
    spoilt = views | {"image": views["image"].masked_fill(views["hidden"], rubbish)}
    assert torch.equal(prediction(task, spoilt), prediction(task, views))


def test_every_visible_voxel_reaches_the_network(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    image = views["image"].requires_grad_()
    task._restore(image, ~views["hidden"]).square().sum().backward()
    assert torch.equal(image.grad != 0, ~views["hidden"])


def test_cells_and_loss_mask_agree(task, patch_size):
    """The deepest features are exactly at the cells that the loss leaves out, on a patch that is no cube. Fault: a mask
    transposed against the features, which counts visible voxels as hidden."""
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    deepest = visible_feature_maps(task.encoder, views["image"], ~views["hidden"])[-1].any(1, keepdim=True)
    task(views).loss.backward()
    seen = deepest
    for axis in range(2, seen.ndim):
        seen = seen.repeat_interleave(CELL, axis)
    assert torch.equal(seen, ~views["hidden"])
    assert torch.equal(outputs[0].grad != 0, ~seen & views["valid"])


def test_with_nothing_hidden_it_is_the_exported_network(task, patch_size):
    """Even after training, the decoder included. Fault: layers of pretraining that the export lacks."""
    disturb(task)
    with torch.no_grad():
        image = make_batch(patch_size).data
        output = task._restore(image, torch.ones_like(image, dtype=torch.bool))
        torch.testing.assert_close(output, task.export_network()(image), rtol=1e-4, atol=1e-4)


def test_no_alias_of_the_export_is_left_untrained(task):
    """Fault of a peer: `conv.weight` held the initial values, `all_modules.0.weight` the trained ones."""
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(1.0)
    exported = task.export_network().state_dict()
    own = {value.data_ptr() for value in [*task.encoder.parameters(), *task.decoder.parameters()]}
    assert {value.data_ptr() for value in exported.values()} == own
    for name, value in exported.items():
        if ".all_modules.0." in name:
            assert value.data_ptr() == exported[name.replace("all_modules.0", "conv")].data_ptr()
    assert not any("densify" in name or "token" in name for name in exported)


def test_the_checkpoint_says_how_to_adapt_it(tiny_plan, patch_size, task):
    """Fault of a peer: no adaptation plan in the file, so that nothing can be fine-tuned from it."""
    saved = build_checkpoint(task, SparkTrainer(), tiny_plan(patch_size), content_hashes=[])
    adaptation, weights = saved["nnssl_adaptation_plan"], saved["network_weights"]
    assert (adaptation["key_to_encoder"], adaptation["key_to_stem"]) == ("encoder.stages", "encoder.stem")
    assert adaptation["recommended_downstream_patchsize"] == list(patch_size)
    trained = task.encoder.state_dict(prefix="encoder.")
    for name in adaptation["keys_to_in_proj"]:
        own = trained[name.replace("encoder.", "encoder.module.", 1) + ".weight"]
        assert torch.equal(weights[f"{name}.weight"], own)


def test_every_scale_has_a_token_and_a_convolution(task):
    assert [fill.token.shape[1] for fill in task.densify] == list(task.encoder.channels)
    assert all(set(fill.conv.kernel_size) == {3} for fill in task.densify)


def test_holes_are_filled_at_every_scale_before_the_decoder(task, patch_size):
    """Fault: the decoder gets zeros where a token belongs."""
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    got = []
    task.decoder.register_forward_pre_hook(lambda module, args: got.extend(args[0]))
    task(views)
    masks = scale_masks(~views["hidden"], task.encoder.strides)
    sparse = visible_feature_maps(task.encoder, views["image"], ~views["hidden"])
    for filled, kept, mask in zip(got, sparse, masks, strict=True):
        assert torch.equal(filled * mask, kept)
        assert filled.masked_select(~mask).all()


@pytest.mark.parametrize("train", [True, False])
def test_the_share_is_of_real_voxels(task, patch_size, train):
    views = task.views(make_batch(patch_size), RANDOM, train)
    for hidden, valid in zip(views["hidden"], views["valid"], strict=True):
        visible = int((~hidden).sum()) // CELL ** len(patch_size)
        assert visible == max(1, round(0.25 * int(valid.sum()) / CELL ** len(patch_size)))


def test_the_share_may_be_drawn_for_each_step(tiny_plan):
    """One share for a step, whatever the samples; over steps it fills the range. Validation has the mean of the range:
    it is keyed alike every epoch, so a share drawn there would be one for the whole run."""
    still = SpatialConfig(rotation=0, scaling=0)
    task = make_task(tiny_plan((24, 16)), mask_ratio=0.6, mask_ratio_max=0.9, spatial=still)
    batch = make_batch((24, 16))
    batch = replace(batch, valid=torch.ones_like(batch.valid))
    shares = []
    for step in range(40):
        counts, validated = (
            task.views(batch, replace(RANDOM, step=step), train)["hidden"].flatten(1).float().mean(1)
            for train in (True, False)
        )
        assert counts[0] == counts[1]
        shares.append(counts[0].item())
        assert validated.tolist() == [0.75, 0.75]
    assert 0.58 < min(shares) < 0.65
    assert 0.85 < max(shares) < 0.92


def test_the_loss_and_its_chance_are_those_of_hidden_real_voxels(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    output = task(views)
    errors, chances = [], []
    for restored, image, hidden, valid in zip(
        output.images["output"], views["image"], views["hidden"][:, 0], views["valid"][:, 0], strict=True
    ):
        errors.append((restored - image)[:, hidden & valid].square().mean())
        chances.append((image[:, hidden & valid] - image[:, ~hidden].mean()).square().mean())
    assert output.loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert output.metrics["mse_chance"].item() == pytest.approx(torch.stack(chances).mean().item(), rel=1e-5)


def test_recipe_is_the_published_one():
    trainer = SparkTrainer()
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.momentum) == ("sgd", 1e-2, 0.99)
    assert trainer.task_config.mask_ratio == 0.75


@pytest.mark.parametrize("overrides", [["mask_ratio=1"], ["mask_ratio=0.7", "mask_ratio_max=0.6"]])
def test_impossible_settings_are_refused(overrides):
    with pytest.raises(ValueError, match="mask_ratio"):
        SparkTrainer.configured(overrides)


def test_a_ratio_that_hides_nothing_is_refused(tiny_plan):
    with pytest.raises(ValueError, match=r"mask_ratio=0\.001 hides none of a patch's 24 tokens"):
        make_task(tiny_plan((24, 16)), mask_ratio=0.001)
