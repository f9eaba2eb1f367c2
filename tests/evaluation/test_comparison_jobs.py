"""The seconds of a step, measured within a real run."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nnssl_ext.core.records import file_hash, write_json
from nnssl_ext.engine.tracking import Tracker
from nnssl_ext.evaluation import comparison_jobs
from tests.engine.conftest import write_store

DATASET = "Dataset001_Scans"


def test_a_step_is_measured_within_one_run(roots: Path, tiny_plan: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run under a clock by which the start takes a minute, and steps a quarter, three quarters or two seconds.

    Catches differences of whole runs, a mean that a slow step moves, and steps that only warm up.
    """
    folder = roots / "preprocessed" / DATASET
    tiny_plan().save(folder / "nnsslPlans.json")
    write_store(folder / "nnsslPlans_3d_fullres", 4)
    task = comparison_jobs.PretrainingTask(
        dataset=DATASET,
        plans="nnsslPlans",
        configuration="3d_fullres",
        trainer="MAETrainer",
        settings=("block_size=4",),
        num_epochs=4,
        steps_per_epoch=100,
        batch_size=None,
        sham=False,
        tag="x",
        seed=0,
        device="cpu",
        precision="fp32",
        num_workers=0,
        gpus=(),
        log_file=roots / "step.log",
    )
    steps = [60.0, 3.0, *[0.25] * 4, *[0.75] * 3, 2.0]
    ticks = iter(np.cumsum(steps).tolist())
    real, read = time.process_time, []
    monkeypatch.setattr(Tracker, "draw_progress", lambda self: None)
    monkeypatch.setattr(Tracker, "reconstruction", lambda self, *arguments: None)
    monkeypatch.setattr(
        comparison_jobs, "time", SimpleNamespace(process_time=lambda: read.append(real()) or next(ticks))
    )
    assert comparison_jobs.measure_step(task) == 0.5
    assert 0 < comparison_jobs.usual_step(read) < real()
    assert not task.folder.exists()


@pytest.mark.parametrize("ends", [[1.0] * 10, [10.0 - n for n in range(10)], [1.0, 2.0], []])
def test_a_clock_that_measures_nothing_is_refused(ends: list[float]) -> None:
    """Catches a step of no time, which a budget of time would buy without end."""
    with pytest.raises(ValueError, match="a step cannot be measured"):
        comparison_jobs.usual_step(ends)


def test_an_arm_is_planned_again_when_its_pretraining_was_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches adapted weights of a checkpoint that is no more."""
    task = comparison_jobs.FinetuningTask(
        dataset="Dataset004_Balls",
        name="ptPlans__mae",
        checkpoint=tmp_path / "checkpoint_final.pth",
        from_scratch=False,
        sham=False,
        transfer="encoder",
        mode="like_pretrained",
        patch_size=(8, 16, 16),
        batch_size=None,
        splits=[],
        splits_file=None,
        seed=0,
        settings=(),
        plans_path=tmp_path / "ptPlans__mae.json",
        log_file=tmp_path / "plan.log",
    )
    planned = []

    def plan(*_: object, **values: object) -> None:
        planned.append(values["from_scratch"])
        write_json(task.plans_path, {"pretrain_info": {"checkpoint_hash": file_hash(task.checkpoint)}})

    monkeypatch.setattr("nnssl_ext.finetuning.nnunet_plans.plan_finetuning", plan)
    for content, number in ((b"first", 1), (b"first", 1), (b"second", 2)):
        task.checkpoint.write_bytes(content)
        comparison_jobs.plan_arm(task)
        assert len(planned) == number
    task.checkpoint.write_bytes(b"third")
    comparison_jobs.plan_arm(replace(task, from_scratch=True))
    assert len(planned) == 2
