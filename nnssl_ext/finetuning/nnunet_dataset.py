"""nnU-Net's own steps on a labelled dataset, run in this process as far as they are missing."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.core.paths import find_dataset
from nnssl_ext.core.records import atomic_path, read_json, write_json
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.finetuning.sources import read_sources, source_hashes, write_sources

logger = logging.getLogger(__name__)
NNUNET_PLANS = "nnUNetPlans"
INTENSITY_SAMPLES = 10_000_000
"""Foreground voxels drawn, with replacement, for the fingerprint's intensity statistics. nnU-Net draws ten times as
many: that moves percentiles in the fourth digit and takes most of the time on small data."""
_CASE_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
"""Files of a preprocessed case; the last one is written last and marks the case as whole."""


def prepare_dataset(dataset: int | str, num_processes: int, *, with_plans: bool) -> Path:
    """Extracts nnU-Net's fingerprint, and makes its default plans, where they are missing.

    Args:
        dataset: Id or name of a labelled dataset in `nnUNet_raw`.
        num_processes: Worker processes of nnU-Net's fingerprint extraction; at least one is started.
        with_plans: Whether `nnUNetPlans.json` is needed too.

    Returns:
        The dataset's preprocessed folder, with `dataset.json` and `dataset_fingerprint.json` in it.

    Raises:
        FileNotFoundError: If the dataset or one of its labels is missing.
    """
    raw = find_dataset(dataset, nnunet_root("raw"))
    folder = nnunet_root("preprocessed") / raw.name
    _check_labels(Manifest.load(raw))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dataset_fingerprint.json").is_file():
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

        logger.info("extracting nnU-Net's fingerprint of %s", raw.name)
        with _quiet():
            extractor = DatasetFingerprintExtractor(raw.name, max(1, num_processes))
            extractor.show_progress_bar = False
            extractor.num_foreground_voxels_for_intensitystats = INTENSITY_SAMPLES
            extractor.run()
    if not (folder / "dataset.json").is_file():
        write_json(folder / "dataset.json", read_json(raw / "dataset.json"))
    if with_plans and not (folder / f"{NNUNET_PLANS}.json").is_file():
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        logger.info("making nnU-Net's default plans of %s", raw.name)
        with _quiet():
            ExperimentPlanner(raw.name).plan_experiment()
    return folder


def _check_labels(manifest: Manifest) -> None:
    for case in manifest.cases:
        if case.label is None or not case.label.is_file():
            raise FileNotFoundError(
                f"{manifest.dataset_name}: case {case.case_id} has no label ({case.label}). Fine-tuning needs a label "
                "for every case; an unlabelled dataset is for nnssl_train"
            )


def preprocess(plans_path: Path, configuration: str, executor: Executor) -> Path:
    """Preprocesses the cases that are missing, or whose image or label has changed since, with nnU-Net's preprocessor.

    Copies the labels for nnU-Net's validation, too. A case of which nobody knows what it was made of is made again.

    Args:
        plans_path: Plans in the dataset's preprocessed folder.
        configuration: Which one of the plans.
        executor: Where the cases run.

    Returns:
        The folder of the preprocessed cases.

    Raises:
        ValueError: If a case fails; the message names the first one and the reason.
    """
    plans = read_json(plans_path)
    folder = plans_path.parent / plans["configurations"][configuration]["data_identifier"]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.load(find_dataset(plans["dataset_name"], nnunet_root("raw")))
    copy_labels(manifest, plans_path.parent / "gt_segmentations")
    made_of = source_hashes(manifest, manifest.subjects(), executor, plans_path.parent)
    present = {path.stem for path in folder.glob(f"*{_CASE_SUFFIXES[-1]}")}
    kept = {case for case, hashes in read_sources(folder).items() if made_of.get(case) == hashes}
    missing = [case for case in manifest.cases if case.case_id not in present & kept]
    tasks = {
        case.case_id: (plans_path, configuration, case.case_id, case.images, case.label, folder) for case in missing
    }
    results = list(track(executor.run(preprocess_case, tasks), len(tasks), "preprocessing for nnU-Net"))
    failed = [result for result in results if result.error is not None]
    if results:
        write_sources(folder, {result.key: made_of[result.key] for result in results if result.error is None})
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(tasks)} cases could not be preprocessed. {failed[0].key}: {failed[0].error}"
        )
    return folder


def preprocess_case(
    plans_path: Path, configuration: str, case_id: str, images: tuple[Path, ...], label: Path, folder: Path
) -> None:
    """Preprocesses one case as `nnUNetv2_preprocess` does; it appears in the folder only when it is whole."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(str(plans_path))
    settings = manager.get_configuration(configuration)
    dataset_json = read_json(plans_path.parent / "dataset.json")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        settings.preprocessor_class(verbose=False).run_case_save(
            str(Path(temporary) / case_id),
            [str(image) for image in images],
            str(label),
            manager,
            settings,
            dataset_json,
        )
        for suffix in _CASE_SUFFIXES:
            (Path(temporary) / f"{case_id}{suffix}").replace(folder / f"{case_id}{suffix}")


def copy_labels(manifest: Manifest, folder: Path) -> None:
    """Copies the reference segmentations to where nnU-Net's validation reads them, unless a copy is as new."""
    for case in manifest.cases:
        target = folder / f"{case.case_id}{manifest.file_ending}"
        if case.label is None or (target.is_file() and target.stat().st_mtime >= case.label.stat().st_mtime):
            continue
        with atomic_path(target) as temporary:
            shutil.copyfile(case.label, temporary)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield
