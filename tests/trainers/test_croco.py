"""CroCo: two views of one anatomy, one of them nearly hidden; where they look, what is seen of them, what is asked."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.checkpoint import build_checkpoint
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.trainers.croco import CroCo, CroCoTrainer
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.spatial import SpatialConfig
from tests.tasks import disturb, task_on

TOKENS = {2: (4, 4), 3: (2, 4, 4)}
SPACING = {2: (2.5, 1.0), 3: (2.5, 1.0, 1.0)}
FIRST_VOXEL = 10
"""Where the crops begin in their volumes, so that no coordinate of a real voxel is 0, as that of padding is."""
ROWS = 8
RANDOM = SampleRandom(seed=3, step=5, samples=tuple(range(ROWS)))
LEARNING_STEPS = 120
MOVED = SpatialConfig(flip=0, rotation=1, scaling=0, elastic=1)
STILL = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)


def make_task(plan, **settings) -> CroCo:
    return disturb(task_on(CroCo, plan, **{"decoder_depth": 2, **settings})).eval()


def make_batch(data: torch.Tensor, valid: torch.Tensor | None = None) -> Batch:
    rows, shape = len(data), data.shape[2:]
    valid = torch.ones(rows, 1, *shape, dtype=torch.bool) if valid is None else valid
    spacing = torch.tensor(SPACING[len(shape)]).expand(rows, -1)
    lower = torch.full((rows, len(shape)), FIRST_VOXEL)
    cases = tuple(f"case{row}" for row in range(rows))
    return Batch(data * valid, valid, cases, tuple(range(rows)), lower, spacing)


def parent(patch_size, scale: float = 1.4) -> list[int]:
    return [round(size * scale) for size in patch_size]


def noise(patch_size, channels: int = 1, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, channels, *parent(patch_size), generator=torch.Generator().manual_seed(0)) + 0.5


def scanner_coordinates(shape) -> torch.Tensor:
    """Images (ROWS, D, *shape) whose voxels hold where they lie, in mm; every case lies somewhere else."""
    axes = [(FIRST_VOXEL + torch.arange(size)) * step for size, step in zip(shape, SPACING[len(shape)], strict=True)]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return place + 200 * torch.arange(ROWS).view(-1, 1, *[1] * len(shape))


@pytest.fixture
def task(tiny_vit_plan, patch_size) -> CroCo:
    return make_task(tiny_vit_plan(patch_size))


@pytest.fixture
def located(tiny_vit_plan, patch_size) -> CroCo:
    """Takes coordinates and a landmark as channels, which rotation and deformation move and nothing else changes."""
    plan = tiny_vit_plan(patch_size, channels=len(patch_size) + 1)
    return make_task(plan, spatial=MOVED, intensity=STILL)


def hidden_of(views, task) -> torch.Tensor:
    """(B, 1, *patch), by token indices and nothing of the code under test."""
    token, shape = task.encoder.token_size, views["first"].shape[2:]
    grid = [size // edge for size, edge in zip(shape, token, strict=True)]
    index = torch.arange(torch.Size(grid).numel()).view(1, 1, *grid)
    for axis, edge in enumerate(token, start=2):
        index = index.repeat_interleave(edge, axis)
    return torch.stack([~torch.isin(index[0], kept) for kept in views["kept"]])


def test_the_second_view_shows_the_hidden_anatomy(located, patch_size):
    """Both views look at the same millimetres, turned, deformed and of anisotropic voxels.

    Catches a second view cut from another case or another crop, a transform whose axes are mixed up, and an `overlap`
    that is said but not there.
    """
    dims = len(patch_size)
    place = scanner_coordinates(parent(patch_size))
    data = torch.cat([place, torch.zeros_like(place[:, :1])], 1)
    views = located.views(make_batch(data), RANDOM, train=True)
    counted = hidden_of(views, located) & views["valid"]
    step = torch.tensor(SPACING[dims])
    shares = []
    for row in range(ROWS):
        asked = views["first"][row, :dims].movedim(0, -1)[counted[row, 0]] / step
        offered = views["second"][row, :dims].movedim(0, -1) / step
        edge = max(offered.diff(dim=axis).norm(dim=-1).mean() for axis in range(dims))
        seen = torch.cdist(asked, offered.flatten(0, -2)).amin(1) < 0.6 * dims**0.5 * edge  # half a voxel's diagonal
        claimed = views["shown"][row, 0][counted[row, 0]]
        assert (claimed & ~seen).float().mean() < 0.02
        assert (claimed == seen).float().mean() > 0.75  # they differ at the rim, by half a voxel and the deformation
        shares.append(seen.float().mean().item())
    assert min(shares) > 0.2
    assert sum(shares) / ROWS > 0.5
    assert sum(shares) / ROWS - 0.2 < located(views).metrics["overlap"] < sum(shares) / ROWS


def test_a_landmark_is_found_in_both_views(located, patch_size):
    """A spot planted where the first view hides it lies, in both views, at voxels that look at its millimetres."""
    dims = len(patch_size)
    place = scanner_coordinates(parent(patch_size))
    step = torch.tensor(SPACING[dims])
    empty = make_batch(torch.cat([place, torch.zeros_like(place[:, :1])], 1))
    views = located.views(empty, RANDOM, train=True)
    core = -functional.max_pool3d(
        -(views["shown"].float() if dims == 3 else views["shown"].float()[:, :, None]), 3, 1, 1
    )
    candidates = (core.view_as(views["shown"]) > 0) & hidden_of(views, located)
    found = [row for row in range(ROWS) if candidates[row].any()]
    assert len(found) > ROWS // 2
    for row in found:
        spot = views["first"][row, :dims].movedim(0, -1)[candidates[row, 0]][0]
        distance = ((place[row].movedim(0, -1) - spot) / step).norm(dim=-1)
        empty.data[row, dims] = torch.exp(-(distance**2) / (2 * 1.5**2))
        again = located.views(empty, RANDOM, train=True)
        for name in ("first", "second"):
            peak = again[name][row, dims].argmax()
            where = again[name][row, :dims].flatten(1)[:, peak]
            assert ((where - spot) / step).norm() < 1.5, name


def test_the_two_views_differ(task, patch_size):
    """Catches one set of draws used for both views: the task would be to copy."""
    for train in (True, False):
        views = task.views(make_batch(noise(patch_size)), RANDOM, train)
        assert ((views["first"] - views["second"]).abs().flatten(1).amax(1) > 0.1).all()


def test_padding_is_seen_in_neither_view(tiny_vit_plan, patch_size):
    """Real voxels hold 1, padding 0: every seen token holds ones only. The padding is no box, so views contain it."""
    task = make_task(tiny_vit_plan(patch_size), spatial=MOVED, intensity=STILL)
    shape = parent(patch_size)
    valid = torch.ones(ROWS, 1, *shape, dtype=torch.bool)
    valid[(slice(None), slice(None), *(slice(size // 2) for size in shape))] = False
    views = task.views(make_batch(torch.ones(ROWS, 1, *shape), valid), RANDOM, train=True)
    grid = task.encoder.grid
    for name, kept in (("first", views["kept"]), ("second", views["second_kept"])):
        assert (views[name] == 0).any()
        boxes = views[name]
        for axis, edge in enumerate(task.encoder.token_size, start=2):
            boxes = boxes.unflatten(axis, (-1, edge)).amin(axis + 1)
        assert boxes.shape[2:] == grid
        seen = boxes.flatten(1).gather(1, kept.clamp(min=0))[kept >= 0]
        torch.testing.assert_close(seen, torch.ones_like(seen), atol=1e-3, rtol=0)  # rounding of coordinates
        whole = (boxes.flatten(1) > 0.99).sum(1)
        assert ((views["second_kept"] >= 0).sum(1) == whole).all() or name == "first"


def test_a_tenth_of_the_first_view_and_all_of_the_second_are_seen(task, patch_size):
    lengths = []
    task.encoder.eva.blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    views = task.views(make_batch(noise(patch_size)), RANDOM, train=True)
    task(views)
    number = torch.Size(task.encoder.grid).numel()
    assert lengths == [round(0.1 * number), number]
    assert (views["second_kept"] == torch.arange(number)).all()


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_hidden_voxels_never_reach_the_network(task, patch_size, rubbish):
    views = task.views(make_batch(noise(patch_size)), RANDOM, train=False)
    spoilt = views | {"first": views["first"].masked_fill(hidden_of(views, task), rubbish)}
    loss = task(spoilt).loss
    assert torch.equal(loss, task(views).loss)
    loss.backward()
    assert torch.isfinite(task.encoder.down_projection.proj.weight.grad).all()


def test_every_visible_voxel_of_both_views_reaches_the_prediction(task, patch_size):
    views = task.views(make_batch(noise(patch_size)), RANDOM, train=False)
    first, second = views["first"].requires_grad_(), views["second"].requires_grad_()
    task.train()(views | {"first": first, "second": second}).loss.backward()
    assert torch.equal(first.grad != 0, ~hidden_of(views, task))
    assert (second.grad != 0).all()


def test_loss_is_that_of_a_slow_version(tiny_vit_plan, patch_size):
    """Token by token and channel by channel: normalised target, error on hidden tokens, mean over samples."""
    task = make_task(tiny_vit_plan(patch_size, channels=2))
    data = noise(patch_size, channels=2, rows=2)
    valid = torch.ones(2, 1, *data.shape[2:], dtype=torch.bool)
    valid[1, :, : data.shape[2] // 3, : data.shape[3] // 2] = False
    views = task.views(make_batch(data, valid), replace(RANDOM, samples=(0, 1)), train=False)
    outputs = []
    task.decoder.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    loss = task(views).loss
    assert (~views["valid"]).any()
    grid, token = task.encoder.grid, task.encoder.token_size
    expected = []
    for row in range(2):
        errors = []
        for number, place in enumerate(torch.cartesian_prod(*map(torch.arange, grid)).tolist()):
            if number in views["kept"][row]:
                continue
            box = tuple(slice(p * edge, (p + 1) * edge) for p, edge in zip(place, token, strict=True))
            real = views["valid"][(row, 0, *box)]
            for channel in range(2):
                values = views["first"][(row, channel, *box)][real].double()
                if not len(values):
                    continue
                wanted = (values - values.mean()) / (values.var(correction=0) + 1e-6).sqrt()
                errors.append((outputs[0][(row, channel, *box)][real] - wanted).square())
        expected.append(torch.cat(errors).mean())
    assert loss.item() == pytest.approx(sum(expected).item() / 2, rel=1e-4)


def test_a_pair_of_one_session(tiny_vit_plan, patch_size):
    """The first view is of the first image of every session, the second of the second, at the same place."""
    task = make_task(tiny_vit_plan(patch_size), pair="session")
    assert task.needs == DataNeeds(images=2, same="session")
    assert make_task(tiny_vit_plan(patch_size)).needs == DataNeeds()
    rows = torch.arange(1.0, ROWS + 1).view(-1, 1, *[1] * len(patch_size))
    views = task.views(make_batch(rows.expand(-1, 1, *parent(patch_size))), RANDOM, train=False)
    for name, wanted in (("first", rows[0::2]), ("second", rows[1::2])):
        torch.testing.assert_close(views[name], wanted.expand_as(views[name]))
    assert {len(value) for value in views.values()} == {ROWS // 2}
    assert views["shown"].float().mean() > 0.5
    assert torch.isfinite(task(views).loss)


def test_it_restores_what_only_the_second_view_tells(tiny_vit_plan):
    """Every token of every picture is drawn anew, so nothing but the second view says what is hidden.

    Catches a decoder without cross-attention, or one that looks at the wrong sample or place: it stays at chance.
    """
    plan = tiny_vit_plan((24, 16))
    task = make_task(plan, parent_scale=1.0, crop_scale=(1.0, 1.0), decoder_heads=1.0).train()
    patterns = torch.stack([torch.linspace(-1, 1, 4)[:, None].expand(4, 4), torch.linspace(-1, 1, 4).expand(4, 4)])
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for step in range(LEARNING_STEPS + 1):
        signs = torch.randn(ROWS, 2, 6, 4, generator=draw).sign()
        pictures = torch.einsum("bphw,pij->bhiwj", signs, patterns).reshape(ROWS, 1, 24, 16)
        task.train(step < LEARNING_STEPS)
        output = task(task.views(make_batch(pictures), replace(RANDOM, step=step), train=False))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["mse"] < 0.5 * output.metrics["mse_chance"]
    assert output.metrics["mse_other_case"] > output.metrics["mse_chance"]


def test_the_recipe_is_the_published_one(tiny_vit_plan):
    trainer = CroCoTrainer.configured([], "vit")
    assert (trainer.optim.name, trainer.optim.lr, trainer.optim.betas) == ("adamw", 1.5e-4, (0.9, 0.95))
    assert (trainer.optim.weight_decay, trainer.schedule.name, trainer.schedule.warmup_steps) == (0.05, "cosine", 10000)
    assert (trainer.task_config.mask_ratio, trainer.task_config.decoder_depth) == (0.9, 8)
    task = trainer.build_task(tiny_vit_plan().configuration("3d_fullres"), 4)
    assert len(task.decoder.blocks) == 8
    assert task.parent_scale == 1.4


def test_the_final_checkpoint_keeps_the_decoder(tiny_vit_plan):
    """Catches a decoder that is gone with the state that only resuming needs."""
    plan = tiny_vit_plan((24, 16))
    task = make_task(plan)
    final = build_checkpoint(task, CroCoTrainer(), plan, content_hashes=[])
    predictor, decoder = final["nnssl_pretraining"]["predictor"], task.decoder.state_dict()
    assert predictor.keys() == {f"decoder.{name}" for name in decoder}
    assert all(torch.equal(predictor[f"decoder.{name}"], value) for name, value in decoder.items())


def test_a_plan_without_tokens_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="CroCoTrainer runs on a vit"):
        CroCoTrainer.configured([]).build_task(tiny_plan().configuration("3d_fullres"), 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask_ratio=1.0", "mask_ratio"),
        ("pair=case", "pair"),
        ("parent_scale=0.9", "parent_scale=0.9 must be 1 or more"),
        ("crop_scale=[0,0.9]", r"crop_scale=.* must be two numbers in \(0, 1\]"),
        ("shift=1", r"shift=1.* must lie in \[0, 1\)"),
        ("decoder_depth=0", "decoder_depth"),
        ("decoder_heads=0", "decoder_heads"),
    ],
)
def test_impossible_settings_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        CroCoTrainer.configured([override], "vit")


def test_a_ratio_that_hides_nothing_is_refused(tiny_vit_plan):
    with pytest.raises(ValueError, match=r"mask_ratio=0\.001 hides none of a patch's 96 tokens"):
        make_task(tiny_vit_plan((16, 24, 8)), mask_ratio=0.001)
