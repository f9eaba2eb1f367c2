"""Records, pictures and speed."""

import json
import logging
import math

import numpy as np
import pytest
import torch

from nnssl_ext.engine.panels import PANELS
from nnssl_ext.engine.pictures import draw_progress, draw_reconstruction, mid_slices
from nnssl_ext.engine.steps import Meter
from nnssl_ext.engine.timing import Stopwatch
from nnssl_ext.engine.tracking import Bar, JsonLines, Tracker, clock, epoch_line, read_records

METRICS = {"epoch": 0, "step": 10, "lr": 0.01, "train_loss": 1.5, "val_loss": 1.25, "effective_rank": 0.5}
TIMING = {"epoch": 0, "seconds": 2.0, "steps_per_second": 5.0, "data_wait_share": 0.1, "eta_seconds": 8.0}


def test_records_beyond_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for epoch in range(5):
        first.append({"epoch": epoch, "value": epoch / 3})
    before = path.read_text().splitlines()
    resumed = JsonLines(path, 3)
    assert path.read_text().splitlines() == before[:3]
    resumed.append({"epoch": 3, "value": 1.0})
    assert [record["epoch"] for record in read_records(path)] == [0, 1, 2, 3]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1, "val')
    assert JsonLines(path, 5).records == [{"epoch": 0}]
    assert path.read_text() == '{"epoch": 0}\n'


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path, 0).append({"epoch": 0, "a": math.nan, "b": math.inf, "c": 1.0})
    assert json.loads(path.read_text()) == {"epoch": 0, "a": None, "b": None, "c": 1.0}


def test_floats_survive_to_the_last_bit(tmp_path):
    path, value = tmp_path / "metrics.jsonl", 0.1 + 0.2
    JsonLines(path, 0).append({"epoch": 0, "value": value})
    assert read_records(path)[0]["value"] == value


@pytest.mark.usefixtures("pictures")
def test_a_tracker_writes_records_events_and_pictures(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = {name: torch.rand(2, 1, 6, 8, 10) for name in ("input", "masked", "output")}
    with caplog.at_level(logging.INFO), Tracker(tmp_path, "A run", num_epochs=5, start_epoch=0) as tracker:
        tracker.epoch(METRICS, TIMING)
        tracker.reconstruction(0, images, (1.0, 1.0, 1.0))
    assert "epoch 1/5" in caplog.text
    for picture in ("progress.png", "reconstructions/epoch_0001.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("val_loss")] == [1.25]
    assert events.Tags()["images"] == ["reconstruction"]


@pytest.mark.usefixtures("pictures")
def test_epochs_after_the_last_drawing_are_drawn_at_the_end(tmp_path):
    with Tracker(tmp_path, "A run", num_epochs=5, start_epoch=0, tensorboard=False) as tracker:
        tracker.epoch(METRICS, TIMING)
        first = (tmp_path / "progress.png").stat().st_mtime_ns
        tracker.epoch({**METRICS, "epoch": 1}, {**TIMING, "epoch": 1})
        assert (tmp_path / "progress.png").stat().st_mtime_ns == first
    assert (tmp_path / "progress.png").stat().st_mtime_ns > first


def test_mid_slices_show_the_three_planes_with_the_right_aspect():
    volume = np.arange(4 * 6 * 8).reshape(4, 6, 8)
    (axial, a), (coronal, c), (sagittal, s) = mid_slices(volume, (3.0, 1.0, 2.0))
    assert np.array_equal(axial, volume[2])
    assert np.array_equal(coronal, volume[:, 3])
    assert np.array_equal(sagittal, volume[:, :, 4])
    assert (a, c, s) == (0.5, 1.5, 3.0)


def test_an_image_is_its_own_slice():
    image = np.ones((4, 6))
    ((pixels, aspect),) = mid_slices(image, (2.0, 1.0))
    assert pixels is image
    assert aspect == 2.0


@pytest.mark.parametrize(("shape", "rows"), [((1, 4, 6, 8), 3), ((2, 6, 8), 1)])
def test_reconstructions_share_the_grey_window_of_the_first_picture(shape, rows):
    image = np.random.default_rng(0).random(shape)
    figure = draw_reconstruction({"input": image, "output": 5 * image}, (1.0,) * (len(shape) - 1), "title")
    assert len(figure.axes) == 2 * rows
    limits = {axis.images[0].get_clim() for axis in figure.axes}
    assert len(limits) == 1
    assert max(limits.pop()) <= 1


def test_integers_are_drawn_as_labels_each_in_its_colour():
    """Catches labels in shades of grey, two of one colour, and a background that is not black."""
    labels = np.arange(48).reshape(1, 6, 8) % 21
    figure = draw_reconstruction({"input": np.zeros((1, 6, 8)), "clusters": labels}, (1.0, 1.0), "title")
    colours = np.asarray(figure.axes[1].images[0].get_array())
    assert colours.shape == (6, 8, 3)
    assert not colours[labels[0] == 0].any()
    assert len({tuple(colour) for colour in colours[labels[0] > 0].round(3).tolist()}) == 20


def test_every_number_a_run_has_is_drawn_and_so_is_every_intervention():
    """Catches health or probe numbers that are in no panel, a chance left out, a line at the step of the alarm and not
    at the state gone back to, and a lowest loss called the best where targets move."""
    shown = [name for lines in PANELS.values() for name in lines]
    assert {"health_mutual_information", "same_case_mrr", "val_known_case", "probe_knn_dice"} <= set(shown)
    names = [*shown, "same_case_mrr_chance", "val_known_case_chance", "train_gradient_norm"]
    rows = [{**METRICS, **{name: 0.1 + number / 99 for number, name in enumerate(names)}, "epoch": e} for e in (0, 1)]
    rows[1]["step"] = 20
    acted = {"event": "intervention", "step": 18, "resumed_at": 5, "statistic": "token_spread"}
    figure = draw_progress(rows, [TIMING], "title", [acted, acted, {"event": "skipped", "step": 3, "cases": ["a"]}])
    drawn = {tuple(line.get_ydata()) for axis in figure.axes for line in axis.lines}
    assert {(rows[0][name],) * 2 for name in names} <= drawn
    assert [axis.get_title() for axis in figure.axes[:9]] == [
        "Loss",
        "Learning rate and gradient norm",
        "Speed",
        *PANELS,
    ]
    for axis in (figure.axes[0], *figure.axes[3:9]):
        assert list(axis.lines[-1].get_xdata()) == [0.5, 0.5]
        assert axis.texts[0].get_text() == "token spread"
    assert not any("best" in line.get_label() for line in figure.axes[0].lines)


def test_progress_is_drawn_without_optional_records():
    figure = draw_progress([METRICS], [], "title")
    assert [axis.get_title() for axis in figure.axes][3:] == ["Directions"]
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "training",
        "validation, held-out patients",
        "best 1.25",
    ]
    assert draw_progress([{"epoch": 0, "lr": 0.1, "val_loss": None}], [], "title").axes[0].lines[:] == []


def test_the_epoch_line_tells_what_matters():
    line = epoch_line(METRICS, {**TIMING, "gpu_memory_gb": 3.25}, 100)
    for part in ("epoch 1/100", "train 1.5", "val 1.25", "lr 1.00e-02", "5.00 steps/s", "10%", "3.2 GB", "00:00:08"):
        assert part in line


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00:00"), (3661, "01:01:01"), (90061, "1 d 01:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_bar_is_silent_where_nobody_watches(capsys):
    with Bar(10, 0, enabled=True) as bar:
        bar.step(1.0, TIMING)
    assert capsys.readouterr() == ("", "")


def test_the_bar_goes_back_with_the_run():
    bar = Bar(10, 0, enabled=False)
    for _ in range(7):
        bar.step(1.0, TIMING)
    bar.rewind(5)
    bar.step(1.0, TIMING)
    assert bar._progress.tasks[0].completed == 6


def test_a_stopwatch_counts_steps_waiting_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("nnssl_ext.engine.timing.time.monotonic", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    watch.restart(waited=7.0)
    for moment in (102.0, 104.0):
        now[0] = moment
        speed = watch.step(waited=8.0)
    assert speed == {"steps_per_second": 0.5, "data_wait_share": 0.25}
    now[0] = 106.0
    assert watch.epoch(steps_left=10) == {"seconds": 6.0, "eta_seconds": 30.0}


def test_a_meter_averages_each_name_over_its_own_steps():
    meter = Meter()
    for values in ({"a": 1.0, "b": 4.0}, {"a": 3.0}, {"a": math.nan}):
        meter.add(values)
    assert meter.means() == {"a": 2.0, "b": 4.0}
