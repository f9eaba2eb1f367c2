"""Extracting a fingerprint: every case is read once, in parallel, and a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.core.records import from_dict, to_dict, write_text
from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.fingerprint.foreground import FOREGROUND_RULE, foreground_mask, nonzero_box
from nnssl_ext.fingerprint.intensities import intensity_quantiles, intensity_statistics, pool_statistics
from nnssl_ext.fingerprint.record import (
    FINGERPRINT_FILE,
    CaseFingerprint,
    CaseProblem,
    Fingerprint,
    IntensityStatistics,
)
from nnssl_ext.imageio import read_image

logger = logging.getLogger(__name__)

CASES_FILE = "nnssl_fingerprint_cases.jsonl"


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What a worker found in one case."""

    stamp: list[tuple[int, int]]
    """Size in bytes and time of change in ns of each file; a result is stale when they differ."""
    fingerprint: CaseFingerprint | None = None
    """None where the case cannot be used."""
    quantiles: tuple[tuple[float, ...], ...] = ()
    """Of each channel's foreground."""
    problems: tuple[CaseProblem, ...] = ()
    """What is wrong with the case."""


def describe_case(case: Case, num_channels: int) -> CaseResult:
    """Checks, reads and measures one case, and holds no other.

    Args:
        case: Its files.
        num_channels: Channels of the dataset.
    """
    stamp = file_stamp(case)
    data, geometry = read_image(case.images)
    masks = [foreground_mask(channel) for channel in data]
    values = [channel[mask] for channel, mask in zip(data, masks, strict=True)]
    _, depth, height, width = data.shape
    (z0, z1), (y0, y1), (x0, x1) = nonzero_box(data)
    fingerprint = CaseFingerprint(
        shape=(depth, height, width),
        shape_after_crop=(z1 - z0, y1 - y0, x1 - x0),
        spacing=geometry.spacing,
        foreground_fraction=float(np.mean(np.any(masks, axis=0))),
        content_hashes=(),
        intensities=tuple(intensity_statistics(channel) for channel in values),
    )
    quantiles = tuple(intensity_quantiles(channel) for channel in values)
    return CaseResult(stamp=stamp, fingerprint=fingerprint, quantiles=quantiles)


def file_stamp(case: Case) -> list[tuple[int, int]]:
    """Size and time of change of each of a case's files; (-1, -1) for one that is missing."""
    files = [*case.images, *([case.label] if case.label else [])]
    states = [file.stat() if file.is_file() else None for file in files]
    return [(state.st_size, state.st_mtime_ns) if state else (-1, -1) for state in states]


def extract_fingerprint(manifest: Manifest, folder: Path, executor: Executor) -> Fingerprint:
    """Describes every case of a dataset and writes `nnssl_fingerprint.json`.

    What is found is appended to `nnssl_fingerprint_cases.jsonl` case by case; a case that is there already and whose
    files have not changed is not read again.

    Args:
        manifest: Of the dataset.
        folder: `$nnssl_preprocessed/DatasetXXX_Name`.
        executor: Runs the cases.

    Raises:
        ValueError: If no case can be used; the message gives the first reasons.
    """
    results = _describe_all(manifest, folder / CASES_FILE, executor)
    problems = [problem for result in results.values() for problem in result.problems]
    cases = {case_id: result.fingerprint for case_id, result in results.items() if result.fingerprint is not None}
    if not cases:
        reasons = "; ".join(f"{problem.file}: {problem.reason}" for problem in problems[:3])
        raise ValueError(f"{manifest.dataset_name} has no case that can be used: {reasons}")
    shares = [np.prod(case.shape_after_crop) / np.prod(case.shape) for case in cases.values()]
    fingerprint = Fingerprint(
        dataset_name=manifest.dataset_name,
        foreground_rule=FOREGROUND_RULE,
        cases=cases,
        foreground_intensity_properties_per_channel=_pool_channels(results, len(manifest.channel_names)),
        median_relative_size_after_cropping=float(np.median(shares)),
        problems=tuple(problems),
    )
    fingerprint.save(folder / FINGERPRINT_FILE)
    return fingerprint


def _pool_channels(results: Mapping[str, CaseResult], num_channels: int) -> dict[str, IntensityStatistics]:
    pooled = {}
    for channel in range(num_channels):
        found = [
            (statistics, result.quantiles[channel])
            for result in results.values()
            if result.fingerprint is not None and (statistics := result.fingerprint.intensities[channel]) is not None
        ]
        pooled[str(channel)] = pool_statistics([pair[0] for pair in found], [pair[1] for pair in found])
    return pooled


def _describe_all(manifest: Manifest, journal: Path, executor: Executor) -> dict[str, CaseResult]:
    known = _read_journal(manifest, journal)
    todo = {case.case_id: case for case in manifest.cases if case.case_id not in known}
    if known:
        logger.info("%d of %d cases are described already in %s", len(known), len(manifest.cases), journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    write_text(journal, "".join(_line(case_id, result) for case_id, result in known.items()))
    tasks = {case_id: (case, len(manifest.channel_names)) for case_id, case in todo.items()}
    with journal.open("a", encoding="utf-8") as file:
        for outcome in track(executor.run(describe_case, tasks), len(tasks), "fingerprint"):
            if outcome.error is not None:
                known[outcome.key] = _failed(todo[outcome.key], outcome.error)
                continue
            known[outcome.key] = outcome.value
            file.write(_line(outcome.key, outcome.value))
            file.flush()
    return {case.case_id: known[case.case_id] for case in manifest.cases}


def _failed(case: Case, error: str) -> CaseResult:
    problem = CaseProblem(case_id=case.case_id, file=str(case.images[0]), kind="unreadable", reason=error)
    return CaseResult(stamp=[], problems=(problem,))


def _line(case_id: str, result: CaseResult) -> str:
    return json.dumps({"case_id": case_id, **to_dict(result)}) + "\n"


def _read_journal(manifest: Manifest, journal: Path) -> dict[str, CaseResult]:
    """The results of earlier runs that still hold; a last line that was cut off by a crash is left out."""
    if not journal.is_file():
        return {}
    cases = {case.case_id: case for case in manifest.cases}
    known = {}
    for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        entry: dict[str, Any] = json.loads(line)
        case = cases.get(entry.pop("case_id"))
        result = from_dict(CaseResult, entry, where=str(journal))
        channels = len(manifest.channel_names)
        if case is not None and file_stamp(case) == result.stamp and len(result.quantiles) in (0, channels):
            known[case.case_id] = result
    return known
