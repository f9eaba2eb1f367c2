from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.dataset.splits import Split, folds_by_subject, nested_subsets, split_by_subject

SUBJECTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.sampled_from("PQRSTUVW"), min_size=8)


def patients(subject_of: dict[str, str], ids: tuple[str, ...]) -> set[str]:
    return {subject_of[case_id] for case_id in ids}


def assert_sound(split: Split, subject_of: dict[str, str]) -> None:
    assert sorted(split.train + split.val) == sorted(subject_of)
    assert not patients(subject_of, split.train) & patients(subject_of, split.val)
    assert split.train
    assert split.val


@given(subject_of=SUBJECTS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_no_patient_is_on_both_sides(subject_of: dict[str, str], fraction: float, seed: int) -> None:
    subject_of |= {"one": "1", "two": "2"}
    split = split_by_subject(subject_of, fraction, seed)
    assert_sound(split, subject_of)
    held_out = len(patients(subject_of, split.val))
    assert abs(held_out - fraction * len(set(subject_of.values()))) <= 1
    assert split == split_by_subject(dict(reversed(subject_of.items())), fraction, seed)


def test_split_depends_on_the_seed() -> None:
    subject_of = {f"c{i}": f"p{i}" for i in range(50)}
    assert len({split_by_subject(subject_of, 0.2, seed).val for seed in range(5)}) == 5
    assert len(split_by_subject(subject_of, 0.2, 0).val) == 10


def test_split_refusals() -> None:
    with pytest.raises(ValueError, match=r"fraction of 1\.5"):
        split_by_subject({"a": "1", "b": "2"}, 1.5, 0)
    with pytest.raises(ValueError, match="2 cases of 1 patients cannot be split: 2 patients"):
        split_by_subject({"a": "1", "b": "1"}, 0.5, 0)


@pytest.mark.parametrize("number", [5, 13, 70, 130])
def test_folds_are_nnunets_where_every_case_is_a_patient(number: int) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    ids = [f"case_{i:03d}" for i in np.random.default_rng(0).permutation(number)]
    theirs = generate_crossval_split(sorted(ids), seed=12345, n_splits=5)
    ours = folds_by_subject({case_id: case_id for case_id in ids})
    assert [list(fold.train) for fold in ours] == [[str(i) for i in fold["train"]] for fold in theirs]
    assert [list(fold.val) for fold in ours] == [[str(i) for i in fold["val"]] for fold in theirs]


@given(subject_of=SUBJECTS, num_folds=st.integers(2, 6))
def test_folds_hold_out_every_patient_once(subject_of: dict[str, str], num_folds: int) -> None:
    subject_of |= {f"extra{i}": str(i) for i in range(num_folds)}
    folds = folds_by_subject(subject_of, num_folds)
    assert len(folds) == num_folds
    for fold in folds:
        assert_sound(fold, subject_of)
    assert sorted(case_id for fold in folds for case_id in fold.val) == sorted(subject_of)


def test_too_few_patients_for_the_folds() -> None:
    with pytest.raises(ValueError, match="5 patients or more"):
        folds_by_subject({f"c{i}": f"p{i % 4}" for i in range(20)})
    with pytest.raises(ValueError, match="1 folds are not possible"):
        folds_by_subject({"a": "1"}, num_folds=1)


@given(subject_of=SUBJECTS, seed=st.integers(0, 5))
def test_subsets_are_nested_and_take_patients_whole(subject_of: dict[str, str], seed: int) -> None:
    ids = sorted(subject_of)
    subsets = nested_subsets(subject_of, ids, ["all", 2, 5, 1], seed)
    assert list(subsets) == ["all", 2, 5, 1]
    assert set(subsets[1]) <= set(subsets[2]) <= set(subsets[5]) <= set(subsets["all"]) == set(ids)
    for size, subset in subsets.items():
        assert size == "all" or len(subset) >= size
        left = set(ids) - set(subset)
        assert not patients(subject_of, subset) & {subject_of[case_id] for case_id in left}


def test_subsets_of_single_patients_have_the_exact_size_and_depend_on_the_seed() -> None:
    subject_of = {f"c{i}": f"c{i}" for i in range(40)}
    train = sorted(subject_of)[:30]
    drawn = {nested_subsets(subject_of, train, [5], seed)[5] for seed in range(6)}
    assert len(drawn) == 6
    assert all(len(subset) == 5 and set(subset) <= set(train) for subset in drawn)


@pytest.mark.parametrize("size", [0, 4])
def test_impossible_subset(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} training cases are not possible; there are 3"):
        nested_subsets({"a": "a", "b": "b", "c": "c"}, ["a", "b", "c"], [size], 0)
