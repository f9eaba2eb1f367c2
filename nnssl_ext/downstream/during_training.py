"""Probes while a run goes on: a few labelled cases, one subset, some seconds."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from nnssl_ext.dataset.integrity import image_hashes
from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.labelled import LabelledCase, read_labelled
from nnssl_ext.downstream.probing import ProbeConfig, probe
from nnssl_ext.engine.run import Probe, ProbeOf, TrainedOn
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.planners.plan import Configuration, Plan

logger = logging.getLogger(__name__)

MOST_CASES = 10
"""Cases that a probe looks at, each of another patient: the first half is learned from, the rest is the test."""
LEAST_CASES = 2
QUICK = ProbeConfig(subset_seeds=(0,), voxels_per_case=500, bank_voxels_per_case=100)


def make_probe(manifest: Manifest, plan: Plan, configuration: Configuration, held_out_only: bool) -> Probe:
    """A linear probe and nearest neighbours for `engine.run.RunSpec`, as `probe_dice` and `probe_knn_dice`.

    Cases are read when the first probe is due, and the same ones are looked at every time. Where the cases to learn
    from or those to test on show no foreground, the numbers are NaN.

    Args:
        manifest: A raw dataset with labels.
        plan: Of the run.
        configuration: Of the run.
        held_out_only: Whether only cases that the run holds out may be looked at: where it trains on this dataset. Of
            another one, patients of whom the run trains on an image, under whatever name, are left out.

    Raises:
        ValueError: If the dataset has no labels, here, or too few that may be looked at, when the probe is told which;
            same-case retrieval and rank are logged in any case.
    """
    labelled = [case for case in manifest.cases if case.label is not None]
    patients = len(_by_patient(labelled))
    if patients < LEAST_CASES:
        raise ValueError(
            f"{manifest.dataset_name} has labels of {patients} patients, and a probe needs {LEAST_CASES}. Name a "
            "labelled dataset by --probe_dataset, or leave out --probe_every: rank of the features and retrieval of "
            "a case's other crops are logged without labels"
        )

    def choose(held_out: Sequence[str], trained: TrainedOn) -> ProbeOf:
        chosen = _held_out(labelled, held_out) if held_out_only else _unseen(manifest.dataset_name, labelled, trained)
        cases: list[LabelledCase] = []

        def run(encoder: Encoder) -> dict[str, float]:
            if not cases:
                cases.extend(read_labelled(manifest, chosen, plan, configuration))
            half = len(cases) // 2
            return _quick_probe(Frozen(encoder, plan, configuration), cases[:half], cases[half:])

        return run

    return choose


def _quick_probe(frozen: Frozen, learned: Sequence[LabelledCase], tested: Sequence[LabelledCase]) -> dict[str, float]:
    if not _shows_classes(learned) or not _shows_classes(tested):
        logger.warning("The cases of the probe show no foreground, so it tells nothing.")
        return {"probe_dice": math.nan, "probe_knn_dice": math.nan}
    result = probe(frozen, learned, tested, replace(QUICK, num_labelled=len(learned)))
    assert result.knn is not None, "neighbours are asked for"
    return {"probe_dice": _mean(result.linear), "probe_knn_dice": _mean(result.knn)}


def _shows_classes(cases: Sequence[LabelledCase]) -> bool:
    """Whether there are two classes or more among the known voxels."""
    return len({value for case in cases for value in case.labels.unique().tolist() if value >= 0}) > 1


def _by_patient(cases: Iterable[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.subject, []).append(case)
    return found


def _held_out(labelled: Sequence[Case], held_out: Sequence[str]) -> list[str]:
    """A case of each held-out patient."""
    patients = _by_patient(case for case in labelled if case.case_id in held_out)
    if len(patients) < LEAST_CASES:
        raise ValueError(
            f"{len(patients)} of the held-out patients have labels, and a probe needs {LEAST_CASES}. Raise --set "
            "val_fraction, or name another dataset by --probe_dataset"
        )
    return [cases[0].case_id for cases in patients.values()][:MOST_CASES]


def _unseen(dataset: str, labelled: Sequence[Case], trained: TrainedOn) -> list[str]:
    """A case of each patient of whom no image is trained on; no more images are read than it takes."""
    chosen: list[str] = []
    dropped = 0
    for patient, cases in _by_patient(labelled).items():
        if len(chosen) == MOST_CASES:
            break
        if patient in trained.patients or any(trained.hashes.intersection(image_hashes(case.images)) for case in cases):
            dropped += len(cases)
        else:
            chosen.append(cases[0].case_id)
    if dropped:
        logger.warning("The probe leaves out %d labelled cases of %s: their patients are trained on.", dropped, dataset)
    if len(chosen) < LEAST_CASES:
        raise ValueError(
            f"{len(chosen)} patients of {dataset} have labels and are not trained on ({dropped} cases are left out), "
            f"and a probe needs {LEAST_CASES}. Name another dataset by --probe_dataset, or train on this one itself, "
            "where the probe takes the held-out cases"
        )
    return chosen


def _mean(dice: np.ndarray) -> float:
    """Of what is defined; NaN, which is logged as null, where nothing is."""
    defined = dice[np.isfinite(dice)]
    return float(defined.mean()) if defined.size else float("nan")
