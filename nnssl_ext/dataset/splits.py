"""Splits and subsets by patient: whoever is trained on is never validated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nnssl_ext.core.random import generator

Size = int | Literal["all"]


@dataclass(frozen=True)
class Split:
    """Case ids to train on and to validate on, each sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def split_by_subject(subject_of: Mapping[str, str], fraction: float, seed: int) -> Split:
    """Holds out a share of the patients for validation, at least one, and leaves at least one.

    Args:
        subject_of: Case id to patient.
        fraction: Share of the patients to hold out, in (0, 1).
        seed: Of the draw.

    Raises:
        ValueError: If the fraction is outside (0, 1) or there are fewer than two patients.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"a validation fraction of {fraction} is not possible; give one between 0 and 1")
    subjects = _subjects(subject_of, at_least=2)
    num_held_out = min(max(1, round(fraction * len(subjects))), len(subjects) - 1)
    order = generator(seed, "split_by_subject").permutation(len(subjects))
    return _split(subject_of, {subjects[i] for i in order[:num_held_out]})


def folds_by_subject(subject_of: Mapping[str, str], num_folds: int = 5, seed: int = 12345) -> list[Split]:
    """Cross-validation by patient. Where every case is a patient of its own, these are nnU-Net's own folds.

    Args:
        subject_of: Case id to patient.
        num_folds: At least 2.
        seed: nnU-Net's by default.

    Raises:
        ValueError: If there are fewer than two folds or fewer patients than folds.
    """
    if num_folds < 2:
        raise ValueError(f"{num_folds} folds are not possible; give 2 or more")
    subjects = _subjects(subject_of, at_least=num_folds)
    order = np.arange(len(subjects))
    np.random.RandomState(seed).shuffle(order)  # scikit-learn's KFold, which nnU-Net calls, shuffles like this
    return [_split(subject_of, {subjects[i] for i in held_out}) for held_out in np.array_split(order, num_folds)]


def nested_subsets(
    subject_of: Mapping[str, str], train_ids: Sequence[str], sizes: Sequence[Size], seed: int
) -> dict[Size, tuple[str, ...]]:
    """Subsets of the training cases, each within every larger one. Patients are taken whole.

    Args:
        subject_of: Case id to patient.
        train_ids: Cases to choose from.
        sizes: Numbers of cases, or "all". A subset ends with the patient that reaches its number, so it exceeds the
            number where that patient has several cases.
        seed: Of the order in which patients are taken.

    Returns:
        Size to sorted case ids.

    Raises:
        ValueError: If a size is below 1 or more than there are.
    """
    cases_of: dict[str, list[str]] = {}
    for case_id in sorted(train_ids):
        cases_of.setdefault(subject_of[case_id], []).append(case_id)
    subjects = sorted(cases_of)
    order = generator(seed, "nested_subsets").permutation(len(subjects))
    subsets: dict[Size, tuple[str, ...]] = {}
    for size in sizes:
        if size != "all" and not 1 <= size <= len(train_ids):
            raise ValueError(
                f"{size} training cases are not possible; there are {len(train_ids)}. Give 1 to that, or all"
            )
        chosen: list[str] = []
        for index in order:
            if size != "all" and len(chosen) >= size:
                break
            chosen += cases_of[subjects[index]]
        subsets[size] = tuple(sorted(chosen))
    return subsets


def _subjects(subject_of: Mapping[str, str], at_least: int) -> list[str]:
    subjects = sorted(set(subject_of.values()))
    if len(subjects) < at_least:
        raise ValueError(
            f"{len(subject_of)} cases of {len(subjects)} patients cannot be split: "
            f"{at_least} patients or more are needed"
        )
    return subjects


def _split(subject_of: Mapping[str, str], held_out: set[str]) -> Split:
    ids = sorted(subject_of)
    return Split(
        train=tuple(case_id for case_id in ids if subject_of[case_id] not in held_out),
        val=tuple(case_id for case_id in ids if subject_of[case_id] in held_out),
    )
