import os
import signal
import time
from pathlib import Path

import pytest

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


def test_an_unknown_cluster_is_refused():
    with pytest.raises(ValueError, match="slurm, lsf, pbs"):
        make_executor(1, cluster="cloud")
