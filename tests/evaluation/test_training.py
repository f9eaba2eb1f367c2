import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl_ext.core.history import record_command
from nnssl_ext.core.records import write_json
from nnssl_ext.evaluation import provenance, scoring
from nnssl_ext.evaluation.arms import read_arm
from nnssl_ext.evaluation.records import Curve
from nnssl_ext.finetuning.sources import write_record
from tests.evaluation import fakes

LEASE = """
import os, sys, time
from pathlib import Path
from nnssl_ext.evaluation.training import use_gpu
use_gpu(("3", "7"), Path(sys.argv[1]))
use_gpu(("3", "7"), Path(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def start(folder: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", LEASE, str(folder)], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    )


def test_workers_share_out_the_gpus_and_a_dead_one_gives_its_own_back(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    try:
        devices = {process.stdout.readline().strip() for process in (first, second)}
        assert devices == {"3", "7"}
        third = start(tmp_path)
        _, errors = third.communicate()
        assert "all GPUs (3, 7) are taken" in errors
        first.kill()
        first.wait()
        fourth = start(tmp_path)
        output, _ = fourth.communicate()
        assert output.strip() in devices
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_curves_of_our_trainer(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "train_loss": 1.0, "val_loss": 0.9, "pseudo_dice": None}, {"epoch": 1, "train_loss": 0.5}]
    (tmp_path / scoring.CURVES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scoring.read_curve(tmp_path) == Curve(train_loss=(1.0, 0.5), val_loss=(0.9, None), dice=(None, None))


def test_curves_of_stock_nnunet_come_from_its_checkpoint(tmp_path: Path) -> None:
    import numpy as np

    logged = {"train_losses": [np.float64(1.0)], "val_losses": [np.float32(0.5)], "mean_fg_dice": [np.nan]}
    torch.save({"logging": logged}, tmp_path / scoring.FINAL_CHECKPOINT)
    assert scoring.read_curve(tmp_path) == Curve(train_loss=(1.0,), val_loss=(0.5,), dice=(None,))


def test_no_curves_are_no_error(tmp_path: Path) -> None:
    assert scoring.read_curve(tmp_path) == Curve()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / scoring.CURVES_FILE).write_text('{"epoch": 0}\n{"ep')
    with pytest.raises(ValueError, match=r"finetuning_metrics.jsonl has a line that is not JSON"):
        scoring.read_curve(tmp_path)


def test_a_run_is_finished_when_it_is_trained_and_validated(tmp_path: Path) -> None:
    assert not scoring.is_finished(tmp_path)
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "summary.json").write_text("{}")
    assert not scoring.is_finished(tmp_path)
    (tmp_path / "checkpoint_final.pth").write_bytes(b"")
    assert scoring.is_finished(tmp_path)


def pretraining(root: Path, trainer: str, value: float) -> Path:
    run = root / "results" / "Dataset001_Scans" / f"{trainer}__nnsslPlans__3d_fullres" / "fold_all"
    write_json(run / provenance.HASHES_FILE, {"content_hashes": ["b" * 64, "a" * 64]})
    write_json(
        run / provenance.CONFIG_FILE, {"command": ["nnssl_train", "1", "3d_fullres", "-tr", trainer, "-tag", "a b"]}
    )
    weights = {"encoder.stages.0.weight": torch.full((2,), value), "decoder.x": torch.zeros(1)}
    torch.save({"network_weights": weights}, run / "checkpoint_final.pth")
    return run


def test_the_pretraining_run_is_known_by_images_and_weights(roots: Path) -> None:
    pretraining(roots, "AAATrainer", 1.0)
    mae = pretraining(roots, "MAETrainer", 2.0)
    plans = fakes.make_plans(
        roots, "ptPlans__mae", pretrained_weights="ptPlans__mae.pth", pretraining_content_hashes=("a" * 64, "b" * 64)
    )
    weights = {"encoder.stages.0.weight": torch.full((2,), 2.0), "decoder.x": torch.ones(1)}
    torch.save({"network_weights": weights}, plans.with_suffix(".pth"))
    write_json(plans.with_name("ptPlans__mae_report.json"), {"command": ["nnssl_plan_finetuning", "-n", "mae"]})
    arm = read_arm(plans, "3d_fullres")
    assert provenance.find_pretraining_run(arm) == mae
    raw, labelled = (roots / "raw" / name for name in ("Dataset001_Scans", fakes.DATASET))
    raw.mkdir()
    labelled.mkdir()
    record_command(raw, "nnssl_convert", ["folder", "scans", "-d", "1"])
    record_command(labelled, "nnssl_convert", ["msd", "Task04", "-d", "4"])
    (roots / "preprocessed" / raw.name).mkdir()
    record_command(roots / "preprocessed" / raw.name, "nnssl_plan_and_preprocess", ["-d", "1"])
    assert provenance.commands_of(arm, mae) == (
        "nnssl_convert folder scans -d 1",
        "nnssl_convert msd Task04 -d 4",
        "nnssl_plan_and_preprocess -d 1",
        "nnssl_train 1 3d_fullres -tr MAETrainer -tag 'a b'",
        "nnssl_plan_finetuning -n mae",
    )


def test_an_arm_from_scratch_has_no_pretraining_run(roots: Path) -> None:
    arm = read_arm(fakes.make_plans(roots, "ptPlans__scratch"), "3d_fullres")
    assert provenance.find_pretraining_run(arm) is None
    assert provenance.commands_of(arm, None) == ()


def test_versions_name_what_the_numbers_depend_on() -> None:
    assert {"nnunetv2", "torch", "numpy", "python"} <= set(provenance.versions())


def test_runs_of_other_versions_are_said_openly(tmp_path: Path) -> None:
    """Catches today's versions standing over what others have made."""
    write_record(tmp_path / "fold_0", tmp_path)
    assert provenance.version_warnings([tmp_path / "fold_0", tmp_path / "nowhere"]) == []
    write_json(tmp_path / "run" / provenance.CONFIG_FILE, {"versions": {"torch": "0.4", "gone": "1"}})
    (warning,) = provenance.version_warnings([tmp_path / "fold_0", tmp_path / "run"])
    assert "than those named below: gone 1, torch 0.4. " in warning
