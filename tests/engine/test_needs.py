"""What a task asks of the data, from the engine's side."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.core.records import read_json
from nnssl_ext.engine.loop import pretrain
from nnssl_ext.engine.monitors import FeatureMonitor
from nnssl_ext.engine.run import RunSpec
from nnssl_ext.engine.task import PretrainTrainer, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.trainers.mae import MAE, MAETrainer
from tests.engine.conftest import RECIPE

SEEN: list[tuple[str, ...]] = []
"""Cases of the batches that a task was given."""


def trainer(needs: DataNeeds, *overrides: str) -> PretrainTrainer:
    """MAE, were it to ask for more."""

    class Task(MAE):
        info = replace(MAE.info, needs=needs)

        def views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
            SEEN.append(batch.cases)
            return super().views(batch, random, train)

    class TaskTrainer(PretrainTrainer):
        """As MAE's."""

        task = Task
        cost = MAETrainer.cost

    return TaskTrainer.configured([*RECIPE, *overrides])


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (DataNeeds(channels=2), r"needs cases with 2 or more channels.*nnssl_train --list"),
        (DataNeeds(images=2, same="session"), r"2 co-registered images of one session.*pretrain_data\.json"),
        (DataNeeds(images=9, same="modality"), r"9 different cases of one dataset and modality.*val_fraction"),
    ],
    ids=["channels", "session", "modality"],
)
def test_data_that_cannot_give_it_is_refused_before_the_first_step(
    make_spec: Callable[..., RunSpec], needs: DataNeeds, message: str
) -> None:
    spec = replace(make_spec(), trainer=trainer(needs))
    with pytest.raises(ValueError, match=message):
        pretrain(spec)
    assert not (spec.folder / "config.json").exists()
    assert not list(spec.folder.glob("*.pth"))


def test_pairs_reach_the_task_and_the_monitors_look_at_the_first_of_each(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: without the stride of two, the monitors get four crops a batch."""
    monitored: list[int] = []
    plain = FeatureMonitor.add

    def add(self: FeatureMonitor, encoder, data, valid, cases) -> None:
        monitored.append(len(cases))
        assert len(data) == len(valid) == len(cases)
        plain(self, encoder, data, valid, cases)

    monkeypatch.setattr(FeatureMonitor, "add", add)
    SEEN.clear()
    pretrain(replace(make_spec(), trainer=trainer(DataNeeds(images=2, same="modality"), "num_epochs=1")))
    assert {len(cases) for cases in SEEN} == {4}
    assert all(cases[0] != cases[1] and cases[2] != cases[3] for cases in SEEN)
    assert set(monitored) == {2}


def test_an_unreadable_case_is_refused_in_a_small_run_and_counted_in_a_large_one(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(["num_epochs=1", "steps_per_epoch=4"], name="small")
    path = next(path for path in sorted(spec.data_folder.glob("*.b2nd")) if trained_on(make_spec, path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"1 of 6 cases cannot be read, which is more than 1%: .*{path.name}"):
        pretrain(spec)
    monkeypatch.setattr("nnssl_ext.loading.failures.MAX_FAILED_SHARE", 0.2)
    survived = replace(spec, folder=spec.folder.with_name("survived"))
    pretrain(survived)
    lines = (survived.folder / "timing.jsonl").read_text().splitlines()
    assert '"unreadable_cases": 1' in lines[0]
    assert f"others take the place of this one: {path}" in (survived.folder / "training_log.txt").read_text()


def test_cases_that_other_processes_cannot_read_count_at_the_end_of_an_epoch(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the processes are never asked what they could not read."""
    monkeypatch.setattr("nnssl_ext.engine.loop.gather", lambda reasons: [reasons, {"case": "case is gone"}])
    spec = make_spec(["num_epochs=2", "steps_per_epoch=1", "val_steps_per_epoch=1"], name="other_process")
    with pytest.raises(ValueError, match=r"1 of 6 cases cannot be read, which is more than 1%: case is gone"):
        pretrain(spec)
    assert not (spec.folder / "checkpoint_final.pth").exists()


def trained_on(make_spec: Callable[..., RunSpec], path: Path) -> bool:
    """Whether a case is among those that a run of the same seed trains on; the first call makes that run."""
    spec = make_spec(["num_epochs=1", "steps_per_epoch=1", "val_steps_per_epoch=1"], name="split")
    if not (spec.folder / "splits.json").exists():
        pretrain(spec)
    return path.stem in read_json(spec.folder / "splits.json")["train"]
