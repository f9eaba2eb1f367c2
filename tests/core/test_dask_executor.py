import os
import signal
import sys
import time
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl_ext.core import dask_executor
from nnssl_ext.core.executor import make_executor


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as running:
        yield running


def double(x: int) -> int:
    if x == 2:
        raise ValueError("two is not doubled")
    return 2 * x


def die_once(marker: str, x: int) -> int:
    time.sleep(0.1)
    if x == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_tasks_run_on_a_dask_scheduler(cluster):
    with make_executor(0, scheduler=cluster.scheduler_address) as executor:
        results = {r.key: r for r in executor.run(double, {str(x): (x,) for x in range(4)})}
    assert {k: r.value for k, r in results.items() if r.error is None} == {"0": 0, "1": 2, "3": 6}
    assert results["2"].error == "ValueError: two is not doubled"


def test_a_killed_worker_costs_no_result(cluster, tmp_path):
    with make_executor(0, scheduler=cluster.scheduler_address) as executor:
        results = list(executor.run(die_once, {str(x): (str(tmp_path / "m"), x) for x in range(8)}))
    assert sorted((r.key, r.value) for r in results) == [(str(x), x) for x in range(8)]


def test_a_scheduler_has_few_of_many_tasks_at_a_time(cluster, monkeypatch):
    """Planted fault: everything submitted at once, which took 240 MB for 100,000 cases."""
    monkeypatch.setattr(dask_executor, "MAX_IN_FLIGHT", 3)
    asked = []

    class Tasks(UserDict):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    with make_executor(0, scheduler=cluster.scheduler_address) as executor:
        results = executor.run(double, Tasks({str(x): (x,) for x in range(10, 20)}))
        first = next(results)
        assert len(asked) == 4
        values = [first.value, *(result.value for result in results)]
    assert sorted(values) == [2 * x for x in range(10, 20)]


def test_jobs_are_asked_for_and_given_back(monkeypatch):
    from distributed import LocalCluster

    log = []

    class Jobs(LocalCluster):
        """As dask_jobqueue's clusters: no worker until jobs are asked for."""

        def __init__(self):
            super().__init__(n_workers=0, threads_per_worker=1, processes=False, dashboard_address=None)

        def scale(self, jobs):
            log.append(jobs)
            super().scale(jobs)

        def close(self, timeout=None):
            log.append("closed")
            return super().close(timeout)

    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=Jobs))
    with make_executor(2, cluster="slurm") as executor:
        (result,) = executor.run(double, {"a": (4,)})
    assert result.value == 8
    assert log[0] == 2
    assert "closed" in log


def test_jobs_that_are_not_described_name_the_file(monkeypatch):
    def undescribed():
        raise ValueError("You must specify how much cores and memory")

    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=undescribed))
    with pytest.raises(ValueError, match=r"how much cores.*jobqueue: slurm: in ~/.config/dask/jobqueue.yaml"):
        make_executor(1, cluster="slurm")


@pytest.mark.parametrize("missing", ["distributed", "dask_jobqueue"])
def test_what_is_not_installed_is_named_with_the_command(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf'{missing} is not installed: pip install "nnssl_ext\[cluster\]"'):
        make_executor(1, cluster="pbs")


def test_an_unknown_cluster_is_refused():
    with pytest.raises(ValueError, match="slurm, lsf, pbs"):
        make_executor(1, cluster="cloud")
