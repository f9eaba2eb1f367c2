import os
import signal
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


def test_workers_have_one_thread_each_and_this_process_keeps_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with make_executor(1) as executor:
        (result,) = executor.run(threads, {"a": ()})
    assert result.value == ("1", "passive")
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="-1 processes"):
        make_executor(-1)
    with pytest.raises(ValueError, match="not both"):
        make_executor(1, scheduler="tcp://127.0.0.1:1", cluster="slurm")
