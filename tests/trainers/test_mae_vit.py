"""A masked autoencoder on a transformer: what it sees, what it is asked for, and that the two do not overlap."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.models.token_decoder import fold_tokens
from nnssl_ext.trainers.mae import MAE, MAETrainer
from tests.tasks import disturb, task_on
from tests.trainers.masked import RANDOM, TOKENS, make_batch, token_of_voxel


def make_task(plan, **settings) -> MAE:
    return disturb(task_on(MAE, plan, **settings))


@pytest.fixture
def task(tiny_vit_plan, patch_size) -> MAE:
    return make_task(tiny_vit_plan(patch_size)).eval()


def prediction(task: MAE, views: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return task(views).images["output"]


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_hidden_voxels_never_reach_the_network(task, patch_size, rubbish):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    spoilt = views | {"image": views["image"].masked_fill(views["hidden"], rubbish)}
    assert torch.equal(prediction(task, spoilt), prediction(task, views))


def test_every_visible_voxel_reaches_the_network(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    target = views["target"].requires_grad_()
    output = task.decoder(task.encoder.tokens(torch.where(views["hidden"], 0, target), views["kept"]), views["kept"])
    output.square().sum().backward()
    assert torch.equal(target.grad != 0, ~views["hidden"])


def test_tokens_and_loss_mask_agree(task, patch_size):
    """The encoder's tokens are exactly the boxes of voxels that the loss leaves out, on a patch that is no cube.

    The image holds the index of each voxel's token, and the stem hands it on, so the tokens say what they were cut of.
    """
    seen = []
    task.encoder.eva.blocks = torch.nn.ModuleList()
    task.encoder.eva.norm = torch.nn.Identity()
    with torch.no_grad():
        task.encoder.eva.pos_embed.zero_()
        task.encoder.down_projection.proj.weight.fill_(1 / torch.Size(task.encoder.token_size).numel())
        task.encoder.down_projection.proj.bias.zero_()
    task.decoder.project.register_forward_pre_hook(lambda module, args: seen.append(args[0][..., 0]))
    index = token_of_voxel(patch_size)
    batch = replace(make_batch(patch_size), data=index.float().expand(2, 1, *patch_size))
    views = task.views(batch, RANDOM, train=False)
    task(views)
    for tokens, kept, hidden in zip(seen[0], views["kept"], views["hidden"], strict=True):
        visible = kept[kept >= 0]
        assert torch.equal(tokens[kept >= 0].round().long(), visible)
        assert torch.equal(index[0][~hidden].unique(), visible)
        assert not torch.isin(index[0][hidden], visible).any()


def test_predictions_lie_at_their_tokens(task, patch_size):
    """The head's values of token n become the voxels of token n, each in its place within the token."""
    index = token_of_voxel(patch_size)
    token = TOKENS[len(patch_size)]
    within = torch.arange(torch.Size(token).numel())
    number = int(index.max()) + 1
    first = 1000 * torch.arange(number)[:, None] + within
    values = torch.cat([first, -first], 1)[None]
    folded = fold_tokens(values, task.encoder.grid, token)
    assert folded.shape == (1, 2, *patch_size)
    assert torch.equal(folded[:, :1] // 1000, index)
    corner = folded[(0, 0, *(slice(edge) for edge in token))]
    assert torch.equal(corner.flatten(), within)
    assert torch.equal(folded[:, 1], -folded[:, 0])


def test_padding_and_visible_voxels_give_no_gradient(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    task(views).loss.backward()
    counted = views["hidden"] & views["valid"]
    assert counted.any()
    assert torch.equal(outputs[0].grad != 0, counted.expand_as(outputs[0]))


def test_no_visible_token_holds_padding(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    assert not (~views["hidden"] & ~views["valid"]).any()
    share = (~views["hidden"]).flatten(1).float().mean(1)
    assert share[0] == pytest.approx(0.25, abs=0.02)
    assert share[1] < share[0]


@pytest.mark.parametrize("train", [True, False])
def test_three_quarters_of_the_tokens_are_dropped(task, patch_size, train):
    batch = make_batch(patch_size)
    batch = replace(batch, valid=torch.ones_like(batch.valid))
    shapes = []
    task.encoder.eva.blocks[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    views = task.views(batch, RANDOM, train=train)
    task(views)
    assert shapes[0][1] == views["kept"].shape[1] == round(0.25 * (int(token_of_voxel(patch_size).max()) + 1))


def test_the_decoder_is_light(tiny_vit_plan):
    task = make_task(tiny_vit_plan((16, 24, 8)))
    assert len(task.decoder.eva.blocks) == 2
    attention = task.decoder.eva.blocks[0].attn
    assert attention.num_heads == 1
    assert attention.q_proj.out_features == task.encoder.head_width == 12
    assert task.decoder.eva.pos_embed.shape == (1, 8 * 6 * 2, 12)
    wide = make_task(tiny_vit_plan((16, 24, 8)), decoder_heads=1.0, decoder_depth=3)
    assert wide.decoder.eva.blocks[0].attn.q_proj.out_features == 24
    assert len(wide.decoder.eva.blocks) == 3


def test_the_plan_decides_recipe_and_drop_path(tiny_vit_plan):
    trainer = TRAINERS.get("MAETrainer").configured([], "vit")
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.betas) == ("adamw", 3e-4, (0.9, 0.98))
    assert (trainer.optim.weight_decay, trainer.optim.clip) == (5e-2, 1)
    assert (trainer.schedule.name, trainer.schedule.warmup_steps) == ("poly", 50 * 250)
    assert (trainer.num_epochs, trainer.steps_per_epoch, trainer.task_config.mask_ratio) == (1000, 250, 0.75)
    assert MAETrainer.configured(["optim.lr=1e-3"], "vit").optim.lr == 1e-3
    task = trainer.build_task(tiny_vit_plan().configuration("3d_fullres"), 4)
    assert task.encoder.eva.blocks[-1].drop_path1.drop_prob == 0.2


def test_a_ratio_that_hides_nothing_is_refused(tiny_vit_plan):
    with pytest.raises(ValueError, match=r"mask_ratio=0\.001 hides none of a patch's 96 tokens"):
        make_task(tiny_vit_plan((16, 24, 8)), mask_ratio=0.001)


@pytest.mark.parametrize("override", ["decoder_depth=0", "decoder_heads=0"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        MAETrainer.configured([override], "vit")
