"""Which fold runs an evaluation needs, with which cases, and which of them are still to be run.

Every arm, training set size and seed has a plans file with its own name, since nnU-Net's results folder is keyed by it;
the file holds the explicit training and validation ids of every fold, and the seed. Training subsets are nested (5
within 20 within all), drawn by patient, and the same for all arms; validation cases are always those of the whole fold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.paths import run_name
from nnssl_ext.core.random import seed_of
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.dataset.splits import Split, nested_subsets
from nnssl_ext.evaluation.arms import PlannedArm
from nnssl_ext.evaluation.records import NumTrain
from nnssl_ext.evaluation.scoring import is_finished
from nnssl_ext.finetuning.config import PLANS_KEY, differing_settings
from nnssl_ext.finetuning.nnunet_plans import shared_patients
from nnssl_ext.finetuning.sources import read_sources

SPLITS_FILE = "splits_final.json"
PLANS_FILE = "plans.json"


@dataclass(frozen=True, kw_only=True)
class FoldRun:
    """One training that the evaluation needs."""

    arm: PlannedArm
    start: PlannedArm
    """Whose plans it is derived from: the arm's, or those of its seed."""
    num_train: NumTrain
    seed: int | None
    """None for plain nnU-Net."""
    fold: int
    plans_name: str
    train_cases: tuple[str, ...]
    val_cases: tuple[str, ...]
    folder: Path
    """The fold's folder in nnU-Net's results."""

    @property
    def key(self) -> str:
        """A short name, unique within the evaluation."""
        return f"{self.plans_name}__fold_{self.fold}"


def sizes_from_fractions(fractions: Sequence[float], splits: Sequence[Split]) -> list[NumTrain]:
    """Training set sizes for shares of the smallest fold's training cases, rounded up; a share of all of them is `all`.

    Raises:
        ValueError: If a share is not in (0, 1], or two shares come to the same number of cases.
    """
    smallest = min(len(split.train) for split in splits)
    for share in fractions:
        if not 0 < share <= 1:
            raise ValueError(
                f"fraction {share:g} is not allowed; it lies above 0 and is at most 1 (all training cases)"
            )
    counts = [math.ceil(share * smallest - 1e-9) for share in fractions]  # .07 * 100 is a little more than 7
    for first, second in itertools.combinations(range(len(counts)), 2):
        if counts[first] == counts[second]:
            raise ValueError(
                f"fractions {fractions[first]:g} and {fractions[second]:g} both come to {counts[first]} of {smallest} "
                "training cases; give shares further apart"
            )
    return ["all" if count == smallest else count for count in counts]


def choose(
    splits: Sequence[Split], folds: Sequence[int], num_train: Sequence[NumTrain], fractions: Sequence[float]
) -> tuple[dict[int, Split], tuple[NumTrain, ...]]:
    """The folds that are asked for, all where none is, and the training set sizes, by fractions where there are any.

    Raises:
        ValueError: If there is no such fold, or a size or share that it cannot give.
    """
    chosen = folds or tuple(range(len(splits)))
    check_folds(chosen, splits)
    by_fold = {fold: splits[fold] for fold in chosen}
    sizes = sizes_from_fractions(fractions, list(by_fold.values())) if fractions else num_train
    check_sizes(sizes, list(by_fold.values()))
    return by_fold, tuple(sizes)


def cases_of(splits: Iterable[Split]) -> list[str]:
    """Every case of the folds, once."""
    return sorted({case for split in splits for case in (*split.train, *split.val)})


def check_choices(folds: Sequence[int], num_train: Sequence[NumTrain], seeds: Sequence[int]) -> None:
    """Refuses folds, sizes or seeds that are named twice, sizes or seeds that are none, and negative seeds.

    Raises:
        ValueError: Naming what was given.
    """
    for what, values in (("folds", folds), ("num_train", num_train), ("seeds", seeds)):
        if len(set(values)) != len(values) or (not values and what != "folds"):
            raise ValueError(f"{what} must be one or more different values (given: {list(values)})")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be 0 or more (given: {list(seeds)})")


def check_folds(folds: Sequence[int], splits: Sequence[Split]) -> None:
    """Refuses folds that are not planned.

    Raises:
        ValueError: Naming the fold and those that there are.
    """
    for fold in folds:
        if not 0 <= fold < len(splits):
            raise ValueError(f"fold {fold} is not planned; the plans have folds 0 to {len(splits) - 1}")


def check_sizes(num_train: Sequence[NumTrain], splits: Sequence[Split]) -> None:
    """Refuses training set sizes that the smallest of the folds cannot give.

    Raises:
        ValueError: Naming the size and what is allowed.
    """
    smallest = min(len(split.train) for split in splits)
    for size in num_train:
        if size != "all" and not 1 <= size < smallest:
            raise ValueError(
                f"--num_train {size} is not possible: the smallest of these folds has {smallest} training cases. "
                f"Give 1 to {smallest - 1}, or all"
            )


def warn_of_patients(splits: Mapping[int, Split], subject_of: Mapping[str, str]) -> list[str]:
    """A warning where folds train and validate on images of the same patients."""
    both = {number: shared_patients(split, subject_of) for number, split in splits.items()}
    shared = {number: patients for number, patients in both.items() if patients}
    if not shared:
        return []
    patients = sorted(set().union(*shared.values()))
    return [
        f"Folds {', '.join(map(str, shared))} train and validate on images of the same {len(patients)} patients, such "
        f"as {patients[0]}: all results there are too good. Make folds by patient: remove {SPLITS_FILE} and plan again."
    ]


def subsets_of_folds(
    splits: Sequence[Split], subject_of: Mapping[str, str], num_train: Sequence[NumTrain], seed: int
) -> dict[NumTrain, tuple[Split, ...]]:
    """The folds of a seed with their training cases cut down to every size; the validation cases stay.

    Which cases a subset holds depends on the seed and the fold alone, so all arms train on the same ones.
    """
    by_fold = [
        nested_subsets(subject_of, split.train, list(num_train), seed=seed_of(seed, "training subset", fold))
        for fold, split in enumerate(splits)
    ]
    return {
        size: tuple(Split(train=tuple(s[size]), val=split.val) for s, split in zip(by_fold, splits, strict=True))
        for size in num_train
    }


def plan_runs(
    arms: Sequence[PlannedArm],
    splits: Sequence[Split],
    subject_of: Mapping[str, str],
    *,
    folds: Sequence[int],
    num_train: Sequence[NumTrain],
    seeds: Sequence[int],
    configuration: str,
    results: Path,
) -> list[FoldRun]:
    """Every run of the evaluation, ordered so that an interrupted one has finished pairs of arms.

    Args:
        arms: What is compared.
        splits: All folds of the plans.
        subject_of: Patient of each case.
        folds: Indices into `splits` to be run.
        num_train: Training set sizes.
        seeds: Seeds; each stands for an initialisation, an order of batches and a draw of training subsets.
        configuration: nnU-Net's configuration.
        results: The dataset's folder in nnU-Net's results.
    """
    runs = []
    for position, seed in enumerate(seeds):
        subsets = subsets_of_folds(splits, subject_of, num_train, seed)
        for size in num_train:
            for fold in folds:
                for arm in arms:
                    plain = arm.config is None
                    if plain and (position > 0 or size != "all"):
                        continue
                    start = arm.at(seed)
                    name = arm.name if plain else variant_name(start, size, seed)
                    runs.append(
                        FoldRun(
                            arm=arm,
                            start=start,
                            num_train=size,
                            seed=None if plain else seed,
                            fold=fold,
                            plans_name=name,
                            train_cases=subsets[size][fold].train,
                            val_cases=subsets[size][fold].val,
                            folder=results / run_name(arm.trainer, name, configuration) / f"fold_{fold}",
                        )
                    )
    return runs


def variant_name(arm: PlannedArm, size: NumTrain, seed: int) -> str:
    """Plans name of an arm at a size and seed, such as `ptPlans__mae__n5__s0`.

    All training cases with the arm's own seed are the arm's plans themselves, so what was trained on them counts.
    """
    if arm.config is not None and (size, seed) == ("all", arm.config.seed):
        return arm.name
    return f"{arm.name}__n{size}__s{seed}"


def check_same_settings(run: FoldRun, plans: dict[str, Any]) -> None:
    """Refuses results that were made with other settings than the plans have now.

    nnU-Net keeps the plans that a run was started with beside its results. They name the pretrained weights by content.

    Raises:
        ValueError: If those differ from `plans`.
    """
    path = run.folder.parent / PLANS_FILE
    if not path.is_file():
        return
    used = read_json(path)
    before, after = used.get("configurations", {}), plans["configurations"]
    differing = [f"configurations.{name}" for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    differing += [f"{PLANS_KEY}.{name}" for name in differing_settings(used, plans)]
    if differing:
        raise ValueError(
            f"{run.folder.parent} was trained with other settings than {run.plans_name} has now (they differ in "
            f"{', '.join(differing)}). Delete that folder to train it again, or plan the arm under another name: "
            "nnssl_plan_finetuning -n NAME"
        )


def refuse_changed(
    runs: Sequence[FoldRun], made_of: Mapping[str, Sequence[str]], preprocessed: Path, configuration: str
) -> None:
    """Refuses runs that were, or would be, trained on images or labels that have changed since.

    Args:
        runs: Finished ones or not.
        made_of: Hashes of the raw files of every case now.
        preprocessed: The dataset's folder in nnU-Net's preprocessed data.
        configuration: nnU-Net's configuration.

    Raises:
        ValueError: With a case and what to do.
    """
    for run in runs:
        known, what = read_sources(run.folder), f"{run.folder} was trained. Delete that folder to train it again"
        if not (known or is_finished(run.folder)):
            folder = preprocessed / run.start.plans["configurations"][configuration]["data_identifier"]
            known = read_sources(folder)
            what = f"{folder} was made. Make it again: nnssl_plan_finetuning with the same arguments"
        changed = [c for c in (*run.train_cases, *run.val_cases) if c in known and tuple(made_of[c]) != known[c]]
        if changed:
            raise ValueError(
                f"{len(changed)} cases, such as {changed[0]}, have another image or label than when {what}"
            )


def ensure_plain_splits(preprocessed: Path, splits: Sequence[Split], folds: Sequence[int]) -> None:
    """Makes stock nnU-Net train on the same folds: writes its `splits_final.json`, or checks the one that is there.

    Raises:
        ValueError: If it is there with other folds.
    """
    path = preprocessed / SPLITS_FILE
    if not path.is_file():
        write_json(path, [{"train": list(split.train), "val": list(split.val)} for split in splits])
        return
    stored = read_json(path)
    for fold in folds:
        same = fold < len(stored) and all(
            set(stored[fold][part]) == set(getattr(splits[fold], part)) for part in ("train", "val")
        )
        if not same:
            raise ValueError(
                f"plain nnU-Net would use other folds than the planned arms: fold {fold} of {path} differs from the "
                "plans. Plan the arms again with that file's folds, or delete it"
            )


def missing_runs(runs: Sequence[FoldRun]) -> list[FoldRun]:
    """The runs that have not been trained to the end and validated."""
    return [run for run in runs if not is_finished(run.folder)]
