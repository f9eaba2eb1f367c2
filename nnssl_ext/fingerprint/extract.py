"""Extracting a fingerprint: every case is checked and measured, in parallel, each worker holding one at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import Speed, track
from nnssl_ext.dataset.integrity import USABLE_KINDS, Problem, duplicate_problems, find_odd_dimensions, read_checked
from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.fingerprint.foreground import FOREGROUND_RULE, foreground_mask, nonzero_box
from nnssl_ext.fingerprint.intensities import intensity_quantiles, intensity_statistics, pool_statistics
from nnssl_ext.fingerprint.journal import CaseResult, append_result, file_stamp, read_journal, start_journal
from nnssl_ext.fingerprint.record import FINGERPRINT_FILE, CaseFingerprint, Fingerprint, IntensityStatistics

logger = logging.getLogger(__name__)

JOURNAL_FILE = "nnssl_fingerprint_cases.jsonl"
REASONS_SHOWN = 3


def describe_case(case: Case, num_channels: int, label_values: frozenset[int] | None) -> CaseResult:
    """Checks, reads and measures one case.

    Args:
        case: Its files.
        num_channels: Channels of the dataset.
        label_values: What its label map may hold; None where the dataset has no labels.
    """
    stamp = file_stamp(case)
    checked = read_checked(case, num_channels, label_values)
    problems, data, geometry = tuple(checked.problems), checked.image, checked.geometry
    if data is None or geometry is None or any(problem.kind not in USABLE_KINDS for problem in problems):
        return CaseResult(case_id=case.case_id, stamp=stamp, problems=problems)
    masks = [foreground_mask(channel) for channel in data]
    values = [channel[mask] for channel, mask in zip(data, masks, strict=True)]
    _, depth, height, width = data.shape
    (z0, z1), (y0, y1), (x0, x1) = nonzero_box(data)
    fingerprint = CaseFingerprint(
        shape=(depth, height, width),
        shape_after_crop=(z1 - z0, y1 - y0, x1 - x0),
        spacing=geometry.spacing,
        foreground_fraction=float(np.mean(np.any(masks, axis=0))),
        content_hashes=checked.hashes,
        intensities=tuple(intensity_statistics(channel) for channel in values),
    )
    quantiles = tuple(intensity_quantiles(channel) for channel in values)
    return CaseResult(
        case_id=case.case_id, stamp=stamp, fingerprint=fingerprint, quantiles=quantiles, problems=problems
    )


def extract_fingerprint(manifest: Manifest, folder: Path, executor: Executor) -> Fingerprint:
    """Describes every case of a dataset and writes `nnssl_fingerprint.json`.

    What is found is appended to `nnssl_fingerprint_cases.jsonl` case by case; a case that is there already and whose
    files have not changed is not read again. Cases that cannot be used are left out and listed as problems.

    Args:
        manifest: Of the dataset.
        folder: `$nnssl_preprocessed/DatasetXXX_Name`.
        executor: Runs the cases.

    Raises:
        ValueError: If no case can be used; the message gives the first reasons.
    """
    results = _describe_all(manifest, folder / JOURNAL_FILE, executor)
    cases = {key: result.fingerprint for key, result in results.items() if result.fingerprint is not None}
    odd = find_odd_dimensions(manifest, {case_id: case.shape[0] for case_id, case in cases.items()})
    for problem in odd:
        del cases[problem.case_id]
    problems = [problem for result in results.values() for problem in result.problems]
    problems += odd + duplicate_problems(manifest, {case_id: case.content_hashes for case_id, case in cases.items()})
    if not cases:
        reasons = "; ".join(map(str, problems[:REASONS_SHOWN]))
        raise ValueError(f"{manifest.dataset_name} has no case that can be used. {reasons}")
    shares = [np.prod(case.shape_after_crop) / np.prod(case.shape) for case in cases.values()]
    fingerprint = Fingerprint(
        dataset_name=manifest.dataset_name,
        foreground_rule=FOREGROUND_RULE,
        cases=cases,
        foreground_intensity_properties_per_channel=_pool_channels(cases, results, len(manifest.channel_names)),
        median_relative_size_after_cropping=float(np.median(shares)),
        problems=tuple(problems),
    )
    fingerprint.save(folder / FINGERPRINT_FILE)
    return fingerprint


def _describe_all(manifest: Manifest, journal: Path, executor: Executor) -> dict[str, CaseResult]:
    num_channels, values = len(manifest.channel_names), manifest.label_values if manifest.labels else None
    settings: dict[str, Any] = {
        "foreground_rule": FOREGROUND_RULE,
        "num_channels": num_channels,
        "label_values": None if values is None else sorted(values),
    }
    results = read_journal(journal, settings, manifest.cases)
    start_journal(journal, settings, results.values())
    if results:
        logger.info("%d of %d cases are described already in %s", len(results), len(manifest.cases), journal)
    tasks = {case.case_id: (case, num_channels, values) for case in manifest.cases if case.case_id not in results}
    speed = Speed()
    with journal.open("a", encoding="utf-8") as file:
        for outcome in track(executor.run(describe_case, tasks), len(tasks), "fingerprint", speed):
            speed.add()
            if outcome.error is None:
                results[outcome.key] = outcome.value
                append_result(file, outcome.value)
            else:
                results[outcome.key] = _failed(manifest.case(outcome.key), outcome.error)
    return {case.case_id: results[case.case_id] for case in manifest.cases}


def _failed(case: Case, error: str) -> CaseResult:
    """The result of a case whose worker raised or died; it is not kept, so the next run tries again."""
    problem = Problem(case.case_id, case.images[0], error.splitlines()[0], "unreadable")
    return CaseResult(case_id=case.case_id, stamp=(), problems=(problem,))


def _pool_channels(
    cases: Mapping[str, CaseFingerprint], results: Mapping[str, CaseResult], num_channels: int
) -> dict[str, IntensityStatistics]:
    pooled = {}
    for channel in range(num_channels):
        statistics, quantiles = [], []
        for case_id, case in cases.items():
            found = case.intensities[channel]
            if found is not None:
                statistics.append(found)
                quantiles.append(results[case_id].quantiles[channel])
        pooled[str(channel)] = pool_statistics(statistics, quantiles)
    return pooled
