"""A solved task is said to be solved, once, in the log and in the report."""

import logging
from pathlib import Path

import pytest

from nnssl_ext.engine.saturation import solved
from nnssl_ext.engine.tracking import Tracker
from nnssl_ext.reports.pretraining import read_pretraining


def records(values: list[float | None], chance: float | None = 0.1, name: str = "val_turn_accuracy") -> list[dict]:
    beside = {} if chance is None else {f"{name}_chance": chance}
    return [{"epoch": epoch, name: value, **beside} for epoch, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "epoch"),
    [
        ([0.5, 0.99, 1.0, 1.0, 1.0, 1.0, 0.2], 5),
        ([1.0, 1.0, 1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0], None),
        ([1.0, 1.0, 1.0, 1.0, None, 1.0], None),
        ([1.0] * 20, 4),
    ],
)
def test_five_epochs_in_a_row_are_it(values, epoch):
    """Catches epochs that are counted over a fall, and a later end of the row than its first."""
    assert solved(records(values)) == ({} if epoch is None else {"val_turn_accuracy": epoch})


def test_what_is_no_accuracy_above_chance_is_not_judged():
    """Catches losses of 1, training accuracy, and classes that are nearly always the same."""
    assert solved(records([1.0] * 9, name="val_l1")) == {}
    assert solved(records([1.0] * 9, name="train_accuracy")) == {}
    assert solved(records([1.0] * 9, chance=None)) == {}
    assert solved(records([1.0] * 9, chance=0.995)) == {}


def test_it_is_said_once_and_stays_in_the_report(tmp_path: Path, caplog):
    """Also by a run that is resumed after it was said. Catches a line every epoch, and a report without one."""
    timing = {"steps_per_second": 5.0, "data_wait_share": 0.1, "eta_seconds": 8.0}
    rows = [{"step": 1, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0, **row} for row in records([1.0] * 9)]
    for first, last in ((0, 7), (7, 9)):
        with (
            caplog.at_level(logging.INFO),
            Tracker(tmp_path, "A run", num_epochs=99, start_epoch=first, tensorboard=False) as tracker,
        ):
            tracker._drawn = float("inf")  # no pictures
            for row in rows[first:last]:
                tracker.epoch(row, {"epoch": row["epoch"], **timing})
            tracker._undrawn = False
    said = "The turn accuracy on held-out cases has been 0.99 or more for 5 epochs by epoch 5"
    assert caplog.text.count(said) == 1
    (sentence,) = read_pretraining(tmp_path).solved
    assert sentence.startswith(said)
