"""Processes that read batches ahead, in order, and fail loudly.

Each worker hangs on a pipe of its own. So requests go round in turn and results come back in the order they were asked
for; a worker whose parent was killed reads the end of its pipe and leaves; and when a worker dies, the parent sees it
at once and knows which batch it had in hand.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch

from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.patches import BatchRequest, read_batch
from nnssl_ext.preprocessing.store import SUFFIX

BATCHES_AHEAD = 2
"""Batches that a worker may have in hand: one waiting to be used, one being read."""
_EXIT_SECONDS = 5.0
_PARENTS_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


@dataclass(frozen=True)
class _Failure:
    message: str


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


def _serve(connection: Connection) -> None:
    """A worker's life: a batch for every request, until the pipe ends.

    Signals sent to the whole process group are left to the parent, which saves a checkpoint and closes the pipe.
    """
    for name in _PARENTS_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            request = connection.recv()
            connection.send(_answer(request))
        except (EOFError, ConnectionError):
            return


def _answer(request: BatchRequest) -> Batch | _Failure:
    try:
        return read_batch(request)
    except (ValueError, OSError) as error:
        return _Failure(str(error))


class WorkerPool:
    """Workers that turn requests into batches.

    They are started when first needed, by forkserver where there is one (it imports torch once for all of them), else
    by spawn: a plain fork after a blosc2 read deadlocks.

    Args:
        num_workers: Number of processes, 1 or more.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._workers: list[_Worker] = []
        self._shut: Finalize | None = None

    def read(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Batches in the order of the requests; `BATCHES_AHEAD` a worker are read ahead.

        Raises:
            ValueError: If a file cannot be read; the message names it.
            RuntimeError: If a worker died; the message names the files it was reading.
        """
        self._start()
        coming, turns = iter(requests), cycle(self._workers)
        pending: deque[tuple[_Worker, BatchRequest]] = deque()
        try:
            _ask(islice(coming, BATCHES_AHEAD * self.num_workers), turns, pending)
            while pending:
                batch = _receive(*pending[0])
                pending.popleft()
                _ask(islice(coming, 1), turns, pending)
                yield batch
        finally:
            if pending:  # left early, or an error: what is still on its way must not answer the next request
                self.close()

    def _start(self) -> None:
        if self._workers:
            return
        context = _context()
        for _ in range(self.num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True, name="nnssl-loader")
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        self._shut = Finalize(self, _stop, args=(self._workers,), exitpriority=0)

    def close(self) -> None:
        """Stops the workers; reading again starts new ones."""
        if self._shut is not None:
            self._shut()
            self._shut = None


def _context() -> SpawnContext | ForkServerContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(_EXIT_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
    workers.clear()


def _ask(
    requests: Iterable[BatchRequest], turns: Iterator[_Worker], pending: deque[tuple[_Worker, BatchRequest]]
) -> None:
    for request in requests:
        worker = next(turns)
        pending.append((worker, request))
        try:
            worker.connection.send(request)
        except ConnectionError as error:
            raise _death(worker, request) from error


def _receive(worker: _Worker, request: BatchRequest) -> Batch:
    try:
        answer = worker.connection.recv()
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # the last: its sockets went with it
        raise _death(worker, request) from error
    if isinstance(answer, _Failure):
        raise ValueError(answer.message)
    assert answer.samples == request.samples, "a pipe is read by one caller at a time"
    return answer


def _death(worker: _Worker, request: BatchRequest) -> RuntimeError:
    worker.process.join(_EXIT_SECONDS)
    status = worker.process.exitcode
    how = f"was killed by signal {-status}" if status is not None and status < 0 else f"left with exit status {status}"
    files = ", ".join(str(request.store.folder / f"{case}{SUFFIX}") for case in request.cases)
    return RuntimeError(
        f"a loading worker {how} while reading {files}. Signal 9 is mostly the system being out of memory, signal 7 a "
        "full /dev/shm: use fewer workers (-num_workers), or 0 to read in the training process and see the error."
    )
