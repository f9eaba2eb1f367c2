from dataclasses import replace

import numpy as np
import pytest

from nnssl_ext.evaluation import statistics
from nnssl_ext.evaluation.analysis import class_names, compare, judge_convergence, num_absent, summarise, tabulate
from nnssl_ext.evaluation.metrics import ClassScores
from nnssl_ext.evaluation.records import MEAN_CLASS, CaseScores, Curve, Run

BASELINES = {"mae": "scratch"}
CASES = tuple(f"case_{i}" for i in range(8))


def scored(arm: str, case: str, one: float | None, two: float | None, *, size=5, seed: int | None = 0) -> CaseScores:
    classes = {
        name: ClassScores(dice=value, nsd=value, hd95=None if value is None else 10 * (1 - value), **VOXELS)
        for name, value in (("one", one), ("two", two))
    }
    return CaseScores(arm=arm, num_train=size, seed=seed, fold=CASES.index(case) % 2, case=case, classes=classes)


VOXELS = {"reference_voxels": 10, "predicted_voxels": 10}


def rows(seeds=(0, 1)) -> list[CaseScores]:
    random = np.random.default_rng(0)
    found = []
    for seed in seeds:
        for case in CASES:
            base = random.uniform(0.4, 0.6)
            found.append(scored("scratch", case, base, base - 0.1, seed=seed))
            found.append(scored("mae", case, base + random.uniform(0.05, 0.15), base - 0.1, seed=seed))
    return found


def test_a_table_holds_seeds_by_cases() -> None:
    scores = [scored("a", "case_1", 0.5, 0.7, seed=1), scored("a", "case_0", 0.4, None, seed=0)]
    table = tabulate(scores, "dice", "one")["a", 5]
    assert (table.seeds, table.cases, table.folds) == ((0, 1), ("case_0", "case_1"), (0, 1))
    assert np.array_equal(table.values, [[0.4, np.nan], [np.nan, 0.5]], equal_nan=True)
    mean = tabulate(scores, "dice", MEAN_CLASS)["a", 5]
    assert mean.values[0, 0] == 0.4
    assert mean.values[1, 1] == pytest.approx(0.6)


def test_a_case_that_was_validated_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="case case_0 was validated more than once by a"):
        tabulate([scored("a", "case_0", 0.5, 0.5)] * 2, "dice", "one")


def test_summaries_average_seeds_then_cases() -> None:
    scores = [
        scored("a", "case_0", 0.2, 0.2, seed=0),
        scored("a", "case_0", 0.4, 0.4, seed=1),
        scored("a", "case_1", 0.9, 0.9, seed=0),
        scored("a", "case_1", None, None, seed=1),
    ]
    row = next(r for r in summarise(scores, ["one"]) if r.metric == "dice")
    assert row.mean == pytest.approx((0.3 + 0.9) / 2)
    assert row.fold_means == pytest.approx({0: 0.3, 1: 0.9})
    assert row.seed_means == pytest.approx({0: 0.55, 1: 0.4})
    assert (row.num_cases, row.num_seeds) == (2, 2)


def test_comparisons_pair_cases_and_correct_each_family_by_itself() -> None:
    """Catches a limit of the seeds that is the same for one difference and for many."""
    found = {(c.metric, c.class_name): c for c in compare(rows(), BASELINES, ["mean", "one", "two"])}
    mean, one, two = (found["dice", name] for name in ("mean", "one", "two"))
    assert 0.05 < one.difference < 0.15
    assert mean.difference == pytest.approx(one.difference / 2)
    assert (one.num_pairs, one.num_better, one.num_worse) == (8, 8, 0)
    assert (two.difference, two.num_better, two.num_worse, two.p_value) == (0.0, 0, 0, 1.0)
    assert mean.p_holm == mean.p_value == pytest.approx(2 / 2**8)  # alone in its family
    assert one.p_holm == pytest.approx(2 * one.p_value)  # two classes
    alone = tabulate(rows(), "dice", "one")
    gains = alone["mae", 5].values - alone["scratch", 5].values
    assert one.undecidable_below == pytest.approx(statistics.undecidable_below(gains, alone["mae", 5].folds, 2))


def test_a_smaller_hausdorff_distance_is_better() -> None:
    row = next(c for c in compare(rows(), BASELINES, ["one"]) if c.metric == "hd95")
    assert row.difference < 0
    assert (row.num_better, row.num_worse) == (8, 0)


def test_arms_of_different_cases_are_not_paired() -> None:
    scores = [row for row in rows() if not (row.arm == "mae" and row.case == "case_3")]
    with pytest.raises(ValueError, match=r"not validated on the same cases with 5 training cases .1 differ.*case_3"):
        compare(scores, BASELINES, ["one"])


def test_scans_of_one_patient_are_no_further_patients() -> None:
    """Three like scans of each patient say what one says. Catches cases that are tested or drawn as if independent."""
    scans = [replace(row, case=f"{row.case}_{n}", patient=row.case) for row in rows() for n in range(3)]
    for once, thrice in zip(compare(rows(), BASELINES, ["one"]), compare(scans, BASELINES, ["one"]), strict=True):
        assert (thrice.p_value, thrice.num_pairs, thrice.num_better) == (once.p_value, 8, once.num_better)
        ends = [(row.difference, row.interval.low, row.interval.high, row.undecidable_below) for row in (once, thrice)]
        assert ends[1] == pytest.approx(ends[0])
    once, thrice = (next(row for row in summarise(scores, ["one"])) for scores in (rows(), scans))
    assert (thrice.interval.low, thrice.interval.high) == pytest.approx((once.interval.low, once.interval.high))


def test_classes_agree_with_their_mean_where_a_case_lacks_one() -> None:
    """Scratch says rightly that two cases lack the class, mae finds it there; a third class is in no case.

    Catches a score that is left out in one arm only, and a class without any case that enters a mean.
    """
    scores = []
    for arm, found in (("scratch", 1.0), ("mae", 0.0)):
        for case in CASES:
            score = scored(arm, case, 0.9, found if case in CASES[:2] else 0.7)
            one, two = score.classes["one"], score.classes["two"]
            two = replace(two, reference_voxels=0) if case in CASES[:2] else two
            none = replace(one, dice=found, nsd=found, hd95=found, reference_voxels=0)
            scores.append(replace(score, classes={"one": one, "two": two, "none": none}))
    found = {c.class_name: c for c in compare(scores, BASELINES, ["mean", "one", "two", "none"]) if c.metric == "dice"}
    assert [found[name].num_pairs for name in ("mean", "one", "two", "none")] == [8, 8, 8, 0]
    assert found["one"].difference == 0
    assert found["two"].difference == pytest.approx(-2 / 8)
    assert found["mean"].difference == pytest.approx(-1 / 8)  # the mean of both
    assert found["none"].difference is None
    assert [num_absent(scores, name) for name in ("one", "two", "none")] == [0, 2, 8]


def test_the_same_scores_give_the_same_intervals() -> None:
    first, second = (compare(rows(), BASELINES, ["one"]) for _ in range(2))
    assert first == second
    own = tabulate(rows(), "dice", "one")
    differences = own["mae", 5].values - own["scratch", 5].values
    expected = statistics.bootstrap_interval(differences, own["mae", 5].folds, np.random.default_rng(9))
    row = next(c for c in first if c.metric == "dice")
    assert (row.interval.low, row.interval.high) == pytest.approx((expected.low, expected.high), abs=3e-3)


def test_a_single_class_is_reported_once() -> None:
    assert class_names({"one": (1,)}) == [MEAN_CLASS]
    assert class_names({"one": (1,), "two": (2,)}) == [MEAN_CLASS, "one", "two"]


def test_convergence_is_judged_on_the_mean_of_an_arms_runs() -> None:
    def run(arm: str, fold: int, slope: float) -> Run:
        curve = Curve(dice=tuple(0.5 + slope * epoch for epoch in range(20)))
        common = {"num_train": 5, "seed": 0, "plans_name": arm, "folder": "", "train_cases": (), "val_cases": ()}
        return Run(arm=arm, fold=fold, curve=curve, **common)

    runs = [run("a", 0, 0.02), run("a", 1, 0.01), run("b", 0, 0.02), run("b", 1, -0.02)]
    states = {row.arm: (row.trend.state, row.num_runs) for row in judge_convergence(runs)}
    assert states == {"a": ("rising", 2), "b": ("settled", 2)}


def test_a_single_seed_on_one_side_leaves_the_luck_of_its_training_unknown() -> None:
    scores = [
        row if row.arm == "scratch" else replace(row, seed=None) for row in rows() if (row.arm, row.seed) != ("mae", 1)
    ]
    row = next(c for c in compare(scores, BASELINES, ["one"]) if c.metric == "dice")
    table = tabulate(scores, "dice", "one")
    averaged = table["mae", 5].values - table["scratch", 5].values.mean(axis=0)
    assert row.difference == pytest.approx(averaged.mean())
    assert row.undecidable_below == pytest.approx(statistics.undecidable_below(averaged, table["mae", 5].folds))
