"""A folder has one writer, also after one was killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl_ext.core.lock import LOCK_FILE, sole_writer

HOLDER = """
import sys, time
from pathlib import Path
from nnssl_ext.core.lock import sole_writer

with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        with pytest.raises(ValueError, match=f"another run is writing to {tmp_path}"), sole_writer(tmp_path):
            pytest.fail("two writers")
        assert (tmp_path / LOCK_FILE).exists()
    with sole_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run"), sole_writer(tmp_path):
            pytest.fail("two writers")
        os.kill(holder.pid, signal.SIGKILL)
    with sole_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_removed_by_its_last_holder_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, files = fcntl.flock, []

    def lock_after_removal(file: object, operation: int) -> None:
        if not files:
            (tmp_path / LOCK_FILE).unlink()
        files.append(file)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_after_removal)
    with sole_writer(tmp_path):
        assert len(files) == 2
        assert os.path.samestat((tmp_path / LOCK_FILE).stat(), os.fstat(files[1].fileno()))


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path):
        pass
    assert "only one run at a time" in caplog.text
