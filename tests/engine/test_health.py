"""The numbers of health by hand, what they are on collapsed embeddings, and which alarm each sickness sounds."""

import math
from dataclasses import replace

import pytest
import torch

from nnssl_ext.engine.alarms import HealthConfig, judge
from nnssl_ext.engine.health import (
    CaseQueue,
    Monitor,
    Retrieval,
    between_share,
    bootstrap_interval,
    chance_of_reciprocal_rank,
    merge,
    mutual_information,
    reciprocal_ranks,
    relative_entropy,
    statistics,
)
from nnssl_ext.engine.task import Embeddings

CONFIG = HealthConfig()
CPU = torch.device("cpu")


def embeddings(rows: int, generator: torch.Generator, noise: float = 0.1, width: int = 16) -> Embeddings:
    """Cases with a place of their own, seen twice with some noise."""
    cases = torch.randn(rows, width, generator=generator)
    views = [cases + noise * torch.randn(rows, width, generator=generator) for _ in range(2)]
    targets = (8 * torch.randn(rows, 32, generator=generator)).softmax(1)
    return Embeddings(first=views[0], second=views[1], targets=targets, token_spread=torch.full((rows,), 0.6))


def as_queue(shown: Embeddings, cases: list[str] | None = None) -> dict[str, torch.Tensor]:
    queue = CaseQueue(512)
    queue.add(cases or [f"case{row}" for row in range(len(shown.first))], shown)
    return merge([queue.state()], 512)["rows"]


def test_entropy_is_1_for_flat_and_0_for_sure_targets():
    half = torch.tensor([[0.5, 0.5, 1e-9, 1e-9]])
    assert relative_entropy(torch.full((3, 4), 0.25)) == pytest.approx(1.0)
    assert relative_entropy(torch.eye(4)) == 0.0
    assert relative_entropy(half) == pytest.approx(0.5, abs=1e-6)


def test_prototypes_out_of_use_do_not_count():
    """Fails if flat targets over half of the prototypes are not flat: after a halving none would be seen any more."""
    assert relative_entropy(torch.tensor([[0.25] * 4 + [0.0] * 4] * 3)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("targets", "nats", "share"),
    [
        (torch.eye(4), math.log(4), 1.0),
        (torch.tensor([[1.0, 0, 0, 0]] * 4), 0.0, 0.0),
        (torch.full((4, 4), 0.25), 0.0, 0.0),
        (torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]), math.log(2), 1.0),
        (torch.tensor([[1.0, 0, 1e-9], [1, 0, 0], [0, 1, 0], [0, 1, 0]]), math.log(2), math.log(2) / math.log(3)),
    ],
    ids=["a prototype each", "one prototype", "flat", "two in use", "two of three"],
)
def test_mutual_information_sees_both_ways_to_collapse(targets, nats, share):
    assert mutual_information(targets) == pytest.approx((nats, share), abs=1e-6)


def test_between_share_is_the_formula_and_sees_what_rank_misses():
    first = torch.tensor([[1.0, 0], [3, 0]])
    second = torch.tensor([[1.0, 2], [3, 2]])
    assert between_share(first, second) == pytest.approx(1 / (1 + 2))  # means 1 apart either way, views 2 apart
    generator = torch.Generator().manual_seed(0)
    cases, noise = torch.randn(50, 8, generator=generator), torch.randn(2, 50, 8, generator=generator)
    shrunk = [0.01 * cases + 0.1 * each for each in noise]
    assert between_share(cases, cases) == pytest.approx(1.0)
    assert between_share(*shrunk) < 0.6
    assert between_share(torch.ones(4, 3), torch.ones(4, 3)) == 0.0


def test_reciprocal_ranks_by_hand():
    first = torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    assert reciprocal_ranks(first, first).tolist() == [1.0, 1.0, 1.0]
    swapped = first[[1, 0, 2]]
    assert reciprocal_ranks(first, swapped).tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_a_collapse_to_one_point_does_not_look_like_retrieval():
    """Ties must not count as found: with `ahead` alone every rank would be 1."""
    ranks = reciprocal_ranks(torch.ones(9, 4), torch.ones(9, 4))
    assert ranks.tolist() == pytest.approx([1 / 5] * 9)


def test_random_views_are_found_at_chance():
    generator = torch.Generator().manual_seed(0)
    ranks = reciprocal_ranks(*torch.randn(2, 400, 16, generator=generator))
    assert ranks.mean().item() == pytest.approx(chance_of_reciprocal_rank(400), abs=0.01)
    assert chance_of_reciprocal_rank(2) == 0.75


def test_the_interval_covers_what_resampling_gives():
    values = torch.cat([torch.zeros(50), torch.ones(50)])
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.02)


def test_the_queue_keeps_the_newest_row_of_each_case_and_forgets_the_oldest():
    queue = CaseQueue(8)
    for step in range(12):
        rows = torch.full((2, 3), float(step))
        queue.add([f"case{step}", "always"], Embeddings(first=rows, second=rows))
    merged = merge([queue.state()], 8)["rows"]
    assert sorted(merged["first"][:, 0].tolist()) == [5, 6, 7, 8, 9, 10, 11, 11]
    assert "case" not in str(queue.state()["keys"])


def test_a_queue_goes_on_from_its_state_and_ranks_make_one_queue():
    generator = torch.Generator().manual_seed(0)
    shown = embeddings(6, generator)
    whole, parts = CaseQueue(8), [CaseQueue(8), CaseQueue(8)]
    names = [f"case{row}" for row in range(6)]
    whole.add(names, shown)
    for part, rows in zip(parts, (slice(0, 3), slice(3, 6)), strict=True):
        part.add(names[rows], Embeddings(**{name: value[rows] for name, value in vars(shown).items()}))
    resumed = CaseQueue(8)
    resumed.load_state(whole.state(), CPU)
    expected = merge([whole.state()], 8)["rows"]
    for states in ([part.state() for part in reversed(parts)], [resumed.state()]):
        other = merge(states, 8)["rows"]
        assert all(torch.equal(other[name], expected[name]) for name in expected)


def rows_of(value: float) -> Embeddings:
    return Embeddings(first=torch.full((1, 3), value), second=torch.full((1, 3), value))


def test_the_newest_row_of_a_case_wins_whichever_rank_saw_it():
    """Fault: the last rank's row counts, however old it is."""
    queues = [CaseQueue(8), CaseQueue(8)]
    for first, second in (("new", "old"), ("a", "b"), ("old", "new")):
        for queue, case in zip(queues, (first, second), strict=True):
            queue.add([case], rows_of(float(queue.clock)))
    for states in ([queue.state() for queue in queues], [queue.state() for queue in reversed(queues)]):
        rows = merge(states, 8)["rows"]["first"][:, 0]
        assert sorted(rows.tolist()) == [1.0, 1.0, 2.0, 2.0]


def test_all_ranks_go_on_from_what_all_ranks_had_seen(monkeypatch):
    """Ranks whose cases are thrown away, or taken for newer than they are, change the numbers of a resumed run."""
    undisturbed = [CaseQueue(8), CaseQueue(8)]

    def see(queues: list[CaseQueue], steps: range) -> None:
        for step in steps:
            for rank, queue in enumerate(queues):
                queue.add([f"case{(2 * step + 7 * rank) % 13}"], rows_of(float(2 * step + rank)))

    see(undisturbed, range(9))
    watching = Monitor(HealthConfig(queue=8), 1000)
    monkeypatch.setattr("nnssl_ext.engine.health.gather", lambda state: [queue.state() for queue in undisturbed])
    saved = watching.state()["queue"]
    resumed = [CaseQueue(8), CaseQueue(8)]
    for queue in resumed:
        queue.load_state(saved, CPU)
    see(undisturbed, range(9, 12))
    see(resumed, range(9, 12))
    expected, found = (merge([queue.state() for queue in queues], 8) for queues in (undisturbed, resumed))
    assert found["keys"] == expected["keys"]
    assert torch.equal(found["rows"]["first"], expected["rows"]["first"])


def test_a_resumed_queue_lies_where_new_rows_come_from():
    """Rows that stay on the CPU, where a checkpoint is read, cannot be stacked with those of a step on a GPU."""
    before, after = CaseQueue(8), CaseQueue(8)
    before.add(["old"], Embeddings(first=torch.ones(1, 3), second=torch.ones(1, 3)))
    elsewhere = torch.device("meta")
    after.load_state(before.state(), elsewhere)
    after.add(["new"], Embeddings(first=torch.ones(1, 3, device=elsewhere), second=torch.ones(1, 3, device=elsewhere)))
    assert {value.device for row in after.rows.values() for value in row.values()} == {elsewhere}


HEALTHY = {
    "rank": 0.5,
    "between_share": 0.6,
    "token_spread": 0.6,
    "target_entropy": 0.6,
    "mutual_information": 2.0,
    "mutual_information_share": 0.5,
    "num_cases": 64.0,
}
UNTRAINED = {**HEALTHY, "between_share": 0.2, "mutual_information": 0.01, "mutual_information_share": 0.002}


@pytest.mark.parametrize(
    ("changes", "flat_steps", "name", "responses", "slower", "back"),
    [
        ({}, 0, None, (), False, False),
        ({}, 100, "target_entropy", ("sharpen",), False, False),
        ({"mutual_information": 0.05, "target_entropy": 0.9}, 0, "mutual_information", ("sharpen",), False, False),
        ({"mutual_information": 0.05, "target_entropy": 0.1}, 0, "mutual_information", ("soften",), True, True),
        ({"mutual_information_share": 0.01}, 0, "mutual_information", ("sharpen",), False, False),
        ({"rank": 0.049}, 0, "rank", ("spread",), False, False),
        ({"rank": 0.034}, 0, "rank", ("spread",), True, True),
        ({"between_share": 0.09}, 0, "between_share", ("spread",), False, False),
        ({"between_share": 0.03}, 0, "between_share", ("spread",), True, True),
        ({"token_spread": 0.14}, 0, "token_spread", ("anchor",), False, True),
        ({"not_finite": 1.0, "rank": 0.024}, 0, "not_finite", (), True, True),
    ],
)
def test_every_sickness_sounds_its_own_alarm(changes, flat_steps, name, responses, slower, back):
    """Catches another answer, and a grave alarm that names the limit of the warning."""
    alarms = judge({**HEALTHY, **changes}, UNTRAINED, HEALTHY, flat_steps, 100, CONFIG)
    found = [(alarm.name, alarm.responses, alarm.slower, alarm.roll_back) for alarm in alarms]
    assert found == ([] if name is None else [(name, responses, slower, back)])
    shares = {"rank": (0.1, 0.07), "between_share": (0.5, 0.2)}
    if name in shares:
        assert alarms[0].limit == pytest.approx(shares[name][back] * UNTRAINED[name])


def test_statistics_of_healthy_embeddings_give_no_alarm_and_collapsed_ones_do():
    generator = torch.Generator().manual_seed(0)
    untrained = statistics(as_queue(embeddings(64, generator, noise=1.0)))
    healthy = embeddings(64, generator)
    assert judge(statistics(as_queue(healthy)), untrained, untrained, 0, 100, CONFIG) == []
    line = torch.randn(64, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
    point = torch.ones(64, 16)
    for sick, names in (
        (replace(healthy, first=line, second=line), {"rank"}),
        (replace(healthy, first=point, second=point), {"rank", "between_share"}),
        (replace(healthy, token_spread=torch.full((64,), 0.1)), {"token_spread"}),
        (replace(healthy, targets=torch.eye(32)[:1].expand(64, -1)), {"mutual_information"}),
    ):
        alarms = judge(statistics(as_queue(sick)), untrained, untrained, 0, 100, CONFIG)
        assert {alarm.name for alarm in alarms} == names


def test_statistics_that_cannot_be_told_are_absent():
    plain = Embeddings(first=torch.randn(2, 4), second=torch.randn(2, 4))
    assert set(statistics(as_queue(plain))) == {"between_share", "num_cases"}
    assert statistics({}) == {}


@pytest.mark.parametrize("field", ["first", "second", "targets", "token_spread"])
def test_embeddings_that_are_not_finite_enter_no_statistic_and_are_told(field):
    """A finite loss does not show them: without a count they would make every number here NaN, or vanish unseen."""
    shown = embeddings(20, torch.Generator().manual_seed(0))
    broken = {**vars(shown), field: getattr(shown, field).clone()}
    broken[field][3:5] = torch.nan
    whole = as_queue(Embeddings(**{name: torch.cat([value[:3], value[5:]]) for name, value in vars(shown).items()}))
    queue = as_queue(Embeddings(**broken), [f"case{row}" for row in range(20)])
    assert statistics(queue) == pytest.approx({**statistics(whole), "not_finite": 2.0}, rel=1e-5)
    assert Retrieval.of(queue).num_cases == 18
    watching = monitor()
    watching.observe([f"case{row}" for row in range(20)], Embeddings(**broken))
    (alarm,) = watching.look(900)
    assert (alarm.name, alarm.value, alarm.roll_back) == ("not_finite", 2.0, True)


def test_where_no_embedding_is_finite_that_is_told_and_nothing_else():
    nowhere = torch.full((20, 4), torch.nan)
    queue = as_queue(Embeddings(first=nowhere, second=nowhere))
    assert statistics(queue) == {"num_cases": 0.0, "not_finite": 20.0}
    assert Retrieval.of(queue) == Retrieval(0.0, 0.0, 0.0, 0)


def monitor(total: int = 1000, **settings: object) -> Monitor:
    watching = Monitor(HealthConfig(every=10, **{"min_steps_to_stop": 0, **settings}), total)
    watching.observe([f"case{row}" for row in range(20)], embeddings(20, torch.Generator().manual_seed(0)))
    watching.begin(Retrieval(0.3, 0.2, 0.4, 20))
    return watching


def show_flat_targets(watching: Monitor) -> None:
    shown = embeddings(20, torch.Generator().manual_seed(0))
    watching.observe([f"case{row}" for row in range(20)], replace(shown, targets=torch.full((20, 32), 1 / 32)))


def test_flat_targets_sound_after_patience_and_again_only_after_time():
    """A tenth of the run is patience and warm-up; an intervention starts the clock anew."""
    watching = monitor(information=0.0, information_share=0.0)
    show_flat_targets(watching)
    assert [step for step in range(1, 130) if watching.due(step)] == [110, 120]
    assert [watching.look(step) for step in (110, 150, 200)] == [[]] * 3
    assert [alarm.name for alarm in watching.look(210)] == ["target_entropy"]
    watching.intervened(210, 210, {"responses": [], "resumed_at": 210})
    assert [watching.quiet(step) for step in (309, 310)] == [True, False]
    assert watching.look(300) == []
    assert [alarm.name for alarm in watching.look(400)] == ["target_entropy"]


def test_interventions_are_counted_and_survive_a_checkpoint():
    watching = monitor(max_interventions=2)
    for step in (100, 300):
        assert watching.may_intervene
        watching.intervened(step, step - 50, {"responses": [], "resumed_at": step - 50})
    watching.intervened(400, 400, {"responses": [], "resumed_at": 400})
    assert watching.tried == 250  # what came last turned a knob where the run was
    resumed = Monitor(watching.config, 1000)
    resumed.load_state(watching.state(), CPU)
    assert not resumed.may_intervene
    assert resumed.untrained == watching.untrained
    assert str(resumed.state()) == str(watching.state())
    assert resumed.look(990) == []


@pytest.mark.parametrize(
    ("mean", "low", "num_cases", "step", "before", "lost"),
    [
        (0.39, 0.1, 20, 110, 90, True),
        (0.41, 0.1, 20, 110, 90, False),
        (0.39, 0.1, 15, 110, 90, False),
        (0.39, 0.1, 20, 90, 80, False),
        (0.39, 0.1, 20, 130, 110, False),
        (0.39, 0.2, 20, 110, 90, False),
    ],
    ids=["no better", "better", "too few cases", "too early", "was judged before", "better than by chance (.18)"],
)
def test_a_run_is_given_up_where_views_do_not_find_each_other(mean, low, num_cases, step, before, lost):
    text = monitor().lost(Retrieval(mean, low, 0.6, num_cases), step, before)
    assert bool(text) == lost
    if lost:
        assert "0.390 [0.100, 0.600], chance 0.180, untrained 0.300 [0.200, 0.400] over 20 cases" in text
        assert "train anew, beside it by -tag NAME" in text
        assert text.endswith("--c goes on in spite of it")


@pytest.mark.parametrize("field", ["every", "queue", "min_cases", "max_interventions", "flat_entropy"])
def test_thresholds_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=rf"health\.{field}=-1"):
        HealthConfig(**{field: -1})


@pytest.mark.parametrize(("fail", "warn"), [("rank_fail", "rank_warn"), ("between_fail", "between")])
def test_a_run_that_goes_back_was_warned_of(fail, warn):
    with pytest.raises(ValueError, match=rf"health\.{fail}=0\.4 must not exceed health\.{warn}=0\.3"):
        HealthConfig(**{warn: 0.3, fail: 0.4})
