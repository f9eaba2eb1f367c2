"""nnU-Net's own commands, in processes of their own, on what this package writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.records import read_json
from nnssl_ext.finetuning.nnunet_dataset import preprocess
from nnssl_ext.finetuning.nnunet_plans import FinetuningPlan, plan_finetuning

from ..finetuning.conftest import DATASET, checkpoint, write_fingerprint, write_raw

SHIM = Path(__file__).resolve().parents[2] / "nnssl_ext" / "nnunet_shim"
FAST = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def planned(roots: Path) -> FinetuningPlan:
    """Plans, weights and preprocessed data of the tiny dataset."""
    write_raw(roots / "raw")
    write_fingerprint(roots / "preprocessed")
    torch.save(checkpoint(), roots / "checkpoint.pth")
    plan = plan_finetuning(
        7, roots / "checkpoint.pth", "mae", num_epochs=2, iterations_per_epoch=4, val_iterations_per_epoch=2
    )
    with make_executor(0) as executor:
        preprocess(plan.plans_path, plan.configuration, executor)
    return plan


def environment(**variables: str) -> dict[str, str]:
    """nnU-Net's variables and none of ours, nor what `nnssl_env` sets."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("nnssl_") and k != "nnUNet_extTrainer"}
    return {**kept, **FAST, **variables}


def nnunet(command: str, *arguments: str, **variables: str) -> str:
    """Runs one of nnU-Net's commands to its end and returns what it printed."""
    script = Path(sys.executable).parent / command
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def predict(roots: Path, trainer: str) -> list[str]:
    arguments = ["-d", "7", "-i", str(roots / "raw" / DATASET / "imagesTr"), "-o", str(roots / "out"), "-f", "0"]
    arguments += ["-c", "3d_fullres", "-p", "ptPlans__mae", "-tr", trainer, "-device", "cpu", "-npp", "1", "-nps", "1"]
    nnunet("nnUNetv2_predict", *arguments)
    return sorted(path.name for path in (roots / "out").glob("*.nii.gz"))


def test_nnunet_finds_our_trainer_in_the_shim_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnssl_ext.finetuning.nnunet_trainers import SSLFinetuneTrainer

    monkeypatch.setenv("nnUNet_extTrainer", str(SHIM))
    assert recursive_find_trainer_class_by_name("SSLFinetuneTrainer") is SSLFinetuneTrainer


def test_the_stock_trainer_trains_from_our_weights(
    planned: FinetuningPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    for name, value in FAST.items():
        monkeypatch.setenv(name, value)
    plans = read_json(planned.plans_path)
    plans["continue_training"] = False
    dataset_json = read_json(planned.plans_path.parent / "dataset.json")
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(planned.weights_path), verbose=False)
    trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
    assert trainer.logger.get_value("train_losses", step=-1) < 2


@pytest.mark.slow
def test_our_trainer_comes_through_the_shim_and_stock_prediction_works_on_it(
    planned: FinetuningPlan, roots: Path
) -> None:
    arguments = [DATASET, "3d_fullres", "0", "-p", "ptPlans__mae", "-tr", "SSLFinetuneTrainer", "-device", "cpu"]
    nnunet("nnUNetv2_train", *arguments, nnUNet_extTrainer=str(SHIM))
    fold = roots / "results" / DATASET / "SSLFinetuneTrainer__ptPlans__mae__3d_fullres" / "fold_0"
    assert len((fold / "finetuning_metrics.jsonl").read_text().splitlines()) == 2
    assert len(read_json(fold / "validation" / "summary.json")["metric_per_case"]) == 2
    assert predict(roots, "SSLFinetuneTrainer") == [f"ball_{index}.nii.gz" for index in range(6)]


@pytest.mark.slow
def test_a_stock_trainer_runs_to_its_end_on_our_plans_and_weights(planned: FinetuningPlan, roots: Path) -> None:
    arguments = [DATASET, "3d_fullres", "0", "-p", "ptPlans__mae", "-tr", "nnUNetTrainer_1epoch", "-device", "cpu"]
    text = nnunet("nnUNetv2_train", *arguments, "-pretrained_weights", str(planned.weights_path))
    assert "Loading pretrained weights from file" in text
    fold = roots / "results" / DATASET / "nnUNetTrainer_1epoch__ptPlans__mae__3d_fullres" / "fold_0"
    assert read_json(fold / "validation" / "summary.json")["foreground_mean"]["Dice"] > 0.1
    assert predict(roots, "nnUNetTrainer_1epoch") == [f"ball_{index}.nii.gz" for index in range(6)]
