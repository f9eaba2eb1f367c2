"""Preprocesses a dataset in parallel; a run that was stopped, killed or out of disk goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.lock import sole_writer
from nnssl_ext.core.logs import Speed, track
from nnssl_ext.core.paths import find_dataset, find_dataset_name, preprocessed_root, raw_root
from nnssl_ext.dataset.integrity import content_hash
from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.fingerprint.foreground import FOREGROUND_RULE
from nnssl_ext.fingerprint.record import FINGERPRINT_FILE, Fingerprint
from nnssl_ext.imageio import read_image, read_segmentation_of
from nnssl_ext.imageio.geometry import Geometry
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.preprocessing.case import preprocess_array
from nnssl_ext.preprocessing.errors import StorageFullError
from nnssl_ext.preprocessing.index import (
    INDEX_FILE,
    JOURNAL_FILE,
    Index,
    IndexEntry,
    Journal,
    Provenance,
    read_index,
    read_journal,
    write_index,
)
from nnssl_ext.preprocessing.layout import StorageType
from nnssl_ext.preprocessing.normalize import CT_SCHEME, check_normalization
from nnssl_ext.preprocessing.resample import check_resampling
from nnssl_ext.preprocessing.resample_torch import check_device
from nnssl_ext.preprocessing.store import SUFFIX, Store, write_case

logger = logging.getLogger(__name__)
TEMPORARY_FILES = ".tmp-*"
MAX_LISTED = 20


def preprocess_case(
    case: Case, plan: Plan, configuration: Configuration, folder: Path, dtype: StorageType, device: str = "cpu"
) -> IndexEntry:
    """Reads, preprocesses and stores one case; what a worker does.

    Raises:
        ValueError: If the case cannot be preprocessed; the message names its files.
        FileNotFoundError: If a file is missing.
        StorageFullError: If the disk is full.
    """
    source = source_stamp(case)
    image, geometry = read_image(case.images)
    hashes, grid = tuple(map(content_hash, image)), grid_code(image.shape[1:], geometry)
    try:
        mask = case.anonymization_mask
        altered = None if mask is None else read_segmentation_of(mask, image.shape[1:], geometry) != 0
        result = preprocess_array(image, geometry.spacing, plan, configuration, device, altered)
        del image  # the raw and the finished volume are not needed together
        provenance = Provenance(
            subject=case.subject,
            dataset=case.dataset,
            modalities=tuple(case.modalities),
            content_hashes=hashes,
            source=source,
            session=case.session,
            grid=grid,
            origin=_origin(result.properties, geometry, configuration),
        )
        return write_case(
            folder,
            case.case_id,
            result.data,
            {**geometry.to_nnunet_properties(), **result.properties},
            result.foreground,
            spacing=result.spacing,
            provenance=provenance,
            altered=result.altered,
            dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, case.images))}: {error}") from error


def _raw_files(case: Case) -> list[Path]:
    mask = case.anonymization_mask
    return [*map(Path, case.images), *([] if mask is None else [mask])]


def grid_code(shape: Sequence[int], geometry: Geometry) -> str:
    """A short code that images on one voxel grid share: equal shape, and spacing and place equal to 0.01 mm."""
    placement = (geometry.spacing, geometry.origin, geometry.direction)
    rounded = [[round(value, 2) + 0.0 for value in values] for values in placement]  # -0.0 + 0.0 is 0.0
    return hashlib.blake2b(repr((tuple(shape), rounded)).encode(), digest_size=8).hexdigest()


def _origin(properties: Mapping[str, Any], geometry: Geometry, configuration: Configuration) -> tuple[float, ...]:
    """Where the cropped volume begins, in mm along the stored axes."""
    box, axes = properties["bbox_used_for_cropping"], configuration.transpose_forward
    return tuple(side[0] * geometry.spacing[axis] for side, axis in zip(box, axes, strict=True))


def source_stamp(case: Case) -> tuple[str, ...]:
    """Size and modification time of every raw file of a case, its anonymisation mask the last.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    stats = [path.stat() for path in _raw_files(case)]
    return tuple(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def storage_settings(plan: Plan, configuration: Configuration, dtype: StorageType) -> dict[str, Any]:
    """What decides the stored numbers, as JSON builtins. Patch and batch size do not; CT statistics do where used."""
    statistics = plan.foreground_intensity_properties
    uses_statistics = [
        str(number) for number, name in enumerate(configuration.normalization_schemes) if name == CT_SCHEME
    ]
    settings = {
        "dtype": dtype,
        "transpose_forward": configuration.transpose_forward,
        "spacing": configuration.spacing,
        "normalization_schemes": configuration.normalization_schemes,
        "use_mask_for_norm": configuration.use_mask_for_norm,
        "resampling_fn_data": configuration.resampling_fn_data,
        "resampling_fn_data_kwargs": configuration.resampling_fn_data_kwargs,
        "foreground_intensity_properties": {number: statistics[number] for number in uses_statistics},
        "foreground_rule": FOREGROUND_RULE,
    }
    return json.loads(json.dumps(settings, allow_nan=False))


def preprocess_dataset(
    manifest: Manifest,
    plan: Plan,
    configuration: Configuration,
    folder: Path,
    executor: Executor,
    skip_failed: bool = False,
    *,
    overwrite: bool = False,
    dtype: StorageType = "float16",
    device: str = "cpu",
    excluded: Mapping[str, str] | None = None,
) -> Store:
    """Preprocesses every case that is not yet there and writes the index.

    Args:
        manifest: The cases.
        plan: Foreground statistics.
        configuration: Axes, spacing, normalisation, resampling.
        folder: Where the files go.
        executor: Runs the cases.
        skip_failed: Finish with the cases that could be preprocessed; the others are named in the index.
        overwrite: Delete what is in the folder first.
        dtype: Type on disk.
        device: Where images are resampled: `cpu`, or a torch device that every worker has.
        excluded: Cases known to be unusable, and why; they count as failed without being read.

    Returns:
        The store.

    Raises:
        ValueError: If the plan cannot be carried out, there is no such device, the folder holds cases made with other
            settings, cases failed (without `skip_failed`), none is left, another run is writing to the folder, or the
            disk is full.
    """
    check_normalization(configuration.normalization_schemes, plan.foreground_intensity_properties)
    check_resampling(configuration.resampling_fn_data, configuration.resampling_fn_data_kwargs)
    if device != "cpu":
        _check_device_of_workers(executor, device)
    settings = storage_settings(plan, configuration, dtype)
    failed = dict(excluded or {})
    cases = [case for case in manifest.cases if case.case_id not in failed]
    with _full_disk_explained(folder), sole_writer(folder):
        _clear(folder, everything=overwrite)
        done = _finished(folder, settings, cases)
        arguments = (plan, configuration, folder, dtype, device)
        todo = {case.case_id: (case, *arguments) for case in cases if case.case_id not in done}
        logger.info("%s: %d cases are there, %d to preprocess", folder.name, len(done), len(todo))
        failed |= _run(folder, settings, done, todo, executor)
        _clear(folder, everything=False)
        _judge(failed, len(done), skip_failed)
        write_index(folder, Index(settings=settings, entries=done, failed=failed))
        (folder / JOURNAL_FILE).unlink(missing_ok=True)
    return Store(folder, done)


def _check_device_of_workers(executor: Executor, device: str) -> None:
    """Refuses a device that workers do not have, before anything is deleted."""
    for result in executor.run(check_device, {"device": (device,)}):
        if result.error is not None:
            raise ValueError(result.error.removeprefix(f"{ValueError.__name__}: "))


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except StorageFullError as error:
        raise ValueError(
            f"the disk of {folder} is full: {error}. Every finished case is whole. Free space, or point "
            "nnssl_preprocessed to another disk, and start the same command again: it goes on where it stopped."
        ) from error


def _run(
    folder: Path,
    settings: Mapping[str, Any],
    done: dict[str, IndexEntry],
    todo: Mapping[str, tuple[Any, ...]],
    executor: Executor,
) -> dict[str, str]:
    """Runs the cases, adds what was made to `done`, and returns the reasons of those that failed."""
    failed: dict[str, str] = {}
    speed = Speed()
    with Journal(folder, settings, done.values()) as journal:
        for result in track(executor.run(preprocess_case, todo), len(todo), f"preprocessing {folder.name}", speed):
            if result.error is None:
                done[result.key] = result.value
                journal.add(result.value)
                speed.add(math.prod(result.value.shape))
            elif result.error.startswith(StorageFullError.__name__):
                raise StorageFullError(result.error)
            else:
                failed[result.key] = result.error
                logger.warning("%s failed: %s", result.key, result.error)
    if len(todo) > len(failed):
        logger.info("%s: %d cases done, %s", folder.name, len(todo) - len(failed), speed)
    return failed


def _judge(failed: Mapping[str, str], num_done: int, skip_failed: bool) -> None:
    if not failed and num_done:
        return
    lines = [f"  {case_id}: {reason}" for case_id, reason in sorted(failed.items())[:MAX_LISTED]]
    if len(failed) > MAX_LISTED:
        lines.append(f"  and {len(failed) - MAX_LISTED} more")
    listing = "\n".join(lines)
    if not num_done:
        raise ValueError(f"no case could be preprocessed\n{listing}".rstrip())
    if not skip_failed:
        raise ValueError(
            f"{len(failed)} of {num_done + len(failed)} cases could not be preprocessed:\n{listing}\n"
            "The others are kept. Repair or remove these and start again, or add --skip_failed to go on without them."
        )


def _clear(folder: Path, everything: bool) -> None:
    """Removes what killed writers left; on request all cases and the index too."""
    patterns = [TEMPORARY_FILES, f"*{SUFFIX}", INDEX_FILE, JOURNAL_FILE] if everything else [TEMPORARY_FILES]
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _finished(folder: Path, settings: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, IndexEntry]:
    """The cases whose file is whole and whose raw files are those it was made from."""
    index = read_index(folder) if (folder / INDEX_FILE).is_file() else None
    entries: dict[str, IndexEntry] = {}
    for record in (index, read_journal(folder)):
        if record is None:
            continue
        changed = sorted(key for key in settings if record.settings.get(key) != settings[key])
        if changed:
            differences = ", ".join(f"{key} (there {record.settings.get(key)}, now {settings[key]})" for key in changed)
            raise ValueError(
                f"{folder} holds cases that were made with other settings: {differences}. Add --overwrite to make them "
                "anew, or plan under another name (nnssl_plan_experiment -overwrite_plans_name NAME)."
            )
        entries.update(record.entries)
    return {
        case.case_id: entries[case.case_id] for case in cases if _is_current(folder, case, entries.get(case.case_id))
    }


def _is_current(folder: Path, case: Case, entry: IndexEntry | None) -> bool:
    if entry is None:
        return False
    path = folder / f"{case.case_id}{SUFFIX}"
    if not path.is_file() or path.stat().st_size != entry.num_bytes:
        return False
    return all(file.is_file() for file in _raw_files(case)) and source_stamp(case) == entry.source


def preprocess_configurations(
    dataset: int | str,
    plans_name: str,
    configurations: Sequence[str] | None,
    executor: Executor,
    *,
    skip_failed: bool = False,
    overwrite: bool = False,
    dtype: StorageType = "float16",
    device: str = "cpu",
) -> list[Store]:
    """Preprocesses configurations of a planned dataset into `$nnssl_preprocessed/DATASET/<data_identifier>`.

    Args:
        dataset: Id or name.
        plans_name: Name of its plans file without `.json`.
        configurations: Names within the plans; all of them where None.
        executor: Runs the cases.
        skip_failed: See `preprocess_dataset`.
        overwrite: See `preprocess_dataset`.
        dtype: See `preprocess_dataset`.
        device: See `preprocess_dataset`.

    Raises:
        FileNotFoundError: If dataset or plans are missing.
        ValueError: See `preprocess_dataset`.
    """
    name = find_dataset_name(dataset)
    manifest = Manifest.load(find_dataset(name, raw_root()))
    target = preprocessed_root() / name
    excluded = _excluded_by_fingerprint(target)
    plan = Plan.load(target / f"{plans_name}.json")
    stores = []
    for configuration_name in configurations or plan.configuration_names:
        configuration = plan.configuration(configuration_name)
        folder = target / configuration.data_identifier
        options: dict[str, Any] = {
            "skip_failed": skip_failed,
            "overwrite": overwrite,
            "dtype": dtype,
            "device": device,
            "excluded": excluded,
        }
        stores.append(preprocess_dataset(manifest, plan, configuration, folder, executor, **options))
    return stores


def _excluded_by_fingerprint(folder: Path) -> dict[str, str]:
    """The cases that the dataset's fingerprint, where there is one, found unusable."""
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        return {}
    fingerprint = Fingerprint.load(path)
    problems = (problem for problem in fingerprint.problems if problem.case_id not in fingerprint.cases)
    return {problem.case_id: f"{problem.kind}: {problem.reason} ({problem.file})" for problem in problems}
