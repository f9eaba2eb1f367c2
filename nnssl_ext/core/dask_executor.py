"""Runs tasks on a Dask scheduler, or on workers that Dask starts as cluster jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from typing_extensions import Self

from nnssl_ext.core.executor import TaskResult, guarded

CLUSTERS = {"slurm": "SLURMCluster", "lsf": "LSFCluster", "pbs": "PBSCluster"}
MAX_IN_FLIGHT = 1000
"""Tasks that a scheduler has at a time: enough for hundreds of workers, little for its memory."""


class DaskExecutor:
    """See `nnssl_ext.core.executor.Executor`.

    Args:
        num_jobs: Worker jobs to start on the cluster; unused with a scheduler, whose workers are its own.
        scheduler: Address of a running scheduler.
        cluster: A key of `CLUSTERS`; queue, memory and walltime come from Dask's own `jobqueue.yaml`.

    Raises:
        ValueError: If Dask is not installed, the cluster is unknown, or its jobs are not described.
    """

    def __init__(self, num_jobs: int, *, scheduler: str | None = None, cluster: str | None = None) -> None:
        try:
            from distributed import Client

            self._cluster = None if cluster is None else _start_cluster(cluster, num_jobs)
        except ImportError as error:
            raise ValueError(
                f'running on a cluster needs Dask, and {error.name} is not installed: pip install "nnssl_ext[cluster]"'
            ) from error
        self._client = Client(scheduler or self._cluster)

    def run(self, function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[TaskResult]:
        """See `Executor.run`. Dask itself reruns the tasks of a dead worker, as often as its own settings say."""
        from distributed import as_completed

        todo, flying, completed = iter(tasks), {}, as_completed()

        def submit(number: int) -> None:
            for key in islice(todo, number):
                future = self._client.submit(guarded, function, key, tasks[key], pure=False)
                flying[future] = key
                completed.add(future)

        submit(MAX_IN_FLIGHT)
        for future in completed:
            key = flying.pop(future)
            submit(1)
            if future.status == "finished":
                yield future.result()
            else:
                yield TaskResult(key, error=f"{type(future.exception()).__name__}: {future.exception()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _start_cluster(name: str, num_jobs: int) -> Any:
    if name not in CLUSTERS:
        raise ValueError(f"cluster {name!r} is unknown. Valid: {', '.join(CLUSTERS)}")
    import dask_jobqueue

    try:
        cluster = getattr(dask_jobqueue, CLUSTERS[name])()
    except ValueError as error:
        raise ValueError(
            f"Dask cannot start {name} jobs: {error}. Give cores, memory and queue of a job under jobqueue: {name}: in "
            "~/.config/dask/jobqueue.yaml (docs/data_format.md)"
        ) from error
    cluster.scale(jobs=max(1, num_jobs))
    return cluster
