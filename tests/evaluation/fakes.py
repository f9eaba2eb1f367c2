"""A labelled dataset with plans, and a stand-in for training that writes what a fold run leaves behind."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nnssl_ext.core.paths import results_root
from nnssl_ext.core.random import generator
from nnssl_ext.core.records import read_json, to_dict, write_json
from nnssl_ext.dataset.manifest import write_dataset_json
from nnssl_ext.dataset.splits import Split, folds_by_subject
from nnssl_ext.evaluation.training import TrainingTask
from nnssl_ext.finetuning.config import PLANS_KEY, FinetuningConfig
from nnssl_ext.finetuning.sources import write_record
from nnssl_ext.imageio import Geometry, read_image, read_segmentation, write_image, write_segmentation

DATASET = "Dataset004_Balls"
CASES = tuple(f"ball_{number:02d}" for number in range(9))
SHAPE = (9, 16, 14)
GEOMETRY = Geometry(spacing=(2.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
LABELS = {"background": 0, "inner": 1, "outer": 2}
NUM_EPOCHS = 20
CASES_FOLDER = "prepared"


def make_dataset(root: Path) -> None:
    """Raw images of two nested balls with their labels."""
    folder = root / "raw" / DATASET
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), -1)
    for case in CASES:
        random = generator(0, case)
        centre = np.array(SHAPE) / 2 + random.uniform(-1, 1, 3)
        distance = np.linalg.norm((grid - centre) * (1.5, 1, 1), axis=-1)
        labels = np.select([distance < random.uniform(2.5, 3.5), distance < 6], [1, 2], 0).astype(np.uint8)
        image = (100.0 * labels + random.normal(0, 5, SHAPE)).astype(np.float32)
        write_image(image, GEOMETRY, folder / "imagesTr" / f"{case}_0000.nii.gz")
        write_segmentation(labels, GEOMETRY, folder / "labelsTr" / f"{case}.nii.gz")
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".nii.gz", num_cases=len(CASES), labels=LABELS)


def splits(num_folds: int = 3) -> tuple[Split, ...]:
    return tuple(folds_by_subject({case: case for case in CASES}, num_folds=num_folds))


def make_plans(root: Path, name: str, **settings) -> Path:
    """Plans of one arm; `settings` go into its fine-tuning record, `None` makes plans of plain nnU-Net."""
    path = root / "preprocessed" / DATASET / f"{name}.json"
    configuration = {"patch_size": [8, 16, 16], "batch_size": 2, "spacing": [2.0, 1.0, 1.0]}
    configuration["architecture"] = settings.pop("architecture", {})
    configuration["data_identifier"] = CASES_FOLDER
    plans = {"plans_name": name, "dataset_name": DATASET, "configurations": {"3d_fullres": configuration}}
    if settings.pop("plain", False):
        write_json(path, plans)
        return path
    config = FinetuningConfig(**{"splits": splits(), "num_epochs": NUM_EPOCHS, "iterations_per_epoch": 5, **settings})
    write_json(path, {**plans, PLANS_KEY: to_dict(config)})
    return path


def make_world(root: Path) -> SimpleNamespace:
    make_dataset(root)
    scratch = make_plans(root, "ptPlans__scratch")
    mae = make_plans(
        root, "ptPlans__mae", pretrained_weights="ptPlans__mae.pth", pretraining_content_hashes=("f" * 64,)
    )
    return SimpleNamespace(root=root, scratch=scratch, mae=mae, results=root / "results" / DATASET)


def pretend_to_train(task: TrainingTask) -> None:
    """Leaves a fold's results behind; a pretrained arm errs less, and more training cases make every arm err less."""
    root = results_root()
    plans = read_json(root.parent / "preprocessed" / task.dataset / f"{task.plans_name}.json")
    run = root / task.dataset / f"{task.trainer}__{task.plans_name}__{task.configuration}"
    write_json(run / "plans.json", plans)
    finetuning = plans.get(PLANS_KEY)
    split = finetuning["splits"][task.fold] if finetuning else to_dict(splits()[task.fold])
    pretrained = bool(finetuning and finetuning["pretrained_weights"])
    error = (0.05 if pretrained else 0.12) * (2 if len(split["train"]) < 5 else 1)
    fold = run / f"fold_{task.fold}"
    rows = [_predict(fold, case, error, (task.plans_name, task.fold)) for case in split["val"]]
    _write_curves(fold, error)
    (fold / "checkpoint_final.pth").write_bytes(b"")
    write_record(fold, root.parent / "preprocessed" / task.dataset / CASES_FOLDER)
    write_json(fold / "validation" / "summary.json", {"metric_per_case": rows})


def _predict(fold: Path, case: str, error: float, key: tuple) -> dict:
    raw = fold.parents[3] / "raw" / DATASET / "labelsTr" / f"{case}.nii.gz"
    labels, geometry = read_segmentation(raw)
    random = generator(1, case, *key)
    wrong = random.uniform(size=labels.shape) < error
    prediction = np.where(wrong, random.integers(0, 3, labels.shape), labels).astype(np.uint8)
    file = fold / "validation" / f"{case}.nii.gz"
    write_segmentation(prediction, geometry, file)
    return {"prediction_file": str(file), "reference_file": str(raw)}


def _write_curves(fold: Path, error: float) -> None:
    lines = []
    for epoch in range(NUM_EPOCHS):
        dice = (1 - 2 * error) * (1 - np.exp(-epoch / 2))
        lines.append({"epoch": epoch, "train_loss": -dice, "val_loss": -0.9 * dice, "pseudo_dice": dice})
    (fold / "finetuning_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def image_of(root: Path, case: str) -> np.ndarray:
    return read_image([root / "raw" / DATASET / "imagesTr" / f"{case}_0000.nii.gz"])[0]
