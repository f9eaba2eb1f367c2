from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nnssl_ext.evaluation import comparison_verdict, statistics
from tests.evaluation import comparison_fakes as fakes

LEARNED = {"scratch": 0.03, "MAE": 0.9, "Spark": 0.7}


@pytest.fixture(scope="module")
def comparison():
    return fakes.make_comparison()


def test_arms_are_ranked_by_their_mean_and_pairs_are_those_of_the_scores(comparison) -> None:
    ranking, rows = comparison.rankings[0], fakes.case_scores()
    assert [arm.label for arm in ranking.arms] == ["MAE", "Spark", "MAE sham", "scratch", "DINOv2"]
    differences = fakes.cases_of(rows, "MAE", 5) - fakes.cases_of(rows, "scratch", 5)
    pair = ranking.pair("scratch", "MAE")
    assert (pair.first, pair.second) == ("MAE", "scratch")
    assert pair.row.difference == pytest.approx(differences.mean())
    assert pair.row.p_value == statistics.wilcoxon(differences.mean(axis=0))
    assert pair.row.interval.low < differences.mean() < pair.row.interval.high
    assert pair.decided
    assert pair.seeds_in_favour == 3


def test_holm_corrects_over_all_pairs_and_sizes(comparison) -> None:
    """Ten pairs at two sizes are twenty tests; fails where each size has a family of its own."""
    rows = [pair.row for ranking in comparison.rankings for pair in ranking.pairs]
    assert min(row.p_holm for row in rows) == pytest.approx(20 * min(row.p_value for row in rows))


def test_what_can_be_said(comparison) -> None:
    assert comparison.headline == "With 5 and 20 training cases the best is MAE or Spark, which cannot be told apart."
    first, *rest = comparison.rankings[0].sentences
    assert first.startswith("With 5 training cases MAE has the highest mean Dice (0.749) and comes first in over 99%")
    assert first.endswith("it is better than MAE sham, scratch and DINOv2, and cannot be told from Spark.")
    assert "Spark is better than scratch (+0.047)." in rest
    assert "cannot give a p under 0.25 even if every seed agrees" in comparison.certainty
    assert comparison.certainty.startswith("3 seeds stand behind this")


def test_a_difference_within_the_luck_of_the_seeds_is_undecided() -> None:
    """All cases agree and the bootstrap excludes zero, but the seeds spread: fails where only cases are asked."""
    unlucky = fakes.make_comparison({"scratch": 0.70, "MAE": 0.74}, sizes=(5,), luck=0.03)
    (pair,) = unlucky.rankings[0].pairs
    assert pair.row.p_holm < 0.001
    assert not pair.decided
    assert unlucky.headline == "With 5 training cases no method can be told from another."


def test_one_seed_decides_nothing() -> None:
    single = fakes.make_comparison({"scratch": 0.5, "MAE": 0.9}, sizes=(5,), seeds=(0,))
    (pair,) = single.rankings[0].pairs
    assert pair.row.undecidable_below is None
    assert not pair.decided
    assert single.rankings[0].over_seeds is None
    assert (
        "comes first in all of the resamples of patients; it cannot be told from scratch"
        in (single.rankings[0].sentences[0])
    )
    assert single.certainty.startswith("One seed stands behind this")


def test_a_best_arm_is_named() -> None:
    clear = fakes.make_comparison({"scratch": 0.5, "MAE": 0.9, "Spark": 0.7}, sizes=(5,))
    assert clear.headline == "With 5 training cases MAE is best."
    assert clear.rankings[0].sentences[0].endswith("it is better than all others.")


def test_who_had_not_finished_learning_is_said_with_the_best_arm() -> None:
    """Catches a best arm that is named beside a baseline which learned nothing."""
    arms = [SimpleNamespace(name=f"ptPlans__{label}", label=label, pretrained=label != "scratch") for label in LEARNED]
    rising = SimpleNamespace(arm="ptPlans__Spark", num_train=5, trend=SimpleNamespace(state="rising"))
    evaluation = SimpleNamespace(
        arms=arms,
        num_train=(5, 20),
        convergence=[rising],
        summary=lambda name, size, metric: SimpleNamespace(mean=0.03 if size == 5 else 0.6),
    )
    told = comparison_verdict.reservations_about(evaluation)
    assert told == {5: ", but scratch learned next to nothing and Spark had not finished learning"}
    labels = {f"ptPlans__{label}": label for label in LEARNED}
    rankings = comparison_verdict.rank_arms(fakes.case_scores(LEARNED), labels, (5, 20), told)
    assert comparison_verdict.headline(rankings) == (
        f"With 5 training cases MAE is best{told[5]}; with 20 training cases MAE is best."
    )
    assert rankings[0].sentences[0].endswith(f"it is better than all others{told[5]}.")


def test_the_best_is_nobody_whom_another_candidate_beats(comparison) -> None:
    """Catches "which cannot be told apart" of two arms of which one is better."""
    ranking = comparison.rankings[0]
    order = [arm.label for arm in ranking.arms]
    decided = {(order[1], order[2]), (order[0], order[4])}
    pairs = tuple(replace(pair, decided=(pair.first, pair.second) in decided) for pair in ranking.pairs)
    expected = f"With 5 training cases the best is {order[0]}, {order[1]} or {order[3]}, which cannot be told apart."
    assert comparison_verdict.headline([replace(ranking, pairs=pairs)]) == expected


def test_what_no_case_holds_is_not_ranked() -> None:
    rows = fakes.case_scores({"scratch": 0.5, "MAE": 0.9}, sizes=(5,))
    empty = [replace(row, classes={"organ": replace(row.classes["organ"], reference_voxels=0)}) for row in rows]
    with pytest.raises(ValueError, match="2 patients or more with a class in some label; there are 24"):
        comparison_verdict.rank_arms(empty, {"ptPlans__scratch": "scratch", "ptPlans__MAE": "MAE"}, (5,))


def test_scans_of_one_patient_are_no_further_blocks(comparison) -> None:
    """Catches a ranking that tests, counts or draws cases where a patient has several."""
    scans = [replace(row, case=f"{row.case}_{n}", patient=row.case) for row in fakes.case_scores() for n in range(2)]
    labels = {f"ptPlans__{label}": label for label in fakes.LEVELS}
    once, twice = comparison.rankings[0], comparison_verdict.rank_arms(scans, labels, (5, 20))[0]
    assert (twice.num_cases, twice.over_cases.num_blocks) == (48, 24)
    for one, two in zip(once.pairs, twice.pairs, strict=True):
        assert (two.row.p_value, two.row.num_pairs) == (pytest.approx(one.row.p_value), 24)
        assert (two.row.interval.low, two.row.interval.high) == pytest.approx(
            (one.row.interval.low, one.row.interval.high)
        )


def test_rank_tests_stand_in_the_order_of_the_arms(comparison) -> None:
    ranking = comparison.rankings[0]
    rows = fakes.case_scores()
    scores = np.stack([fakes.cases_of(rows, arm.label, 5) for arm in ranking.arms])
    ranks = np.argsort(np.argsort(-scores.mean(axis=1), axis=0), axis=0) + 1
    assert ranking.over_cases.mean_ranks == pytest.approx(ranks.mean(axis=1))
    assert (ranking.over_cases.num_blocks, ranking.over_seeds.num_blocks) == (24, 3)


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.004, "under 1%"), (0.5, "50%"), (0.996, "over 99%"), (1.0, "all")]
)
def test_shares_are_never_rounded_to_certainty(share: float, text: str) -> None:
    assert comparison_verdict.share_text(share) == text
