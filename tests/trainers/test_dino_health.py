"""Self-distillation on planted textures: it learns what is there, and the monitor tells a sick run from a healthy one.

Sixty-four images show one of four textures each, which zoom, flips and colours leave as they are, under nuisances of
their own. The network has 5,000 parameters, a batch four images; a run has 200 steps. docs/dino.md has the numbers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.core.random import generator
from nnssl_ext.engine.alarms import Alarm
from nnssl_ext.engine.health import Monitor
from nnssl_ext.engine.loop import pretrain
from nnssl_ext.engine.run import RunSettings, RunSpec
from nnssl_ext.engine.tracking import Tracker
from nnssl_ext.models.standardise import Standardise
from nnssl_ext.preprocessing.index import Index, Provenance, write_index
from nnssl_ext.preprocessing.store import write_case
from nnssl_ext.trainers.dino import DINOTrainer, DINOv2Trainer

pytestmark = pytest.mark.slow

EDGE, NUM_CASES, NUM_KINDS = 32, 64, 4
RECIPE = ["crops.parent_scale=1.0", "accumulate=1", "num_epochs=10", "steps_per_epoch=20"]
RECIPE += ["val_steps_per_epoch=4", "val_fraction=0.25", "health.every=10"]


class NamedError(Exception):
    """The alarm that was waited for; the rest of the run would tell nothing."""


def wave(rng: np.random.Generator, length: float) -> np.ndarray:
    _, y, x = np.meshgrid(np.arange(1), np.arange(EDGE), np.arange(EDGE), indexing="ij")
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    return np.sin(2 * np.pi / length * (np.cos(angle) * y + np.sin(angle) * x) + phase)


def texture(number: int) -> np.ndarray:
    """Stripes, waves, bright blobs or dark blobs (1, 32, 32), under a slow wave and noise."""
    rng = generator("texture", number)
    length, kind = rng.uniform(4, 7), number % NUM_KINDS
    fine = wave(rng, length) if kind == 0 else sum(wave(rng, length) for _ in range(8))
    if kind > 1:
        fine = np.maximum(fine, 0) ** 2 * (1 if kind == 2 else -1)
    fine = (fine - fine.mean()) / fine.std() * rng.uniform(0.7, 1.4)
    image = fine + rng.uniform(0.3, 1.5) * wave(rng, rng.uniform(EDGE, 3 * EDGE))
    image = image + 0.3 * rng.standard_normal(fine.shape)
    return (image - image.mean()) / image.std()


@pytest.fixture
def spec(tmp_path: Path, tiny_plan, monkeypatch) -> RunSpec:
    for name in ("draw_progress", "reconstruction"):
        monkeypatch.setattr(Tracker, name, lambda *_: None)
    torch.set_num_threads(1)
    folder, entries = tmp_path / "store", {}
    for number in range(NUM_CASES):
        image, case = texture(number)[None].astype(np.float32), f"case_{number:02d}"
        provenance = Provenance(subject=case, content_hashes=(f"{number:064x}",))
        everywhere = np.ones(image.shape[1:], bool)
        entries[case] = write_case(folder, case, image, {}, everywhere, spacing=(1.0,) * 3, provenance=provenance)
    write_index(folder, Index(settings={}, entries=entries))
    plan = tiny_plan((EDGE, EDGE))
    return RunSpec(
        trainer=DINOTrainer.configured(RECIPE),
        plan=plan,
        configuration=replace(plan.configuration("2d"), batch_size=4),
        data_folder=folder,
        folder=tmp_path / "run",
        settings=RunSettings(tensorboard=False, num_workers=0, save_every=100),
    )


def named(spec: RunSpec, monkeypatch, *settings: str) -> tuple[int, list[Alarm]]:
    """The step and the alarms that a run with these settings is first named ill by."""
    found = []
    original = Monitor.look

    def look(monitor: Monitor, step: int) -> list[Alarm]:
        alarms = original(monitor, step)
        if alarms:
            found.append((step, alarms))
            raise NamedError
        return alarms

    monkeypatch.setattr(Monitor, "look", look)
    with pytest.raises(NamedError):
        pretrain(replace(spec, trainer=DINOTrainer.configured([*RECIPE, *settings])))
    return found[0]


def records(spec: RunSpec, name: str) -> list[dict]:
    return [json.loads(line) for line in (spec.folder / name).read_text().splitlines()]


@pytest.mark.parametrize(("trainer", "seed"), [(DINOTrainer, 0), (DINOv2Trainer, 2)])
def test_a_healthy_run_learns_and_sounds_no_alarm(spec, monkeypatch, trainer, seed):
    """Catches a rate or a teacher too slow for so few steps, and thresholds that a learning run crosses."""
    alarms = []
    original = Monitor.look
    monkeypatch.setattr(Monitor, "look", lambda *arguments: alarms.append(original(*arguments)) or alarms[-1])
    settings = replace(spec.settings, seed=seed)
    pretrain(replace(spec, trainer=trainer.configured(RECIPE), settings=settings))
    rows = records(spec, "metrics.jsonl")
    assert alarms == [[]] * len(alarms) != []
    assert rows[-1]["val_known_case_chance"] == pytest.approx(0.25)
    assert np.mean([row["val_known_case"] for row in rows[-3:]]) > 0.38
    assert np.mean([row["train_known_case"] for row in rows[-3:]]) > 0.38
    assert rows[-1]["health_mutual_information"] > 0.25
    assert 0.02 < rows[-1]["health_target_entropy"] < 0.98
    assert not (spec.folder / "interventions.jsonl").exists()


def test_a_fast_rise_of_the_temperature_is_named_and_the_run_saved(spec):
    """Targets get flat: 'sharpen' takes the temperature back. Without it mutual information ends at .01 nat."""
    settings = ["teacher_temperature=[0.04,0.2]", "temperature_ramp=0.05"]
    pretrain(replace(spec, trainer=DINOTrainer.configured([*RECIPE, *settings])))
    (record,) = records(spec, "interventions.jsonl")
    assert (record["statistic"], record["responses"]) == ("mutual_information", ["sharpen"])
    assert record["step"] <= 80
    last = records(spec, "metrics.jsonl")[-1]
    assert last["health_mutual_information"] > 0.5
    assert last["val_known_case"] > 0.35


def test_a_hundredfold_rate_is_named_and_the_run_saved(spec):
    """Catches a run that slows down where it is, or goes back to states as ill: it ends at 0 nat and at chance."""
    pretrain(replace(spec, trainer=DINOTrainer.configured([*RECIPE, "optim.lr=0.02"])))
    rows = records(spec, "interventions.jsonl")
    assert (rows[0]["statistic"], rows[0]["step"] <= 40) == ("rank", True)
    assert {row["event"] for row in rows} == {"intervention"}
    assert all(row["resumed_at"] < row["step"] for row in rows)
    last = records(spec, "metrics.jsonl")[-1]
    assert last["health_mutual_information"] > 0.3
    assert last["val_known_case"] > 0.35


def test_features_without_standardisation_are_named(spec, monkeypatch):
    """What pooling leaves is nearly the same for all images, and the head makes all targets the same."""
    monkeypatch.setattr(Standardise, "forward", lambda module, features: features.float())
    step, alarms = named(spec, monkeypatch)
    assert step <= 70
    assert "mutual_information" in [alarm.name for alarm in alarms]
