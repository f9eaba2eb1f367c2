"""What makes SimMIM: a learned token where the image is hidden, and only hidden, real voxels asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nnssl_ext.trainers.simmim import SimMIM, SimMIMTrainer
from tests.tasks import disturb, task_on
from tests.trainers.masked import RANDOM, make_batch, token_of_voxel


def make_task(plan, **settings) -> SimMIM:
    return disturb(task_on(SimMIM, plan, **settings))


@pytest.fixture
def task(tiny_vit_plan, patch_size) -> SimMIM:
    return make_task(tiny_vit_plan(patch_size)).eval()


def tokens_before_blocks(task: SimMIM, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the first block is given, without positions and registers."""
    seen = []
    hook = task.encoder.eva.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        task(views)
    hook.remove()
    prefix = task.encoder.eva.num_prefix_tokens
    return seen[0][:, prefix:] - task.encoder.eva.pos_embed[:, prefix:]


def test_exactly_the_hidden_tokens_are_the_learned_one(task, patch_size):
    """Others are the stock network's own. Fault: positions are replaced as well, so that a hidden token has no place;
    or the mask is laid out in another order than the tokens."""
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    tokens, hidden = tokens_before_blocks(task, views), views["hidden_tokens"]
    own = task.encoder.down_projection(views["image"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[~hidden], own[~hidden], rtol=1e-4, atol=1e-5)
    learned = task.mask_token[0].expand(int(hidden.sum()), -1)
    torch.testing.assert_close(tokens[hidden], learned, rtol=1e-4, atol=1e-5)


def test_tokens_and_loss_mask_agree(task, patch_size):
    """On a patch that is no cube. Fault of a peer: the loss mask was transposed against the tokens, and 23% of what
    counted as hidden was visible."""
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    index = token_of_voxel(patch_size)
    outputs = []
    hook = lambda module, args, output: outputs.append(output) or output.retain_grad()  # noqa: E731
    task.head.register_forward_hook(hook)
    task(views).loss.backward()
    asked = outputs[0].grad.any(2)
    for hidden, by_token, valid, counted in zip(
        views["hidden"], views["hidden_tokens"], views["valid"], asked, strict=True
    ):
        assert torch.equal(index[0][hidden].unique(), by_token.nonzero()[:, 0])
        assert torch.equal(index[0][hidden & valid].unique(), counted.nonzero()[:, 0])


def test_visible_voxels_and_padding_are_not_asked_for(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    counted = views["hidden"] & views["valid"]
    target = views["target"].clone().requires_grad_()
    task(views | {"target": target}).loss.backward()
    assert counted.any()
    assert torch.equal(target.grad != 0, counted)


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_hidden_voxels_never_reach_the_network(task, patch_size, rubbish):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    assert not (~views["hidden"] & ~views["valid"]).any()
    spoilt = views | {"image": views["image"].masked_fill(views["hidden"], rubbish)}
    with torch.no_grad():
        assert torch.equal(task(spoilt).images["output"], task(views).images["output"])


def test_the_loss_is_the_absolute_error_of_hidden_real_voxels(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    output = task(views)
    absolute, squared = [], []
    for restored, image, hidden, valid in zip(
        output.images["output"], views["image"], views["hidden"][:, 0], views["valid"][:, 0], strict=True
    ):
        difference = (restored - image)[:, hidden & valid]
        absolute.append(difference.abs().mean())
        squared.append(difference.square().mean())
    assert output.loss.item() == pytest.approx(torch.stack(absolute).mean().item(), rel=1e-5)
    assert output.metrics["mse"].item() == pytest.approx(torch.stack(squared).mean().item(), rel=1e-5)


def test_with_nothing_hidden_it_is_the_stock_encoder(task, patch_size):
    image = make_batch(patch_size).data
    hidden = torch.zeros(2, int(token_of_voxel(patch_size).max()) + 1, dtype=torch.bool)
    seen = []
    task.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        task._restore(image, hidden)
        assert torch.equal(seen[0], task.encoder.tokens(image))


@pytest.mark.parametrize("train", [True, False])
def test_three_quarters_are_hidden_and_all_are_encoded(task, patch_size, train):
    batch = make_batch(patch_size)
    views = task.views(replace(batch, valid=torch.ones_like(batch.valid)), RANDOM, train)
    number = int(token_of_voxel(patch_size).max()) + 1
    assert views["hidden_tokens"].shape == (2, number)
    if not train:
        assert (views["hidden_tokens"].sum(1) == number - round(0.25 * number)).all()
    assert tokens_before_blocks(task.eval(), views).shape[1] == number


def test_recipe_is_the_published_one():
    trainer = SimMIMTrainer.configured([], "vit")
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.betas) == ("adamw", 3e-4, (0.9, 0.98))
    assert (trainer.schedule.warmup_steps, trainer.task_config.mask_ratio) == (50 * 250, 0.75)


def test_impossible_settings_are_refused(tiny_vit_plan):
    with pytest.raises(ValueError, match="mask_ratio"):
        SimMIMTrainer.configured(["mask_ratio=1"], "vit")
    with pytest.raises(ValueError, match=r"mask_ratio=0\.001 hides none of a patch's 96 tokens"):
        make_task(tiny_vit_plan((16, 24, 8)), mask_ratio=0.001)


def test_a_unet_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="SimMIMTrainer runs on a vit"):
        SimMIMTrainer().build_task(tiny_plan((24, 16)).configuration("2d"), 4)
