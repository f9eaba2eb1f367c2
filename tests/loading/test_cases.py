"""Which cases samples show: by turns, in pairs, in shares, without opening a file."""

from collections import Counter
from collections.abc import Sequence

import pytest

from nnssl_ext.loading.cases import ROUND, CaseSampler, SamplingWeights, with_partners
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.preprocessing.index import IndexEntry

ONE = DataNeeds()
Rows = Sequence[tuple[str, str, str]]


def make_entries(rows: Rows) -> dict[str, IndexEntry]:
    """Cases c0, c1, ... of the given datasets, modalities and sessions."""
    return {
        f"c{number}": IndexEntry(
            case_id=f"c{number}",
            shape=(1, 9, 9, 9),
            spacing=(1.0, 1.0, 1.0),
            subject=f"patient of {session}",
            dataset=dataset,
            modalities=(modality,),
            checksum="",
            num_bytes=1,
            foreground_fraction=0.5,
            content_hashes=(),
            source=(),
            session=session,
            grid="g",
        )
        for number, (dataset, modality, session) in enumerate(rows)
    }


def sampler(rows: Rows, needs: DataNeeds = ONE, weights: SamplingWeights = "uniform", **options) -> CaseSampler:
    entries = make_entries(rows)
    return CaseSampler(entries, list(entries), 7, needs, weights, **options)


TWO_SETS = [("A", "CT", "")] * 3 + [("A", "T1w", "")] * 4 + [("B", "T1w", "")] * 2


def test_every_case_is_shown_once_a_round_in_another_order() -> None:
    cases = sampler([("A", "CT", "")] * 30)
    rounds = [[cases.cases(round_ * 30 + i)[0] for i in range(30)] for round_ in range(3)]
    assert all(sorted(order) == sorted(f"c{i}" for i in range(30)) for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_the_others_of_a_sample_are_drawn_evenly_from_its_dataset_and_modality() -> None:
    """Planted fault: taking the last case for every draw shows c6 too often; grouping by modality alone mixes sets."""
    pairs = [sampler(TWO_SETS, DataNeeds(images=2, same="modality")).cases(i) for i in range(9 * 400)]
    groups = [{"c0", "c1", "c2"}, {"c3", "c4", "c5", "c6"}, {"c7", "c8"}]
    for first in (f"c{i}" for i in range(9)):
        group = next(group for group in groups if first in group)
        seen = Counter(other for one, other in pairs if one == first)
        assert set(seen) == group - {first}
        expected = 400 / (len(group) - 1)
        assert all(count == pytest.approx(expected, rel=0.3) for count in seen.values())


def test_three_images_are_three_cases() -> None:
    cases = sampler(TWO_SETS, DataNeeds(images=3))
    assert all(len(set(cases.cases(i))) == 3 for i in range(50))


def test_a_sample_is_the_same_whenever_it_is_asked_for() -> None:
    needs = DataNeeds(images=2, same="modality")
    weights = {"A": 2.0}
    forwards = [sampler(TWO_SETS, needs, weights).cases(i) for i in (5, 30_001, 123_456_789)]
    one = sampler(TWO_SETS, needs, weights)
    assert [one.cases(i) for i in (123_456_789, 30_001, 5)] == forwards[::-1]


def test_sessions_are_told_apart_by_subject_and_grid() -> None:
    rows = [("A", "T1w", "s1"), ("A", "T2w", "s1"), ("A", "T1w", "s2"), ("A", "T2w", "")]
    needs = DataNeeds(images=2, same="session")
    assert {sampler(rows, needs).cases(i) for i in range(20)} == {("c0", "c1"), ("c1", "c0")}
    entries = make_entries([("A", "T1w", ""), ("A", "T2w", "")])
    with pytest.raises(ValueError, match=r"2 co-registered images of one session.*pretrain_data.json.*nnssl_prepr"):
        with_partners(entries, list(entries), needs)


def test_groups_that_are_too_small_are_left_out_and_partners_may_come_from_elsewhere() -> None:
    rows = [*TWO_SETS, ("C", "CT", "")]
    needs = DataNeeds(images=2, same="modality")
    assert sampler(rows, needs).case_ids == tuple(f"c{i}" for i in range(9))
    entries = make_entries(rows)
    few = CaseSampler(entries, ["c0"], 7, needs, partners=["c0", "c1", "c3"])
    assert few.cases(0) == ("c0", "c1")
    with pytest.raises(ValueError, match=r"needs 3 different cases of one dataset and modality.*2 case.*val_fraction"):
        with_partners(entries, ["c7", "c8"], DataNeeds(images=3, same="modality"))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ("dataset", {"c0": 1 / 14, "c3": 1 / 14, "c7": 1 / 4}),
        ("modality", {"c0": 1 / 6, "c3": 1 / 12, "c7": 1 / 12}),
        ({"B": 3.0}, {"c0": 1 / 28, "c3": 1 / 28, "c7": 3 / 8}),
        ({"T1w": 0.0}, {"c0": 1 / 3, "c3": 0, "c7": 0}),
    ],
    ids=str,
)
def test_weights_give_datasets_and_modalities_their_shares_of_every_round(weights, shares: dict[str, float]) -> None:
    """Planted fault: counting a group's turns from its slot without the round repeats the same cases every round."""
    cases = sampler(TWO_SETS, weights=weights)
    seen = Counter(cases.cases(i)[0] for i in range(ROUND, 2 * ROUND))
    for case, share in shares.items():
        assert seen[case] == pytest.approx(share * ROUND, abs=1.5)


def test_a_large_group_goes_through_its_cases_over_the_rounds() -> None:
    cases = sampler([("A", "CT", "")] * 12_000 + [("B", "CT", "")] * 3, weights="dataset")
    seen = Counter(cases.cases(i)[0] for i in range(3 * ROUND))
    assert max(count for case, count in seen.items() if int(case[1:]) < 12_000) == 2
    assert len(seen) == 12_003


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"MR": 1.0}, r"name neither datasets \(A, B\) nor modalities \(CT, T1w\) alone"),
        ({"A": 1.0, "CT": 1.0}, "name neither datasets"),
        ({"A": -1.0}, "must be 0 or more"),
        ({"A": 0.0, "B": 0.0}, "some above 0"),
        ({"A": 1e-9}, "less than one of 10000 samples"),
    ],
)
def test_refuses_weights_that_do_not_fit(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(TWO_SETS, weights=weights)


def test_several_crops_of_a_case_follow_each_other() -> None:
    needs = DataNeeds(images=2, same="modality")
    single, triple = sampler(TWO_SETS, needs), sampler(TWO_SETS, needs, crops_per_case=3)
    assert [triple.cases(i) for i in range(30)] == [single.cases(i // 3) for i in range(30)]


def test_an_unreadable_case_is_replaced_by_every_other_of_its_group_in_turn() -> None:
    cases = sampler(TWO_SETS, weights="dataset")
    for sample in range(20):
        choices = [cases.cases(sample, attempt)[0] for attempt in range(7 if cases.cases(sample)[0] < "c7" else 2)]
        assert sorted(choices) in ([f"c{i}" for i in range(7)], ["c7", "c8"])
        with pytest.raises(IndexError):
            cases.cases(sample, len(choices))
