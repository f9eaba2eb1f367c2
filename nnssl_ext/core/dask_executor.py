"""Runs tasks on a Dask scheduler, or on workers that Dask starts as cluster jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from typing_extensions import Self

from nnssl_ext.core.executor import TaskResult, guarded

CLUSTERS = {"slurm": "SLURMCluster", "lsf": "LSFCluster", "pbs": "PBSCluster"}


class DaskExecutor:
    """See `nnssl_ext.core.executor.Executor`.

    Args:
        num_jobs: Worker jobs to start on the cluster; unused with a scheduler, whose workers are its own.
        scheduler: Address of a running scheduler.
        cluster: A key of `CLUSTERS`; queue, memory and walltime come from Dask's own `jobqueue.yaml`.

    Raises:
        ValueError: If Dask is not installed or the cluster is unknown.
    """

    def __init__(self, num_jobs: int, *, scheduler: str | None = None, cluster: str | None = None) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise ValueError(
                'running on a cluster needs Dask, which is not installed: pip install "nnssl_ext[cluster]"'
            ) from error
        self._cluster = None if cluster is None else _start_cluster(cluster, num_jobs)
        self._client = Client(scheduler or self._cluster)

    def run(self, function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[TaskResult]:
        """See `Executor.run`. Dask itself reruns the tasks of a dead worker, as often as its own settings say."""
        from distributed import as_completed

        futures = {
            self._client.submit(guarded, function, key, arguments, pure=False): key for key, arguments in tasks.items()
        }
        for future in as_completed(list(futures)):
            if future.status == "finished":
                yield future.result()
            else:
                yield TaskResult(futures[future], error=f"{type(future.exception()).__name__}: {future.exception()}")

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

    cluster = getattr(dask_jobqueue, CLUSTERS[name])()
    cluster.scale(jobs=max(1, num_jobs))
    return cluster
