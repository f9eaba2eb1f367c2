"""What is seen of work that goes on."""

import logging
import re

import pytest

from nnssl_ext.core import logs
from nnssl_ext.core.logs import Speed, track


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes stderr pass for a wide terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def test_speed_by_hand() -> None:
    seconds = iter([10.0, 14.0, 20.0])
    speed = Speed(lambda: next(seconds))
    speed.add()
    assert str(speed) == "0.25 cases/s"
    speed.add(25_000_000)
    assert str(speed) == "0.20 cases/s, 2.50 Mvoxels/s"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_the_speed_before_all_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Planted fault: a bar that is told the speed at the end only."""
    speed = Speed(iter(range(100)).__next__)
    items = track("abcd", 4, "work", speed)
    for item in items:
        speed.add(3_000_000)
        if item == "c":
            break
    items.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "2/4 1.00 cases/s, 3.00 Mvoxels/s" in shown


def test_without_a_terminal_progress_is_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO):
        for _ in track(range(5), 5, "work", Speed(lambda: now[0])):
            now[0] += 35
    assert caplog.messages == ["work: 2 of 5 0.00 cases/s", "work: 4 of 5 0.00 cases/s"]
