"""Probes while a run goes on: a few labelled cases, one subset, some seconds."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.labelled import LabelledCase, read_labelled
from nnssl_ext.downstream.probing import ProbeConfig, probe
from nnssl_ext.engine.run import Probe, ProbeOf
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
        held_out_only: Whether only cases that the run holds out may be looked at: where it trains on this dataset.

    Raises:
        ValueError: If the dataset has no labels, here, or the held-out cases too few, when the probe is given them;
            same-case retrieval and rank are logged in any case.
    """
    labelled = [case for case in manifest.cases if case.label is not None]
    patients = len(_one_of_each_patient(labelled))
    if patients < LEAST_CASES:
        raise ValueError(
            f"{manifest.dataset_name} has labels of {patients} patients, and a probe needs {LEAST_CASES}. Name a "
            "labelled dataset by --probe_dataset, or leave out --probe_every: rank of the features and retrieval of "
            "a case's other crops are logged without labels"
        )

    def choose(held_out: Sequence[str]) -> ProbeOf:
        chosen = _chosen(labelled, held_out_only, held_out)
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


def _one_of_each_patient(cases: Iterable[Case]) -> list[str]:
    first: dict[str, str] = {}
    for case in cases:
        first.setdefault(case.subject, case.case_id)
    return list(first.values())


def _chosen(labelled: Sequence[Case], held_out_only: bool, held_out: Sequence[str]) -> list[str]:
    allowed = _one_of_each_patient(case for case in labelled if not held_out_only or case.case_id in held_out)
    if len(allowed) < LEAST_CASES:
        raise ValueError(
            f"{len(allowed)} of the held-out patients have labels, and a probe needs {LEAST_CASES}. Raise --set "
            "val_fraction, or name another dataset by --probe_dataset"
        )
    return allowed[:MOST_CASES]


def _mean(dice: np.ndarray) -> float:
    """Of what is defined; NaN, which is logged as null, where nothing is."""
    defined = dice[np.isfinite(dice)]
    return float(defined.mean()) if defined.size else float("nan")
