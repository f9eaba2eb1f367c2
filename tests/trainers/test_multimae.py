"""MultiMAE: what is seen of each modality, what is asked for, and how the stem of all of them serves each."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.trainers.multimae import STEM, MultiMAE, MultiMAETrainer
from tests.tasks import disturb, task_on

MODALITIES = 3
RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))


def make_batch(patch_size: tuple[int, ...], channels: int = MODALITIES) -> Batch:
    """Three crops; the second is padded along the first axis, by no whole number of tokens."""
    data = torch.randn(3, channels, *patch_size, generator=torch.Generator().manual_seed(0)) + 0.5
    valid = torch.ones(3, 1, *patch_size, dtype=torch.bool)
    valid[1, :, -5:] = False
    spacing = torch.ones(3, len(patch_size))
    lower = torch.zeros_like(spacing, dtype=torch.int64)
    return Batch(data * valid, valid, ("a", "b", "c"), RANDOM.samples, lower, spacing)


def make_task(plan, **settings) -> MultiMAE:
    return disturb(task_on(MultiMAE, plan, **settings)).eval()


@pytest.fixture
def task(tiny_vit_plan, patch_size) -> MultiMAE:
    return make_task(tiny_vit_plan(patch_size, MODALITIES))


def seen_of(task: MultiMAE, kept: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Which voxels (M, *patch) of a sample the numbers (n,) name, by counting tokens box by box."""
    seen = torch.zeros(MODALITIES, *shape, dtype=torch.bool)
    places = torch.cartesian_prod(*map(torch.arange, task.encoder.grid)).tolist()
    for number in kept[kept >= 0].tolist():
        place = places[number % len(places)]
        box = (slice(p * edge, (p + 1) * edge) for p, edge in zip(place, task.encoder.token_size, strict=True))
        seen[(number // len(places), *box)] = True
    return seen


@pytest.mark.parametrize("train", [True, False])
def test_the_encoder_sees_the_same_number_of_tokens_of_every_sample(task, patch_size, train):
    """And the global token beside them, whatever of each modality is shown."""
    lengths = []
    task.encoder.eva.blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    views = task.views(make_batch(patch_size), RANDOM, train)
    task(views)
    assert task.parent_scale == 1  # no more is read than a patch
    number = round(MODALITIES * task.num_tokens / 6)
    assert lengths == [number + 1]
    assert (views["kept"] >= 0).all()


def test_hidden_voxels_and_tokens_agree(task, patch_size):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    for kept, hidden in zip(views["kept"], views["hidden"], strict=True):
        assert torch.equal(hidden, ~seen_of(task, kept, patch_size))
    assert not (~views["hidden"] & ~views["valid"]).any()


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_hidden_voxels_never_reach_the_network(task, patch_size, rubbish):
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    loss = task(views | {"image": views["image"].masked_fill(views["hidden"], rubbish)}).loss
    assert torch.equal(loss, task(views).loss)
    loss.backward()
    assert torch.isfinite(task.encoder.down_projection.proj.weight.grad).all()


def test_every_visible_voxel_reaches_every_modality(task, patch_size):
    """Catches visible tokens that are dropped, or put where another one belongs."""
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    for number in range(MODALITIES):
        image = views["image"].clone().requires_grad_()
        output = task(views | {"image": image, "asked": only(views["asked"], number)})
        output.loss.backward()
        assert torch.equal(image.grad != 0, ~views["hidden"])


def only(asked: torch.Tensor, number: int) -> torch.Tensor:
    """Asks for one modality alone."""
    return asked & (torch.arange(MODALITIES) == number).view(-1, *[1] * (asked.ndim - 2))


def test_each_modality_has_its_own_projection(task, patch_size):
    """A gradient reaches each, and only from its own tokens; without visible tokens it gets none, and all stays finite.

    Catches one projection for all, and channels that are mixed up.
    """
    views = task.views(make_batch(patch_size), RANDOM, train=False)
    for shown in range(MODALITIES):
        kept = torch.arange(8).expand(3, -1) + shown * task.num_tokens
        hidden = torch.stack([~seen_of(task, row, patch_size) for row in kept])
        task.zero_grad()
        output = task(views | {"kept": kept, "hidden": hidden})
        output.loss.backward()
        reached = task.encoder.down_projection.proj.weight.grad.transpose(0, 1).flatten(1).any(1)
        assert reached.tolist() == [number == shown for number in range(MODALITIES)]
        assert torch.isfinite(output.loss)
        assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)
        assert not torch.isnan(output.images["output"]).any()


def test_the_stock_token_is_the_mean_of_the_modalities_tokens(task, patch_size):
    """So that one stem serves both.

    Catches a sum for a mean, a bias that counts M times, embeddings that do not cancel, and tokens in another order.
    """
    x = make_batch(patch_size).data
    stock = task.encoder.down_projection(x).flatten(2).transpose(1, 2) + task.encoder.positions(task.encoder.grid)
    tokens = task.embed(x).view(3, MODALITIES, task.num_tokens, -1)
    torch.testing.assert_close(tokens.mean(1), stock, atol=1e-5, rtol=1e-5)
    other = x.clone()
    other[:, 1] += 1
    changed = (task.embed(other).view_as(tokens) != tokens).flatten(2).any(2)
    assert changed.tolist() == [[False, True, False]] * 3


def test_agreeing_modalities_are_encoded_as_the_stock_network_does(task, patch_size):
    """Where all modalities have the same token, attention to all of them is attention to one: the exported network
    computes the features of pretraining."""
    with torch.no_grad():
        stem = task.encoder.down_projection.proj.weight
        stem.copy_(stem[:, :1].expand_as(stem))
        task.modality.copy_(task.modality[:1].expand_as(task.modality))
    x = make_batch(patch_size).data[:, :1].expand(-1, MODALITIES, *patch_size)
    table = task.encoder.eva.rope.get_embed()
    together = task.encoder.attend(task.embed(x), table.repeat(MODALITIES, 1)).view(3, MODALITIES, task.num_tokens, -1)
    stock = task.encoder.feature_maps(x)[0].flatten(2).transpose(1, 2)
    for number in range(MODALITIES):
        torch.testing.assert_close(together[:, number], stock, atol=1e-4, rtol=1e-4)


def test_order_of_the_visible_tokens_does_not_matter(task, patch_size):
    """Place, rotary row and modality follow the token. Catches rotary rows that are gathered by another number."""
    x = make_batch(patch_size).data
    kept = task.views(make_batch(patch_size), RANDOM, train=False)["kept"]
    order = torch.randperm(kept.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(task.encode(x, kept[:, order]), task.encode(x, kept)[:, order])
    rows = []
    task.encoder.eva.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["rope"]), with_kwargs=True
    )
    task.encode(x, kept)
    table = task.encoder.eva.rope.get_embed()
    width = table.shape[1] // 2
    assert torch.equal(rows[0][:, 0, 0], torch.cat([torch.zeros(width), torch.ones(width)]).expand(3, -1))
    assert torch.equal(rows[0][:, 0, 1:], table[kept % task.num_tokens])


def test_loss_is_that_of_a_slow_version(task, patch_size):
    """Token by token: normalised target, hidden tokens only, flat ones left out, mean over samples and modalities."""
    batch = make_batch(patch_size)
    flat = tuple(slice(edge) for edge in task.encoder.token_size)
    batch.data[(slice(None), 1, *flat)] *= 0.01
    views = task.views(batch, RANDOM, train=False)
    output = task(views)
    expected, left_out = [], 0
    places = torch.cartesian_prod(*map(torch.arange, task.encoder.grid)).tolist()
    for row in range(3):
        for modality in range(MODALITIES):
            errors = []
            for number, place in enumerate(places):
                if modality * len(places) + number in views["kept"][row]:
                    continue
                box = tuple(
                    slice(p * edge, (p + 1) * edge) for p, edge in zip(place, task.encoder.token_size, strict=True)
                )
                real = batch.valid[(row, 0, *box)]
                values = batch.data[(row, modality, *box)][real].double()
                if not len(values) or values.var(correction=0) < 0.05**2:
                    left_out += 1
                    continue
                wanted = (values - values.mean()) / (values.var(correction=0) + 1e-6).sqrt()
                errors.append((output.images["output"][(row, modality, *box)][real] - wanted).square())
            expected.append(torch.cat(errors).mean())
    assert left_out > 0
    assert output.loss.item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-4)


def test_one_modality_is_restored_from_the_other(tiny_vit_plan):
    """Noise, and the same noise inverted: with one of them shown whole, the other one is known.

    Catches decoders that look at their own modality alone, or at wrong places: they stay at chance.
    """
    task = make_task(tiny_vit_plan((24, 16), 2)).train()
    patterns = torch.stack([torch.linspace(-1, 1, 4)[:, None].expand(4, 4), torch.linspace(-1, 1, 4).expand(4, 4)])
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    shown = torch.arange(24).expand(8, -1)
    hidden = (torch.arange(2) == 1).view(1, 2, 1, 1).expand(8, 2, 24, 16)
    real = torch.ones_like(hidden)
    for step in range(121):
        signs = torch.randn(8, 2, 6, 4, generator=draw).sign()
        picture = torch.einsum("bphw,pij->bhiwj", signs, patterns).reshape(8, 1, 24, 16)
        picture = picture / picture.std()
        image = torch.cat([picture, -picture], 1)
        views = {"image": image, "target": image, "kept": shown, "hidden": hidden, "asked": real, "valid": real[:, :1]}
        task.train(step < 120)
        output = task(views)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["mse"] < 0.5 * output.metrics["mse_chance"]


def test_decoders_are_light_and_bounded_by_the_encoder(tiny_vit_plan):
    plan = tiny_vit_plan((16, 24, 8), 2)
    task = make_task(plan)
    assert len(task.decoders) == 2
    for decoder in task.decoders:
        assert len(decoder.blocks) == 2
        assert decoder.position.shape == (1, 96, 24)  # 256 would be wider than the encoder
    assert make_task(plan, decoder_width=12).decoders[0].position.shape == (1, 96, 12)
    assert make_task(plan, decoder_width=5).decoders[0].position.shape == (1, 96, 12)


def test_projections_move_at_the_recipes_rate(tiny_vit_plan):
    """A projection is M times the stem's slice, so the stem moves M times slower."""
    task = make_task(tiny_vit_plan((24, 16), 2))
    assert STEM in dict(task.named_parameters())
    assert task.lr_scale(STEM) == 0.5
    assert {task.lr_scale(name) for name, _ in task.named_parameters()} == {0.5, 1.0}


def test_one_modality_is_refused(tiny_vit_plan):
    assert MultiMAE.info.needs == DataNeeds(channels=2)
    with pytest.raises(ValueError, match=r"configuration '3d_fullres' has 1: use a dataset of 2 or more .* MAETrainer"):
        make_task(tiny_vit_plan((16, 24, 8), 1))


@pytest.mark.parametrize("override", ["mask_ratio=1.0", "decoder_depth=0", "decoder_width=0"])
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        MultiMAETrainer.configured([override], "vit")


def test_the_recipe(tiny_vit_plan):
    trainer = MultiMAETrainer.configured([], "vit")
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.betas) == ("adamw", 3e-4, (0.9, 0.95))
    assert (trainer.optim.weight_decay, trainer.schedule.name, trainer.schedule.warmup_steps) == (0.05, "cosine", 10000)
    assert (trainer.task_config.decoder_depth, trainer.task_config.decoder_width) == (2, 256)
