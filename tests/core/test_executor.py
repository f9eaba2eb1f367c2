import os
import signal
import subprocess
import sys
import time
from collections import UserDict
from pathlib import Path

import pytest

from nnssl_ext.core.executor import make_executor


def square(x: int) -> int:
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x * x


def stumble(marker: str, x: int) -> int:
    """Kills its own worker the first time it sees 3."""
    if x == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def always_die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def threads() -> tuple[str | None, str | None]:
    return os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY")


def report_and_sleep(folder: str) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_results_and_errors_come_back_under_their_keys(num_processes):
    with make_executor(num_processes) as executor:
        results = {r.key: r for r in executor.run(square, {str(x): (x,) for x in range(-1, 9)})}
    assert {k: r.value for k, r in results.items() if r.error is None} == {str(x): x * x for x in range(9)}
    assert results["-1"].error == "ValueError: -1 is negative"


def test_a_killed_worker_costs_no_result(tmp_path):
    with make_executor(2) as executor:
        results = list(executor.run(stumble, {str(x): (str(tmp_path / "marker"), x) for x in range(8)}))
    assert sorted((r.key, r.value) for r in results) == [(str(x), x) for x in range(8)]


def test_a_task_that_always_kills_its_worker_is_named_and_the_rest_is_done():
    with make_executor(2) as executor:
        results = {r.key: r for r in executor.run(always_die, {str(x): (x,) for x in range(8)})}
    assert "died" in (results.pop("3").error or "")
    assert {k: r.value for k, r in results.items()} == {str(x): x for x in range(8) if x != 3}


def test_two_tasks_a_worker_are_in_flight():
    """Planted fault: everything submitted at once."""
    asked = []

    class Tasks(UserDict):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    with make_executor(1) as executor:
        results = executor.run(threads, Tasks({str(x): () for x in range(10)}))
        next(results)
        assert len(asked) == 2
        assert len(list(results)) == 9


def test_workers_have_one_thread_each_and_this_process_keeps_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with make_executor(1) as executor:
        (result,) = executor.run(threads, {"a": ()})
    assert result.value == ("1", "passive")
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = (
        "from nnssl_ext.core.executor import make_executor\n"
        "from tests.core.test_executor import report_and_sleep\n"
        "if __name__ == '__main__':\n"
        "    with make_executor(2) as executor:\n"
        f"        list(executor.run(report_and_sleep, {{str(i): ({str(tmp_path)!r},) for i in range(2)}}))\n"
    )
    (tmp_path / "parent.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="-1 processes"):
        make_executor(-1)
    with pytest.raises(ValueError, match="not both"):
        make_executor(1, scheduler="tcp://127.0.0.1:1", cluster="slurm")
