"""One way to run many independent tasks: in this process, in a local pool, or on a Dask cluster.

Tasks are keyed and must be idempotent: writing one whole output atomically, however often they run. A worker that dies
breaks a local pool, so the pool is rebuilt, what was in flight is tried again on its own, and a task that kills its
worker repeatedly is given up with an error of its own.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, Protocol

from typing_extensions import Self

MAX_CRASHES = 2
"""How often a task may take its worker down before it is given up."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS")


@dataclass(frozen=True)
class TaskResult:
    """What became of one task: a value, or the text of an error."""

    key: str
    value: Any = None
    error: str | None = None


class Executor(Protocol):
    """Runs a module-level function over keyed argument tuples; used as a context manager."""

    def run(self, function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[TaskResult]:
        """Yields one result per task, in the order of completion. An exception becomes `TaskResult.error`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def make_executor(num_processes: int, scheduler: str | None = None, cluster: str | None = None) -> Executor:
    """The executor for a command's options.

    Args:
        num_processes: Local worker processes, or jobs on a cluster; 0 runs in this process.
        scheduler: Address of a running Dask scheduler, such as `tcp://host:8786`.
        cluster: `slurm`, `lsf` or `pbs`: start workers as jobs (needs the extra `[cluster]`).

    Raises:
        ValueError: If the number is negative, both places are given, or the cluster is unknown.
    """
    if num_processes < 0:
        raise ValueError(f"{num_processes} processes are not possible; give 0 (this process) or more")
    if scheduler and cluster:
        raise ValueError("give either --scheduler or --cluster, not both")
    if scheduler or cluster:
        from nnssl_ext.core.dask_executor import DaskExecutor

        return DaskExecutor(num_processes, scheduler=scheduler, cluster=cluster)
    return LocalExecutor(num_processes) if num_processes else InlineExecutor()


def available_cores() -> int:
    """Cores that this process may use, which on a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def guarded(function: Callable[..., Any], key: str, arguments: tuple[Any, ...]) -> TaskResult:
    """Calls a function and turns an exception into a result, with its trace unless data or disk explain it."""
    try:
        return TaskResult(key, function(*arguments))
    except Exception as error:  # noqa: BLE001 - a task's failure is its result; the caller decides what it means
        text = f"{type(error).__name__}: {error}"
        expected = isinstance(error, ValueError | OSError)
        return TaskResult(key, error=text if expected else f"{text}\n{traceback.format_exc()}")


class InlineExecutor:
    """Runs tasks one after another in this process."""

    def run(self, function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[TaskResult]:
        """See `Executor.run`."""
        for key, arguments in tasks.items():
            yield guarded(function, key, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class LocalExecutor:
    """A pool of spawned worker processes with one thread each."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop(abandon=error[0] is not None)

    def run(self, function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[TaskResult]:
        """See `Executor.run`. Keeps two tasks per worker in flight; after a crash, its suspects run one at a time."""
        todo = list(tasks)[::-1]
        crashes = dict.fromkeys(tasks, 0)
        flying: dict[Future[TaskResult], str] = {}
        while todo or flying:
            while todo and len(flying) < 2 * self.num_processes:
                alone = crashes[todo[-1]] > 0 or any(crashes[key] for key in flying.values())
                if alone and flying:
                    break
                key = todo.pop()
                flying[self._submit(function, key, tasks[key])] = key
            done, _ = wait(flying, return_when=FIRST_COMPLETED)
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                yield from self._after_crash(flying, crashes, todo)
            else:
                for future in done:
                    del flying[future]
                    yield future.result()

    def _after_crash(
        self, flying: dict[Future[TaskResult], str], crashes: dict[str, int], todo: list[str]
    ) -> Iterator[TaskResult]:
        self._stop(abandon=True)
        suspects = {f: k for f, k in flying.items() if f.cancelled() or f.exception() is not None}
        yield from (future.result() for future in flying if future not in suspects)
        flying.clear()
        for key in suspects.values():
            crashes[key] += 1
            if len(suspects) == 1 and crashes[key] >= MAX_CRASHES:
                yield TaskResult(key, error=f"its worker process died {crashes[key]} times (killed, or out of memory)")
            else:
                todo.append(key)

    def _submit(self, function: Callable[..., Any], key: str, arguments: tuple[Any, ...]) -> Future[TaskResult]:
        with _single_threaded_children():
            if self._pool is None:
                self._pool = ProcessPoolExecutor(self.num_processes, get_context("spawn"), initializer=_end_with_parent)
            try:
                return self._pool.submit(guarded, function, key, arguments)
            except BrokenProcessPool as error:  # a worker died while idle: report it as one that died busy
                failed: Future[TaskResult] = Future()
                failed.set_exception(error)
                return failed

    def _stop(self, abandon: bool) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=abandon)
            self._pool = None


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone, even killed: siblings hold the queue open, so it would wait forever."""
    parent = parent_process()
    assert parent is not None, "only workers are initialised"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started within read an environment of one thread each: their libraries look at it when they load."""
    wanted = dict.fromkeys(THREAD_VARIABLES, "1") | {"OMP_WAIT_POLICY": "passive"}
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
