"""The seconds of a step, measured within a real run."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

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
