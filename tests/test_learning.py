"""The benchmark that says whether a method learns anything of its own: its arithmetic, and what it leaves undecided."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.learning import (
    Job,
    make_jobs,
    protocol_of,
    read_job,
    write_table,
)
from nnssl_ext.evaluation.learning import (
    Difference,
    case_dice,
    compare,
    gate,
    pretext_metrics,
    summarise,
    verdict,
    without_nan,
)

NAN = float("nan")


def record(arm: str, level: float, seed: int) -> dict:
    """Thirty cases around a level, of two subsets and two classes."""
    rng = np.random.default_rng(seed)
    cases = rng.normal(0, 0.05, 30) + level
    dice = np.broadcast_to(cases[None, :, None], (2, 30, 2))
    found = {
        "probe": {"dice": without_nan(np.array(dice))},
        "net": "cnn",
        "training_cpu_seconds": 100,
    }
    return {**found, "pretext": {"mse": [0.5 if arm == "method" else 0.85, 0.9]}}


def results(method: float, sham: float, random: float, spread: float = 0.01) -> dict:
    luck = {0: -spread, 1: 0.0, 2: spread}
    rows = {("FooTrainer", "method"): method, ("FooTrainer", "sham"): sham, ("cnn", "random"): random}
    return {
        (name, arm, seed): record(arm, level + (luck[seed] if arm == "method" else 0), seed)
        for (name, arm), level in rows.items()
        for seed in luck
    }


@pytest.mark.parametrize(
    ("method", "sham", "words"),
    [(0.6, 0.45, "beats sham"), (0.44, 0.45, "does not help here"), (0.46, 0.45, "undecided")],
)
def test_the_verdict_follows_the_difference_to_sham_not_to_random(method, sham, words):
    (row,) = summarise(results(method, sham, 0.35), ["FooTrainer", "AbsentTrainer"])
    assert row["verdict"] == words
    assert row["over_random"].mean == pytest.approx(method - 0.35)
    assert row["over_sham"].low < method - sham < row["over_sham"].high


def test_luck_of_seeds_makes_a_difference_undecided():
    (row,) = summarise(results(0.52, 0.45, 0.35, spread=0.1), ["FooTrainer"])
    assert row["verdict"] == "undecided"
    assert row["over_sham"].undecidable_below > 0.07


@pytest.mark.parametrize(
    ("difference", "decided"),
    [
        (Difference(0.1, 0.05, 0.15, 0.04, 3), True),
        (Difference(-0.1, -0.15, -0.05, 0.04, 3), True),
        (Difference(0.1, -0.01, 0.2, 0.04, 3), False),
        (Difference(0.1, 0.05, 0.15, 0.12, 3), False),
        (Difference(0.1, 0.05, 0.15, None, 1), False),
    ],
)
def test_a_difference_that_cannot_be_decided_bears_a_question_mark(difference, decided):
    """Catches a table that shows differences within the luck of the trainings like any other."""
    assert difference.decided is decided
    assert str(difference).endswith("]" if decided else "]?")


@pytest.mark.parametrize(
    ("difference", "words"),
    [(None, "no sham"), (Difference(0.2, 0.1, 0.3, None, 1), "undecided (one seed)")],
)
def test_nothing_is_decided_without_sham_or_from_one_seed(difference, words):
    assert verdict(difference) == words


def test_every_case_counts_once_however_many_seeds_have_a_score_of_it():
    """Catches a mean over all scores, in which a case without a score in one seed weighs less than in its interval."""
    difference = compare({0: np.array([1.0, NAN]), 1: np.array([1.0, 3.0])}, {0: np.zeros(2), 1: np.zeros(2)}, "x")
    assert difference.mean == pytest.approx(2.0)


def test_only_seeds_that_both_arms_have_are_paired():
    arm, reference = {seed: np.full(30, 0.5 + seed) for seed in (0, 1)}, {1: np.full(30, 1.0), 2: np.zeros(30)}
    difference = compare(arm, reference, "x")
    assert (difference.mean, difference.num_seeds) == (pytest.approx(0.5), 1)
    assert compare(arm, {}, "x") is None


@pytest.mark.parametrize(
    ("pretext", "words"),
    [
        ([{"mse": [0.5, 0.9]}, {"mse": [0.6, 0.9]}], "passed"),
        ([{"mse": [0.5, 0.9]}, {"mse": [0.91, 0.9]}], "failed"),
        ([{"accuracy": [0.5, 0.1]}], "passed"),
        ([{"accuracy": [0.05, 0.1]}], "failed"),
        ([{"mse": [0.5, 0.9], "accuracy": [0.05, 0.1]}], "in part"),
        ([{}], "no chance known"),
    ],
)
def test_the_gate_wants_every_seed_better_than_chance_in_its_metric_s_direction(pretext, words):
    assert gate(pretext)[0] == words


def test_dice_of_a_case_is_the_mean_of_what_is_defined():
    dice = [[[0.5, None], [None, None]], [[0.7, 0.3], [None, None]]]
    assert case_dice({"probe": {"dice": dice}}, "probe").tolist() == pytest.approx([0.5, NAN], nan_ok=True)
    assert case_dice({"tuned": {"dice": dice[1]}}, "tuned").tolist() == pytest.approx([0.5, NAN], nan_ok=True)


def test_pretext_metrics_are_those_of_held_out_cases_with_something_to_beat():
    epoch = {"val_mse": 0.5, "val_mse_chance": 0.9, "val_mse_other_case": 0.6, "val_loss": 1.0, "train_mse": 0.4}
    epoch |= {"val_l1": 0.3, "val_l1_untouched": 0.4}
    monitors = {"train_mse_chance": 0.8, "same_case_retrieval": 0.5, "same_case_retrieval_chance": 0.1}
    expected = {"mse": [0.5, 0.9], "l1 over the damaged input": [0.3, 0.4], "mse by the second view": [0.5, 0.6]}
    assert pretext_metrics(epoch | monitors) == expected


def test_a_method_that_does_not_look_at_its_second_view_passes_in_part():
    """Catches a gate that takes beating the mean for looking where the method should look."""
    words, text = gate([{"mse": [0.94, 1.0], "mse by the second view": [0.941, 0.94]}])
    assert words == "in part"
    assert text == "mse 0.940 (chance 1.000); mse by the second view 0.941 (chance 0.940)"


def test_the_sham_s_own_metric_stands_beside_but_decides_nothing():
    sham = [{"mse": [0.7, 0.9]}, {"mse": [0.8, 0.9]}]
    assert gate([{"mse": [0.85, 0.9]}], sham) == ("passed", "mse 0.850 (chance 0.900, sham 0.750)")


def test_another_protocol_is_another_job_and_survives_the_way_to_its_process():
    protocol = protocol_of("MAETrainer", {"MAETrainer": {"steps": 20, "settings": ["optim.lr=1e-4"]}})
    assert protocol.channels == 1
    assert protocol.settings == ("block_size=8", "schedule.warmup_steps=2", "optim.lr=1e-4")
    job = Job("MAETrainer", "method", 3, protocol, fine_tune=True)
    assert read_job(json.dumps({**vars(job), "protocol": vars(protocol)})) == job
    assert replace(job, protocol=protocol_of("MAETrainer", {})).key != job.key
    with pytest.raises(ValueError, match="no field 'stepz'"):
        protocol_of("MAETrainer", {"MAETrainer": {"stepz": 20}})


def test_two_channels_have_datasets_and_random_features_of_their_own():
    """Catches a smoke test's method beside random features of other images."""
    args = Namespace(
        trainers=["SimMIMTrainer", "MultiMAETrainer"], seeds=[0], settings=None, no_sham=True, fine_tune=False
    )
    jobs = make_jobs(args)
    assert [(job.trainer, job.protocol.reference) for job in jobs] == [
        ("", "vit"),
        ("", "vit, derived contrast"),
        ("SimMIMTrainer", "vit"),
        ("MultiMAETrainer", "vit, derived contrast"),
    ]
    assert [job.protocol.dataset(4) for job in jobs] == [4, 104, 4, 104]
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_method_runs_on_both_backbones_side_by_side():
    """Catches the one's results read as the other's, and a colon in the name of nnU-Net's plans."""
    args = Namespace(trainers=["MAETrainer", "MAETrainer:vit"], seeds=[0], settings=None, no_sham=False, fine_tune=True)
    jobs = [job for job in make_jobs(args) if job.trainer]
    assert [(job.trainer, job.arm, job.protocol.backbone) for job in jobs] == [
        ("MAETrainer", "method", "cnn"),
        ("MAETrainer", "sham", "cnn"),
        ("MAETrainer:vit", "method", "vit"),
        ("MAETrainer:vit", "sham", "vit"),
    ]
    assert jobs[2].key.startswith("MAETrainer-vit-method-s0-")


def test_every_arm_is_asked_for_once():
    args = Namespace(trainers=["MAETrainer"], seeds=[0, 1], settings=None, no_sham=False, fine_tune=True)
    jobs = [(job.trainer, job.arm, job.seed, job.fine_tune) for job in make_jobs(args)]
    random = [("", "random", seed, True) for seed in (0, 1)]
    rest = [("MAETrainer", arm, seed, arm == "method") for seed in (0, 1) for arm in ("method", "sham")]
    assert jobs == random + rest


def test_the_table_shows_every_column_and_is_json_too(tmp_path):
    rows = summarise(results(0.6, 0.45, 0.35), ["FooTrainer"])
    text = write_table(rows, tmp_path, "the command")
    head, line, row = text.splitlines()[:3]
    assert head.count("|") == line.count("|") == row.count("|")
    assert "| 0.596 | 0.446 | 0.346 | +0.250 [" in row
    assert "mse 0.500 (chance 0.900, sham 0.850) | passed" in row
    assert row.endswith("| 100 |")
    assert json.loads((tmp_path / "table.json").read_text())[0]["over_sham"]["num_seeds"] == 3


def test_seconds_of_runs_that_were_cut_do_not_count(tmp_path):
    """Catches a run whose last process did a tenth of its steps and claims a tenth of its time."""
    whole = results(0.6, 0.45, 0.35)
    whole["FooTrainer", "method", 0]["training_cpu_seconds"] = None
    assert summarise(whole, ["FooTrainer"])[0]["core_seconds"] == 100
    for seed in (1, 2):
        whole["FooTrainer", "method", seed]["training_cpu_seconds"] = None
    rows = summarise(whole, ["FooTrainer"])
    assert write_table(rows, tmp_path, "the command").splitlines()[2].endswith("| - |")
