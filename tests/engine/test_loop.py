"""The loop as a whole, in this process: what a run leaves, what it refuses, how it stops and goes on."""

import json
import math
import os
import signal
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from nnssl_ext.core.lock import sole_writer
from nnssl_ext.core.records import read_json
from nnssl_ext.engine.checkpoint import load_checkpoint
from nnssl_ext.engine.loop import Outcome, _judged, pretrain
from nnssl_ext.engine.prepare import split_cases
from nnssl_ext.engine.steps import Stepper, Validation
from nnssl_ext.preprocessing.index import Index, read_index, write_index
from nnssl_ext.preprocessing.store import Store
from nnssl_ext.trainers.mae import MAE
from tests.engine.conftest import RECIPE, RELEASED_KEYS, write_store

EVERYTHING = {
    "checkpoint_best.pth",
    "checkpoint_final.pth",
    "config.json",
    "metrics.jsonl",
    "pretraining_cases.json",
    "progress.png",
    "reconstructions",
    "splits.json",
    "tensorboard",
    "timing.jsonl",
    "training_log.txt",
}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shrink_store(spec, num_cases, **changes):
    """Keep some cases of the store, with fields of their index changed."""
    entries = dict(list(read_index(spec.data_folder).entries.items())[:num_cases])
    entries = {case_id: replace(entry, **changes) for case_id, entry in entries.items()}
    write_index(spec.data_folder, Index(settings={}, entries=entries))


def stop_at(monkeypatch, step, number):
    """Send this process a signal in the middle of one training step."""
    original = Stepper.train_step

    def train_step(self, batches, at):
        if at == step:
            os.kill(os.getpid(), number)
        return original(self, batches, at)

    monkeypatch.setattr(Stepper, "train_step", train_step)


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_everything_it_promises(make_spec):
    spec = make_spec(tensorboard=True)
    assert pretrain(spec) is Outcome.FINISHED
    assert {path.name for path in spec.folder.iterdir()} == EVERYTHING
    assert {path.name for path in (spec.folder / "reconstructions").iterdir()} == {"epoch_0001.png", "epoch_0003.png"}
    config = read_json(spec.folder / "config.json")
    assert (config["trainer"], config["samples_per_step"], config["precision"]) == ("MAETrainer", 2, "fp32")
    assert config["recipe"]["task_config"]["block_size"] == 4
    assert config["versions"]["torch"] == version("torch")
    assert "epoch 3/3" in (spec.folder / "training_log.txt").read_text()


def test_records_hold_losses_monitors_and_no_timing(make_spec):
    spec = make_spec()
    pretrain(spec)
    rows = records(spec.folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 3), (1, 6), (2, 9)]
    names = {"train_loss", "val_loss", "lr", "train_gradient_norm", "token_spread", "effective_rank"}
    assert names <= set(rows[0])
    assert not {"seconds", "steps_per_second"} & set(rows[0])
    timing = [json.loads(line) for line in (spec.folder / "timing.jsonl").read_text().splitlines()]
    assert {"seconds", "steps_per_second", "data_wait_share", "eta_seconds"} <= set(timing[0])
    assert timing[-1]["eta_seconds"] == 0
    assert all(0 <= row["data_wait_share"] <= 1 for row in timing)


def test_validation_patients_are_never_trained_on(make_spec, monkeypatch):
    spec = make_spec()
    write_store(spec.data_folder, 6, cases_per_subject=2)
    seen = {True: set(), False: set()}
    original = Stepper._forward

    def forward(self, batch, random, train):
        seen[train].update(batch.cases)
        assert self.task.training == train
        return original(self, batch, random, train)

    monkeypatch.setattr(Stepper, "_forward", forward)
    pretrain(spec)
    subject_of = {case_id: entry.subject for case_id, entry in read_index(spec.data_folder).entries.items()}
    assert seen[True]
    assert seen[False]
    assert not {subject_of[c] for c in seen[True]} & {subject_of[c] for c in seen[False]}


def test_weights_and_crops_of_a_case_reach_what_is_trained_on(make_spec, monkeypatch):
    """Planted faults: either of the two not handed to the loader."""
    spec = make_spec(["crops_per_case=2", 'sampling_weights={"common": 1, "rare": 0}'])
    index = read_index(spec.data_folder)
    dataset = {name: "rare" if name > "case_02" else "common" for name in index.entries}
    entries = {name: replace(entry, dataset=dataset[name]) for name, entry in index.entries.items()}
    write_index(spec.data_folder, replace(index, entries=entries))
    shown = []
    original = Stepper._forward

    def forward(self, batch, random, train):
        if train:
            shown.extend(batch.cases)
        return original(self, batch, random, train)

    monkeypatch.setattr(Stepper, "_forward", forward)
    pretrain(spec)
    assert shown[::2] == shown[1::2]
    assert len(set(shown)) > 1
    assert {dataset[case] for case in shown} == {"common"}


def test_every_epoch_validates_on_the_same_crops_and_masks(make_spec, monkeypatch):
    spec = make_spec()
    draws = []
    original = Stepper._forward

    def forward(self, batch, random, train):
        output = original(self, batch, random, train)
        if not train:
            draws.append((batch.samples, batch.data.sum().item(), output.metrics["hidden_share"].item()))
        return output

    monkeypatch.setattr(Stepper, "_forward", forward)
    pretrain(spec)
    assert draws[:2] == draws[2:4] == draws[4:6]
    assert draws[0] != draws[1]


def test_hashes_of_all_cases_are_recorded_without_their_names(make_spec):
    spec = make_spec()
    pretrain(spec)
    expected = [f"{number:064x}" for number in range(6)]
    text = (spec.folder / "pretraining_cases.json").read_text()
    assert json.loads(text) == {"content_hashes": expected}
    assert "case_" not in text
    assert load_checkpoint(spec.folder / "checkpoint_final.pth")["nnssl_content_hashes"] == expected


def test_the_finished_checkpoint_is_the_released_form(make_spec):
    spec = make_spec()
    pretrain(spec)
    assert set(load_checkpoint(spec.folder / "checkpoint_final.pth")) == RELEASED_KEYS
    assert not (spec.folder / "checkpoint_latest.pth").exists()


@pytest.mark.parametrize("step", [4, 5], ids=["within an epoch", "before its validation"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_goes_on_with_the_same_numbers(make_spec, monkeypatch, step, number):
    whole, stopped = make_spec(), make_spec(name="stopped", save_every=10)
    pretrain(whole)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        assert pretrain(stopped) is Outcome.STOPPED
    assert len(records(stopped.folder)) == 1
    assert load_checkpoint(stopped.folder / "checkpoint_latest.pth")["resume"]["progress"]["step"] == step + 1
    assert pretrain(replace(stopped, resume=True)) is Outcome.FINISHED
    assert (stopped.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert signal.getsignal(number) is before


def test_a_task_sees_training_cases_once_before_the_first_step(make_spec, monkeypatch):
    """Catches a look at held-out cases, at too few, or again on resuming."""
    looks = []

    def begin(self, batches):
        looks.append([case for batch, _ in batches for case in batch.cases])
        assert not torch.is_grad_enabled()

    monkeypatch.setattr(MAE, "first_look", 3)
    monkeypatch.setattr(MAE, "begin", begin)
    spec = make_spec()
    with monkeypatch.context() as patch:
        stop_at(patch, 1, signal.SIGTERM)
        assert pretrain(spec) is Outcome.STOPPED
    assert pretrain(replace(spec, resume=True)) is Outcome.FINISHED
    assert len(looks) == 1
    assert len(set(looks[0])) >= 3
    assert set(looks[0]) <= set(read_json(spec.folder / "splits.json")["train"])


def test_a_signal_during_validation_stops_there(make_spec, monkeypatch):
    whole, stopped = make_spec(), make_spec(name="stopped", save_every=10)
    pretrain(whole)
    original = Stepper.validate

    def validate(self, batches, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "validate", validate)
        assert pretrain(stopped) is Outcome.STOPPED
    assert records(stopped.folder) == []
    pretrain(replace(stopped, resume=True))
    assert (stopped.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_workers_do_not_change_the_numbers(make_spec):
    inline, workers = make_spec(), make_spec(name="workers", num_workers=2)
    pretrain(inline)
    pretrain(workers)
    assert (workers.folder / "metrics.jsonl").read_bytes() == (inline.folder / "metrics.jsonl").read_bytes()


def test_another_seed_gives_other_numbers(make_spec):
    first, second = make_spec(), make_spec(name="second", seed=1)
    pretrain(first)
    pretrain(second)
    assert records(first.folder)[0]["train_loss"] != records(second.folder)[0]["train_loss"]


def test_accumulated_batches_equal_one_large_batch(make_spec):
    large, accumulated = make_spec(), make_spec(["accumulate=2"], name="accumulated")
    configuration = replace(accumulated.configuration, batch_size=1)
    validation = replace(accumulated.trainer, val_steps_per_epoch=4)
    pretrain(large)
    pretrain(replace(accumulated, configuration=configuration, trainer=validation))
    for expected, row in zip(records(large.folder), records(accumulated.folder), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"channels_last": False}, {"deterministic": True}])
def test_other_ways_to_compute_give_about_the_same(make_spec, settings):
    plain, other = make_spec(["num_epochs=1"]), make_spec(["num_epochs=1"], name="other", **settings)
    pretrain(plain)
    pretrain(other)
    assert records(other.folder)[0]["val_loss"] == pytest.approx(records(plain.folder)[0]["val_loss"], rel=0.02)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_is_taken_up_by_a_plain_one_and_the_other_way_round(make_spec, monkeypatch, backend):
    """Planted faults: saving the compiled module, whose names are others; compiling on neither side of the stop."""
    compiled = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda task: compiled.append(task) or original(task, backend=backend))
    whole = make_spec(["num_epochs=2"])
    pretrain(whole)
    names = set(load_checkpoint(whole.folder / "checkpoint_final.pth")["network_weights"])
    for before in (True, False):
        spec = make_spec(["num_epochs=2"], name=f"compiled_{before}", compile=before)
        with monkeypatch.context() as patch:
            stop_at(patch, 4, signal.SIGTERM)
            pretrain(spec)
        resume = load_checkpoint(spec.folder / "checkpoint_latest.pth")["resume"]
        assert not [name for name in resume["task"] if "_orig_mod" in name]
        pretrain(replace(spec, resume=True, settings=replace(spec.settings, compile=not before)))
        assert set(load_checkpoint(spec.folder / "checkpoint_final.pth")["network_weights"]) == names
        for expected, row in zip(records(whole.folder), records(spec.folder), strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
            assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    assert len(compiled) == 2


def test_a_loss_that_is_no_number_does_not_end_the_search_for_the_best() -> None:
    """Planted fault: a best loss of nan, below which no later one lies."""
    validation = Validation({}, None, {})
    assert _judged(math.nan, 2.0, validation) == (2.0, False)
    assert _judged(1.0, 2.0, validation) == (1.0, True)


def test_a_finished_run_is_refused_and_with_resume_left_alone(make_spec):
    spec = make_spec(["num_epochs=1"])
    pretrain(spec)
    with pytest.raises(ValueError, match=r"finished run.*--c.*-tag"):
        pretrain(spec)
    before = (spec.folder / "checkpoint_final.pth").stat().st_mtime_ns
    assert pretrain(replace(spec, resume=True)) is Outcome.FINISHED
    assert (spec.folder / "checkpoint_final.pth").stat().st_mtime_ns == before


def test_an_unfinished_run_is_not_overwritten(make_spec, monkeypatch):
    spec = make_spec()
    with monkeypatch.context() as patch:
        stop_at(patch, 0, signal.SIGTERM)
        pretrain(spec)
    with pytest.raises(ValueError, match="unfinished run"):
        pretrain(spec)


def test_two_processes_do_not_train_in_one_folder(make_spec):
    spec = make_spec()
    with sole_writer(spec.folder), pytest.raises(ValueError, match="another run is writing"):
        pretrain(spec)
    assert not (spec.folder / "metrics.jsonl").exists()


def test_resuming_with_other_settings_names_them(make_spec, monkeypatch):
    spec = make_spec()
    with monkeypatch.context() as patch:
        stop_at(patch, 0, signal.SIGTERM)
        pretrain(spec)
    other = make_spec(["optim.lr=0.5"], resume=True, seed=3)
    with pytest.raises(ValueError, match=r"recipe\.optim\.lr was 0\.01, now 0\.5; seed was 0, now 3"):
        pretrain(other)


def test_resuming_where_nothing_is_begins(make_spec):
    spec = make_spec(["num_epochs=1"], resume=True)
    assert pretrain(spec) is Outcome.FINISHED


def test_a_truncated_checkpoint_is_refused_not_restarted(make_spec, monkeypatch):
    spec = make_spec()
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        pretrain(spec)
    latest = spec.folder / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint_latest\.pth"):
        pretrain(replace(spec, resume=True))
    assert len(latest.read_bytes()) == 1000


def test_cases_that_vanished_are_named_on_resume(make_spec, monkeypatch):
    spec = make_spec()
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        pretrain(spec)
    shrink_store(spec, 4)
    with pytest.raises(ValueError, match=r"2 cases.*case_04"):
        pretrain(replace(spec, resume=True))


def test_a_sham_run_is_told_apart_and_learns_something_else(make_spec):
    honest, sham = make_spec(["num_epochs=1"]), make_spec(["num_epochs=1", "sham=true"], name="sham")
    pretrain(honest)
    pretrain(sham)
    assert records(sham.folder)[0]["train_loss"] != records(honest.folder)[0]["train_loss"]
    assert read_json(sham.folder / "config.json")["recipe"]["sham"] is True
    assert load_checkpoint(sham.folder / "checkpoint_final.pth")["nnssl_pretraining"]["recipe"]["sham"] is True


def test_one_case_is_refused(make_spec):
    spec = make_spec()
    shrink_store(spec, 1)
    with pytest.raises(ValueError, match=r"holds 1 preprocessed case.*needs 2 or more"):
        pretrain(spec)
    assert not spec.folder.exists()


def test_a_loss_that_asks_for_nothing_ends_the_run(make_spec):
    """Catches a run whose loss and chance are both 0 to the end, without a word."""
    with pytest.raises(ValueError, match=r"val_asked_share is 0: .* less than target\.background_std"):
        pretrain(make_spec(["target.background_std=99"]))


def test_one_patient_is_refused(make_spec):
    spec = make_spec()
    shrink_store(spec, 6, subject="the only one")
    with pytest.raises(ValueError, match=r"one patient.*validation split would be empty"):
        pretrain(spec)


def test_copies_of_an_image_are_on_one_side_of_the_split(make_spec):
    """Planted fault: copies under two patients' names split by name."""
    spec = make_spec()
    index = read_index(spec.data_folder)
    same = {"case_01": ("x",), "case_04": ("x", "y"), "case_05": ("y",)}
    entries = {k: replace(entry, content_hashes=same.get(k, (k,))) for k, entry in index.entries.items()}
    sides = set()
    for seed in range(12):
        split = split_cases(Store(spec.data_folder, entries), spec.trainer, seed)
        held_out = {case for case in same if case in split.val}
        assert held_out in (set(), set(same))
        sides.add(len(held_out))
    assert sides == {0, 3}


def test_a_patch_that_the_network_cannot_halve_is_refused(make_spec, tiny_plan):
    with pytest.raises(ValueError, match=r"\[16, 22, 8\].*strides \[4, 4, 4\].*\[16, 20, 8\]"):
        pretrain(make_spec(plan=tiny_plan((16, 22, 8))))


def test_data_of_other_plans_is_refused(make_spec):
    spec = make_spec()
    write_store(spec.data_folder, 6, channels=2)
    with pytest.raises(ValueError, match=r"has 2 channel.*3d_fullres' has 1.*nnssl_preprocess"):
        pretrain(spec)


@pytest.mark.parametrize(("patch_size", "channels"), [((16, 8), 1), ((12, 24, 8), 2)], ids=["2d", "two channels"])
def test_other_dimensions_and_channels_train(make_spec, tiny_plan, patch_size, channels):
    plan = tiny_plan(patch_size, channels)
    spec = make_spec(["num_epochs=1"])
    write_store(spec.data_folder, 6, channels=channels)
    configuration = plan.configuration(plan.configuration_names[0])
    assert pretrain(replace(spec, plan=plan, configuration=configuration)) is Outcome.FINISHED
    assert records(spec.folder)[0]["val_loss"] > 0


def test_too_little_memory_is_refused(make_spec):
    with pytest.raises(ValueError, match=r"needs about .* GB.*-batch_size.*-gpu_memory_target 1"):
        pretrain(make_spec(memory_gb=1e-4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "tpu7"}, "unknown"),
        ({"device": "cuda:99"}, "not available|not there"),
        ({"precision": "fp16"}, "needs a CUDA device"),
    ],
)
def test_devices_and_precisions_that_are_not_there_are_refused(make_spec, settings, words):
    with pytest.raises(ValueError, match=words):
        pretrain(make_spec(**settings))


@pytest.mark.parametrize("field", ["save_every", "num_workers", "seed"])
def test_settings_out_of_range_are_named(make_spec, field):
    with pytest.raises(ValueError, match=field):
        make_spec(**{field: -1})


def test_a_store_that_is_not_there_names_the_command(make_spec, tmp_path):
    with pytest.raises(FileNotFoundError, match="nnssl_preprocess"):
        pretrain(replace(make_spec(), data_folder=tmp_path / "nowhere"))


def test_a_transformer_is_stopped_and_resumed_to_the_same_numbers(make_spec, tiny_vit_plan, monkeypatch):
    """With drop path, which draws from torch's own generator."""
    plan = tiny_vit_plan()
    specs = []
    for name in ("whole", "stopped"):
        spec = make_spec(name=name, plan=plan)
        trainer = type(spec.trainer).configured([*RECIPE[1:], "optim.lr=1e-3"], "vit")
        specs.append(replace(spec, trainer=trainer))
    pretrain(specs[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        assert pretrain(specs[1]) is Outcome.STOPPED
    pretrain(replace(specs[1], resume=True))
    whole, stopped = ((spec.folder / "metrics.jsonl").read_bytes() for spec in specs)
    assert stopped == whole
    assert "token_spread" in records(specs[0].folder)[0]
