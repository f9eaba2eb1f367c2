"""What makes self-distillation: a slow teacher, targets that stay apart, hidden tokens, and one update per step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.engine.distributed import World
from nnssl_ext.engine.steps import Stepper
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.backbone import descriptor, flat_tokens
from nnssl_ext.models.hidden import cells
from nnssl_ext.trainers.dino import DINO, DINOTrainer, DINOv2, DINOv2Config, DINOv2Trainer
from nnssl_ext.views.multicrop import MultiCropConfig

PATCHES = {"3d": (16, 24, 8), "2d": (24, 16)}
CROPS = MultiCropConfig(num_locals=2, parent_scale=1.0)
NUM_CASES = 12
TOTAL = 40


def make_task(plan, batch_size: int = 2, num_cases: int = NUM_CASES, **settings) -> DINOv2:
    torch.manual_seed(0)
    configuration = replace(plan.configuration(plan.configuration_names[0]), batch_size=batch_size)
    return DINOv2(DINOv2Config(**{"crops": CROPS, "prototypes": 32, **settings}), configuration, num_cases)


def make_batch(patch: tuple[int, ...], step: int = 0, size: int = 2) -> Batch:
    samples = tuple(range(step * size, (step + 1) * size))
    images = [torch.randn(1, *patch, generator=torch.Generator().manual_seed(n % NUM_CASES)) for n in samples]
    ones = torch.ones(size, 1, *patch, dtype=torch.bool)
    cases = tuple(f"case{n % NUM_CASES}" for n in samples)
    spacing = torch.ones(size, len(patch))
    return Batch(torch.stack(images), ones, cases, samples, torch.zeros_like(spacing).long(), spacing)


def views_of(task: DINO, batch: Batch, step: int = 0, train: bool = True) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return task.views(batch, SampleRandom(seed=1, step=step, samples=batch.samples), train)


def run(task: DINO, patch: tuple[int, ...], steps: range, rate: float = 1e-2) -> list[float]:
    """Plain gradient descent, so that nothing but the task has a state."""
    losses = []
    for step in steps:
        torch.manual_seed(step)  # dropped paths
        output = task.train()(views_of(task, make_batch(patch, step), step))
        task.zero_grad()
        output.loss.backward()
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
            task.after_step(step, TOTAL)
        losses.append(output.loss.item())
    return losses


@pytest.fixture(params=["cnn", "vit"])
def make_plan(request, tiny_plan, tiny_vit_plan):
    return tiny_plan if request.param == "cnn" else tiny_vit_plan


@pytest.fixture(params=PATCHES.values(), ids=PATCHES)
def patch(request) -> tuple[int, ...]:
    return request.param


def test_the_teacher_starts_as_the_student_gets_no_gradient_and_follows_once_per_step(make_plan, patch):
    """Fails if teacher and student are drawn apart, share weights, or if the loss trains both."""
    task = make_task(make_plan(patch))
    image = torch.randn(2, 1, *patch)
    task.eval()
    pairs = zip(task.teacher.encoder.feature_maps(image), task.encoder.feature_maps(image), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert torch.equal(task.teacher.head.weight, task.head.weight)
    before = {name: p.clone() for name, p in task.teacher.encoder.named_parameters()}
    run(task, patch, range(1))
    assert all(p.grad is None for p in task.teacher.parameters())
    student = dict(task.encoder.named_parameters())
    for name, now in task.teacher.encoder.named_parameters():
        assert torch.allclose(now, torch.lerp(student[name], before[name], 0.98), atol=1e-6), name


def test_accumulated_batches_move_teacher_centre_and_moments_once(tiny_plan):
    """Fails if a pass moves them: with two batches a step the teacher would then follow twice as fast."""
    patch = PATCHES["2d"]
    trainer = DINOv2Trainer(task_config=DINOv2Config(crops=CROPS), accumulate=2, num_epochs=1, steps_per_epoch=TOTAL)
    task = make_task(tiny_plan(patch))
    stepper = Stepper(task, trainer, device=torch.device("cpu"), world=World(), seed=0, precision="fp32")
    moved = {"teacher": 0, "centre": 0, "moments": 0}
    for name, module, method in (
        ("teacher", task.teacher, "follow"),
        ("centre", task.targets.centre, "update"),
        ("moments", task.standard, "update"),
    ):
        original = getattr(module, method)

        def count(*args, _name=name, _original=original, **kwargs):
            moved[_name] += 1
            return _original(*args, **kwargs)

        object.__setattr__(module, method, count)
    stepper.train_step([make_batch(patch, 0), make_batch(patch, 1)], 0)
    assert moved == {"teacher": 1, "centre": 1, "moments": 1}
    assert task.targets.centre.weight == pytest.approx(0.02, rel=1e-3)


def test_hidden_tokens_are_as_many_as_asked_for_and_in_one_view_of_each_sample(make_plan, patch):
    """Fails if the ratio is drawn in voxels, or rounds to what blocks give: a peer asked for .75 and got .15."""
    task = make_task(make_plan(patch))
    shares, chosen = [], []
    for step in range(40):
        views = views_of(task, make_batch(patch, step), step)
        assert views["hidden"].shape == (2, 1, *task.grid)
        shares += views["hidden"].flatten(1).float().mean(1).tolist()
        chosen += views["masked_view"].tolist()
    one = 1 / math.prod(task.grid)
    assert 0.3 - one <= min(shares) < 0.35 < 0.55 < max(shares) <= 0.6 + one
    assert sum(shares) / len(shares) == pytest.approx(0.45, abs=0.03)
    assert 0.3 < sum(chosen) / len(chosen) < 0.7
    share = task.eval()(views).metrics["hidden_share"]
    assert share.item() == pytest.approx(views["hidden"].float().mean().item())


def test_the_tokens_loss_is_the_slow_one(make_plan, patch):
    """Fails if tokens of student and teacher are of other places or views, or samples weigh by their tokens."""
    task = make_task(make_plan(patch), koleo_weight=0.0, mask_ratio=(0.1, 0.9))
    run(task, patch, range(6))
    views = views_of(task.eval(), make_batch(patch, 7), 7)
    losses = []
    with torch.no_grad():
        for row in range(2):
            image = views[f"global{int(views['masked_view'][row])}"][row : row + 1]
            hidden = views["hidden"][row : row + 1]
            ours = flat_tokens(task.fill_in(task.encoder, image, hidden))[0]
            theirs = flat_tokens(task.teacher.encoder.feature_maps(image)[task.level])[0]
            each = []
            for place in hidden.flatten().nonzero().flatten().tolist():
                scores = task.teacher.token_head(task.teacher_token_standard(theirs[place]))
                centre = task.token_targets.centre.mean / task.token_targets.centre.weight
                target = ((scores - centre) / task.token_targets.temperature).softmax(0)
                logits = task.token_head(task.token_standard(ours[place])) / 0.1
                each.append(-(target * logits.log_softmax(0)).sum().item())
            losses.append(sum(each) / len(each))
        assert task(views).metrics["ibot_loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-3)


def test_each_global_target_is_asked_of_every_other_view(make_plan, patch):
    task = make_task(make_plan(patch), ibot_weight=0.0, koleo_weight=0.0)
    run(task, patch, range(6))
    views = views_of(task.eval(), make_batch(patch, 7), 7)
    names = ["global0", "global1", "local0", "local1"]
    losses = []
    with torch.no_grad():
        for row in range(2):
            for target in names[:2]:
                asked = task.teacher_standard(descriptor(task.teacher.encoder(views[target][row : row + 1])))
                centre = task.targets.centre.mean / task.targets.centre.weight
                p = ((task.teacher.head(asked) - centre) / task.targets.temperature).softmax(1)
                for name in names:
                    if name != target:
                        q = task.head(task.standard(descriptor(task.encoder(views[name][row : row + 1])))) / 0.1
                        losses.append(-(p * q.log_softmax(1)).sum().item())
        assert len(losses) == 2 * 2 * 3
        assert task(views).loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"ibot_centring": "sinkhorn", "ibot_queue": 64, "gram_weight": 1.0, "gram_start": 0.1}],
    ids=["default", "balanced"],
)
def test_a_resumed_run_is_bitwise_the_same_with_teacher_centres_queues_and_anchor(tiny_vit_plan, settings):
    patch = PATCHES["2d"]
    whole, resumed = (make_task(tiny_vit_plan(patch), **settings) for _ in range(2))
    run(whole, patch, range(5))
    assert (whole.queue.keys >= 0).sum() == 10
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    expected = run(whole, patch, range(5, 8))
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1)
    resumed.load_state_dict(state)
    assert run(resumed, patch, range(5, 8)) == expected
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"ibot_centring": "sinkhorn", "ibot_queue": 64}], ids=["default", "balanced"])
def test_one_batch_that_overflows_is_forgotten(tiny_plan, settings):
    """Fails if a centre, moments or a queue take up what is not finite: every later loss would be no number."""
    patch = PATCHES["2d"]
    task = make_task(tiny_plan(patch), **settings)
    run(task, patch, range(2))
    views = views_of(task, make_batch(patch, 2), 2)
    with torch.no_grad():
        assert not task.train()({**views, "global0": views["global0"] * torch.nan}).loss.isfinite()
        task.after_step(2, TOTAL)  # without an update
    assert all(math.isfinite(loss) for loss in run(task, patch, range(3, 5)))
    assert not any(value.isnan().any() for value in task.state_dict().values())


@pytest.mark.parametrize("export", ["teacher", "student"])
def test_the_network_that_was_asked_for_is_handed_on(make_plan, patch, export):
    task = make_task(make_plan(patch), export=export)
    run(task, patch, range(3), rate=0.1)
    network, image = task.export_network(), torch.randn(1, 1, *patch)
    chosen, other = (task.teacher.encoder, task.encoder)[:: 1 if export == "teacher" else -1]
    with torch.no_grad():
        theirs = network.encoder(image)[-1] if chosen.kind == "cnn" else network.token_map(image)
        assert torch.equal(theirs, chosen.eval().feature_maps(image)[-1])
        assert not torch.allclose(theirs, other.eval().feature_maps(image)[-1], atol=1e-4)


def test_what_the_monitor_sees_is_float32_in_half_precision(tiny_plan):
    """Fails if the spread of tokens is taken of half-precision features: the alarm compares small spreads."""
    task = make_task(tiny_plan(PATCHES["2d"]))
    with torch.autocast("cpu", torch.bfloat16):
        shown = task(views_of(task, make_batch(PATCHES["2d"]))).embeddings
    assert all(value.dtype == torch.float32 for value in vars(shown).values())


def test_schedules_count_optimiser_steps_and_shorten_with_the_run(tiny_plan):
    """Fails if the temperature rises fast, if constants ignore a short run, or if a teacher's momentum reaches 1."""
    task = make_task(tiny_plan(PATCHES["2d"]))
    temperatures, moving = [], []
    for step in range(TOTAL):
        temperatures.append(task.targets.temperature.item())
        moving.append(task.head.moving.item())
        task.after_step(step, TOTAL)
    assert temperatures[0] == pytest.approx(0.04)
    assert temperatures[12] == pytest.approx(0.045)
    assert temperatures[24:] == pytest.approx([0.05] * 16)
    assert moving == [0.0] * 4 + [1.0] * 36  # a tenth of the run
    assert task.token_targets.temperature == task.targets.temperature
    assert task.token_head.moving == 1


def test_late_views_have_more_voxels_and_everything_goes_on_with_them(make_plan, patch):
    """Fails if hidden tokens stay on the small grid, or if a resumed run falls back to small views."""
    task = make_task(make_plan(patch), final_share=0.25, final_scale=1.5, gram_weight=1.0, gram_start=0.1)
    stride = task.encoder.strides[-1]
    larger = tuple(max(edge, step * round(edge * 1.5 / step)) for edge, step in zip(patch, stride, strict=True))
    for step, size in ((28, patch), (29, larger)):  # after 29 of 40 steps the last quarter is one step ahead
        task.after_step(step, TOTAL)
        assert views_of(task, make_batch(patch))["global0"].shape[2:] == size
    resumed = make_task(make_plan(patch), final_share=0.25, final_scale=1.5, gram_weight=1.0, gram_start=0.1)
    resumed.load_state_dict(task.state_dict())
    views = views_of(resumed, make_batch(patch))
    assert views["global1"].shape[2:] == larger
    assert views["local0"].shape[2:] == task.sizes[1]
    assert views["hidden"].shape[2:] == tuple(edge // step for edge, step in zip(larger, task.stride, strict=True))
    resumed._cast_anchor()
    output = resumed.train()(views)
    output.loss.backward()
    assert output.loss.isfinite()
    assert {"ibot_loss", "gram_loss"} <= set(output.metrics)


@pytest.mark.parametrize(
    ("trainer", "settings", "views", "copies"),
    [
        (DINOTrainer, [], 2.5, 2),
        (DINOv2Trainer, [], 3.5, 2),
        (DINOv2Trainer, ["ibot_weight=0", "crops.num_locals=8", "gram_weight=1"], 3.0, 3),
        (DINOTrainer, ["final_share=0.1", "final_scale=1.5", "crops.num_locals=0"], 6.75, 2),
    ],
)
def test_memory_is_asked_for_the_views_and_networks_there_are(tiny_plan, trainer, settings, views, copies):
    """Catches settings that change nothing, a planner's number of other settings, and an anchor that is not counted."""
    configuration = tiny_plan((32, 32, 32)).configuration("3d_fullres")
    cost = trainer.configured(settings).step_cost(configuration)
    assert (cost.views, cost.copies) == (pytest.approx(views), copies)
    if not settings:
        assert cost == trainer.cost


def test_prototypes_follow_the_cases_and_queues_never_hold_a_batch_twice(tiny_plan):
    plan = tiny_plan(PATCHES["2d"])
    assert make_task(plan, num_cases=100, prototypes=None).num_prototypes == 512
    for num_cases, size in ((12, 10), (3, 1), (2, 0), (10_000, 512)):
        assert len(make_task(plan, num_cases=num_cases).queue.keys) == size


def test_cases_of_one_kind_do_not_repel_each_other(tiny_plan):
    """Fails if two crops of a case, here or in the queue, push each other apart."""
    patch = PATCHES["2d"]
    task = make_task(tiny_plan(patch), ibot_weight=0.0)
    batch = replace(make_batch(patch), cases=("same", "same"))
    views = views_of(task, batch)
    assert task(views).metrics["koleo_loss"] == 0
    assert task(views).metrics["koleo_loss"] == 0  # the queue now holds it
    assert task({**views, "case": views["case"] + 1}).metrics["koleo_loss"] != 0


def test_balance_over_too_few_is_refused(tiny_plan):
    plan = tiny_plan(PATCHES["2d"])
    with pytest.raises(ValueError, match=r"centring=sinkhorn balances 4 samples over 256"):
        make_task(plan, prototypes=256, centring="sinkhorn")
    make_task(plan, prototypes=64, centring="sinkhorn")
    with pytest.raises(ValueError, match=r"ibot_centring=sinkhorn balances \d+ samples over 512"):
        make_task(plan, prototypes=512, ibot_centring="sinkhorn")
    make_task(plan, prototypes=448, ibot_centring="sinkhorn", ibot_queue=4096)
    with pytest.raises(ValueError, match=r"ibot_centring=sinkhorn balances 120 samples over 512"):  # 160 places
        make_task(plan, prototypes=512, ibot_centring="sinkhorn", ibot_queue=4096)


def test_blocks_that_cannot_make_up_the_share_are_refused(tiny_plan):
    """Fails if blocks of most of the grid are taken: then all or nothing is hidden, whatever was asked for."""
    plan = tiny_plan(PATCHES["2d"])  # 6 x 4 tokens
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) tokens, 67% of \(6, 4\).*mask_block=1"):
        make_task(plan, mask_block=4)
    task = make_task(plan, mask_block=2)
    shares = [views_of(task, make_batch(PATCHES["2d"], step), step)["hidden"].float().mean() for step in range(10)]
    assert all(0.3 - 1 / 12 <= share <= 0.6 + 1 / 12 for share in shares)


@pytest.mark.parametrize(
    "setting", ["ema=[0.99,1.0]", "teacher_temperature=[0,0.05]", "mask_ratio=[0.6,0.3]", "prototypes=1"]
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=setting.split("=")[0]):
        DINOv2Trainer.configured([setting])


def test_the_monitor_can_turn_every_knob(tiny_plan):
    patch = PATCHES["2d"]
    task = make_task(tiny_plan(patch), gram_weight=1.0)
    run(task, patch, range(2), rate=0.1)
    passes = []
    task.anchor.encoder.register_forward_hook(lambda *_: passes.append(1))
    assert "gram_loss" not in task.train()(views_of(task, make_batch(patch, 2), 2)).metrics
    assert not passes  # before there is an anchor its pass would be for nothing
    assert "2 times" in task.respond("spread")
    assert "4 times" in task.respond("spread")
    assert "anchored" in task.respond("anchor")
    assert task.anchored == 1
    run(task, patch, range(3, 4), rate=0.1)
    assert task(views_of(task, make_batch(patch, 4), 4)).metrics["gram_loss"] > 0
    assert passes
    task.respond("anchor")
    for ours, theirs in zip(task.anchor.encoder.parameters(), task.teacher.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    task.respond("soften")
    assert task.targets.temperature == task.token_targets.temperature
    assert task.targets.shift == pytest.approx(0.01)
    assert make_task(tiny_plan(patch), koleo_weight=0.0).respond("spread") == ""


def test_what_changed_in_either_head_is_told(tiny_plan):
    """Fails if the descriptors' head alone is asked: at its end a change of the tokens' would count as none."""
    task = make_task(tiny_plan(PATCHES["2d"]))
    for _ in range(2):
        task.targets.soften()
    assert "raised" in task.respond("soften")
    assert task.respond("soften").count("raised") == 1
    assert task.respond("soften") == ""


def test_a_sham_asks_for_the_targets_of_another_case(tiny_plan):
    patch = PATCHES["2d"]
    task = make_task(tiny_plan(patch)).eval()
    views = views_of(task, make_batch(patch))
    sham = task.sham(views, SampleRandom(seed=1, step=0, samples=(0, 1)))
    real, destroyed = task(views), task(sham)
    assert torch.allclose(destroyed.embeddings.targets, real.embeddings.targets.flip(0), atol=1e-5)
    assert torch.equal(destroyed.embeddings.first, real.embeddings.first)


def test_learning_rates_fall_towards_the_stem_and_cover_every_stage(make_plan):
    task = make_task(make_plan(PATCHES["3d"]))
    rates = {name: task.lr_scale(name) for name, _ in task.named_parameters()}
    vit = task.encoder.kind == "vit"
    blocks = ["encoder.eva.blocks.0.", "encoder.eva.blocks.1."]
    stages = blocks if vit else [f"encoder.module.stages.{number}." for number in range(3)]
    stem = "encoder.down_projection." if vit else "encoder.module.stem."
    expected = {stage: 0.9 ** (len(stages) - number) for number, stage in enumerate(stages)}
    expected[stem] = 0.9 ** (len(stages) + 1) * (0.2 if vit else 1)
    for part, rate in expected.items():
        found = [value for name, value in rates.items() if name.startswith(part)]
        assert found == [pytest.approx(rate)] * len(found) != []
    assert all(rate == 1 for name, rate in rates.items() if not name.startswith("encoder."))


def test_voxels_of_hidden_tokens_are_whole_cells(tiny_plan):
    """A token is hidden if and only if its whole stride cell is."""
    task = make_task(tiny_plan(PATCHES["3d"]))
    hidden = views_of(task, make_batch(PATCHES["3d"]))["hidden"]
    voxels = cells(hidden, task.stride).float()
    means = torch.nn.functional.avg_pool3d(voxels, task.stride)
    assert torch.equal(means, hidden.float())


def _state(task: DINOv2) -> dict[str, torch.Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in task.named_parameters() if p.grad is not None}
    return {**task.state_dict(), **gradients}


def _rank(rank: int, plan, settings: dict, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = make_task(plan, batch_size=2, **settings).train()
    for step in range(3):
        whole = make_batch(PATCHES["2d"], step, size=4)
        rows = slice(2 * rank, 2 * rank + 2)
        batch = replace(
            whole,
            **{n: getattr(whole, n)[rows] for n in ("data", "valid", "cases", "samples", "lower", "spacing")},
        )
        task.zero_grad()
        task(views_of(task, batch, step)).loss.backward()
        for parameter in task.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        task.after_step(step, TOTAL)
    torch.save(_state(task), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_with_twice_the_batch_does(tiny_plan, tmp_path: Path):
    """Fails if a centre, a balance, moments or a queue is a rank's own. Gloo, three steps of all but the optimiser."""
    settings = {"ibot_centring": "sinkhorn", "ibot_queue": 48}
    plan = tiny_plan(PATCHES["2d"])
    multiprocessing.spawn(_rank, (plan, settings, str(tmp_path)), nprocs=2)
    task = make_task(plan, batch_size=4, **settings).train()
    for step in range(3):
        task.zero_grad()
        task(views_of(task, make_batch(PATCHES["2d"], step, size=4), step)).loss.backward()
        task.after_step(step, TOTAL)
    expected = _state(task)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == set(expected)
        for name, value in expected.items():
            largest = value.nan_to_num(posinf=0).abs().max() if value.numel() and value.is_floating_point() else 0
            assert torch.allclose(found[name], value, rtol=0, atol=5e-6 + 1e-3 * float(largest)), name
