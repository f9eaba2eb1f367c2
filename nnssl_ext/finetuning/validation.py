"""Prediction and scoring of whole validation volumes in this process, in nnU-Net's file formats.

nnU-Net's own validation starts two pools of processes that import torch, and mirrors each volume along all axes. On a
CPU with small volumes that takes longer than the training. What is computed here is the same, mirrored on request.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def predict_cases(
    trainer: nnUNetTrainer, case_ids: Iterable[str], folder: Path, mirroring: bool, save_probabilities: bool = False
) -> None:
    """Predicts preprocessed cases with a trainer's network and writes segmentations in the geometry of the raw images.

    Args:
        trainer: An initialised trainer; its network is put into eval mode, deep supervision must be off.
        case_ids: Cases of the trainer's preprocessed folder.
        folder: Where the segmentations go.
        mirroring: Whether to average over mirrored copies along the axes that training mirrored.
        save_probabilities: Whether to write `.npz` files with class probabilities, for nnU-Net's ensembling.
    """
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(case_ids))
    for case_id in dataset.identifiers:
        data, _, _, properties = dataset.load_case(case_id)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:]))).cpu()
        export_prediction_from_logits(
            logits,
            properties,
            trainer.configuration_manager,
            trainer.plans_manager,
            trainer.dataset_json,
            str(folder / case_id),
            save_probabilities,
            num_threads_torch=torch.get_num_threads(),
        )


def score_cases(trainer: nnUNetTrainer, case_ids: Iterable[str], folder: Path) -> dict[str, Any]:
    """Compares predictions with the ground truth and writes nnU-Net's `summary.json` into the folder.

    Returns:
        nnU-Net's summary: `metric_per_case`, `mean` per label or region, and `foreground_mean`. A label that neither
        the reference nor the prediction has counts as missing in a mean, as in nnU-Net.

    Raises:
        FileNotFoundError: If a prediction or its reference is missing.
    """
    manager = trainer.label_manager
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    reference = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    reader = trainer.plans_manager.image_reader_writer_class()
    ending = trainer.dataset_json["file_ending"]
    rows = []
    for case_id in sorted(case_ids):
        files = [reference / f"{case_id}{ending}", folder / f"{case_id}{ending}"]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: {case_id} cannot be scored")
        rows.append(compute_metrics(str(files[0]), str(files[1]), reader, labels, manager.ignore_label))
    summary = summarise(rows, labels)
    save_summary_json(summary, str(folder / "summary.json"))
    return summary


def summarise(rows: list[dict[str, Any]], labels: Iterable[Any]) -> dict[str, Any]:
    """Means over cases per label and over labels, as nnU-Net's `summary.json` has them."""
    means = {label: _mean_metrics([row["metrics"][label] for row in rows]) for label in labels}
    summary = {"metric_per_case": rows, "mean": means, "foreground_mean": _mean_metrics(list(means.values()))}
    for part in (*rows, means, summary["foreground_mean"]):
        recursive_fix_for_json_export(part)
    return summary


def _mean_metrics(metrics: list[dict[str, float]]) -> dict[str, float]:
    means = {}
    for name in metrics[0]:
        values = np.array([entry[name] for entry in metrics], dtype=float)
        known = values[~np.isnan(values)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    return means
