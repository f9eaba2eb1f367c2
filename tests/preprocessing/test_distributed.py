"""Preprocessing and fingerprint where workers are killed in the middle: each output exists once, and whole."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnssl_ext.core.executor import Executor, make_executor
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.fingerprint.extract import JOURNAL_FILE, extract_fingerprint
from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.index import INDEX_FILE
from nnssl_ext.preprocessing.run import preprocess_dataset
from nnssl_ext.preprocessing.store import Store

NUM_CASES = 8
LONGEST_WAIT = 60.0

Workers = tuple[Executor, Callable[[], list[int]]]


@pytest.fixture(scope="module")
def dask_address() -> Iterator[tuple[str, Callable[[], list[int]]]]:
    """The address of a scheduler on loopback with two worker processes, and who these are."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address, lambda: [nanny.pid for nanny in cluster.workers.values()]


@pytest.fixture(params=["local", "dask"])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """An executor with two worker processes, and what lists their numbers."""
    if request.param == "local":
        with make_executor(2) as executor:
            yield executor, lambda: [child.pid or 0 for child in multiprocessing.active_children()]
    else:
        address, processes = request.getfixturevalue("dask_address")
        with make_executor(0, scheduler=address) as executor:
            yield executor, processes


@contextmanager
def one_killed(processes: Callable[[], list[int]], begun: Callable[[], bool]) -> Iterator[None]:
    """Kills one of the workers as soon as the work has begun to show."""
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + LONGEST_WAIT
        while not begun() and time.monotonic() < end:
            time.sleep(0.002)
        killed.append(processes()[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    assert not thread.is_alive(), "all was done before a worker could be killed"
    thread.join()
    assert killed


def test_preprocessing(
    make_dataset: Callable[..., Manifest], make_plan: Callable[..., Plan], tmp_path: Path, workers: Workers
) -> None:
    manifest, plan = make_dataset(NUM_CASES, shape=(16, 60, 60)), make_plan((0.7, 0.7, 0.7))
    configuration = plan.configuration("3d_fullres")
    executor, processes = workers
    folder = tmp_path / "store"
    with one_killed(processes, lambda: any(folder.glob("case_*.b2nd"))):
        store = preprocess_dataset(manifest, plan, configuration, folder, executor)
    with make_executor(0) as inline:
        reference = preprocess_dataset(manifest, plan, configuration, tmp_path / "reference", inline)
    assert store.entries == Store.open(folder).entries == reference.entries
    assert sorted(path.name for path in folder.iterdir()) == [*(f"case_{i}.b2nd" for i in range(NUM_CASES)), INDEX_FILE]
    for case_id in store.entries:
        store.verify(case_id)


def test_fingerprint(make_dataset: Callable[..., Manifest], tmp_path: Path, workers: Workers) -> None:
    manifest = make_dataset(NUM_CASES, shape=(30, 60, 60))
    executor, processes = workers
    journal = tmp_path / "workers" / JOURNAL_FILE
    with one_killed(processes, lambda: journal.exists() and len(journal.read_text().splitlines()) > 1):
        fingerprint = extract_fingerprint(manifest, journal.parent, executor)
    with make_executor(0) as inline:
        assert fingerprint == extract_fingerprint(manifest, tmp_path / "reference", inline)
    described = [json.loads(line)["case_id"] for line in journal.read_text().splitlines()[1:]]
    assert sorted(described) == [case.case_id for case in manifest.cases]
