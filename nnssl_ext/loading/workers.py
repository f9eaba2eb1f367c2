"""Processes that read batches ahead, in order, and fail loudly.

Each worker hangs on a pipe of its own. So requests go round in turn and results come back in the order they were asked
for; a worker whose parent was killed reads the end of its pipe and leaves; and when a worker dies, the parent sees it
at once and knows which batch it had in hand. The voxels never go through the pipe: a request names a piece of shared
memory, which the worker decodes into and the batch looks at.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch

from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.buffers import Buffer, BufferPool
from nnssl_ext.loading.patches import BatchRequest, Placed, Unreadable, as_batch, read_batch
from nnssl_ext.loading.pinning import HostMemory
from nnssl_ext.preprocessing.store import SUFFIX

BATCHES_AHEAD = 2
"""Batches that a worker may have in hand: one waiting to be used, one being read."""
_EXIT_SECONDS = 5.0
_PARENTS_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

Answer = Batch | Unreadable


@contextmanager
def _deaf() -> Iterator[None]:
    """Blocks the parent's signals, so that processes started meanwhile do not end by one before they ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # as it starts it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Reader:
    """Reads batches in this process, when asked.

    Args:
        num_bytes: Memory of a batch.
        host: Of the device that the batches go to; None where they stay.
    """

    def __init__(self, num_bytes: int, host: HostMemory | None = None) -> None:
        self._buffers = BufferPool(num_bytes, shared=False, host=host)

    def read(self, requests: Iterable[BatchRequest]) -> Iterator[Answer]:
        """Batches in the order of the requests; for one with a case that cannot be read, which and why."""
        for request in requests:
            buffer = self._buffers.take()
            placed = read_batch(request, buffer.memory.numpy())
            yield _answer(request, placed, buffer, self._buffers)

    def close(self) -> None:
        """Gives back what the memory was given."""
        self._buffers.close()


def _answer(request: BatchRequest, placed: Placed | Unreadable, buffer: Buffer, buffers: BufferPool) -> Answer:
    if isinstance(placed, Unreadable):
        buffers.give_back(buffer)
        return placed
    return as_batch(request, placed, buffers.lease(buffer))


@dataclass(frozen=True)
class _Order:
    """What is sent to a worker."""

    request: BatchRequest
    buffer: int
    """Number of the buffer to read into."""
    memory: torch.Tensor | None
    """The buffer's memory, the first time that the worker is given it."""


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    buffers: BufferPool
    """Memory that is shared with this worker alone."""
    known: set[int]
    """Numbers of the buffers that were sent."""


@dataclass(frozen=True)
class _Pending:
    """A request that a worker has in hand."""

    worker: _Worker
    request: BatchRequest
    buffer: Buffer


def _serve(connection: Connection) -> None:
    """A worker's life: a batch for every request, until the pipe ends.

    Signals sent to the whole process group are left to the parent, which saves a checkpoint and closes the pipe.
    """
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    buffers: dict[int, torch.Tensor] = {}
    while True:
        try:
            order: _Order = connection.recv()
            if order.memory is not None:
                buffers[order.buffer] = order.memory
            connection.send(read_batch(order.request, buffers[order.buffer].numpy()))
        except (EOFError, ConnectionError, FileNotFoundError):  # the last: the parent's sockets went with it
            return


class WorkerPool:
    """Workers that turn requests into batches.

    They are started when first needed, by forkserver where there is one (it imports torch once for all of them), else
    by spawn: a plain fork after a blosc2 read deadlocks.

    Args:
        num_workers: Number of processes, 1 or more.
        num_bytes: Memory of a batch.
        host: Of the device that the batches go to; None where they stay.
    """

    def __init__(self, num_workers: int, num_bytes: int, host: HostMemory | None = None) -> None:
        self.num_workers, self.num_bytes, self.host = num_workers, num_bytes, host
        self._workers: list[_Worker] = []
        self._shut: Finalize | None = None

    def read(self, requests: Iterable[BatchRequest]) -> Iterator[Answer]:
        """Batches in the order of the requests; `BATCHES_AHEAD` a worker are read ahead.

        Yields:
            Batches; for one with a case that cannot be read, which and why.

        Raises:
            RuntimeError: If a worker died; the message names the files it was reading.
        """
        self._start()
        coming, turns = iter(requests), cycle(self._workers)
        pending: deque[_Pending] = deque()
        try:
            _ask(islice(coming, BATCHES_AHEAD * self.num_workers), turns, pending)
            while pending:
                answer = _receive(pending[0])
                pending.popleft()
                _ask(islice(coming, 1), turns, pending)
                yield answer
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
            with _deaf():
                process.start()
            theirs.close()
            buffers = BufferPool(self.num_bytes, shared=True, host=self.host)
            self._workers.append(_Worker(process, ours, buffers, set()))
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
    for worker in workers:
        worker.buffers.close()
    workers.clear()


def _ask(requests: Iterable[BatchRequest], turns: Iterator[_Worker], pending: deque[_Pending]) -> None:
    for request in requests:
        worker = next(turns)
        buffer = worker.buffers.take()
        pending.append(_Pending(worker, request, buffer))
        new = buffer.number not in worker.known
        worker.known.add(buffer.number)
        try:
            worker.connection.send(_Order(request, buffer.number, buffer.memory if new else None))
        except ConnectionError as error:
            raise _death(pending[-1]) from error


def _receive(pending: _Pending) -> Answer:
    try:
        placed = pending.worker.connection.recv()
    except (EOFError, ConnectionError) as error:
        raise _death(pending) from error
    return _answer(pending.request, placed, pending.buffer, pending.worker.buffers)


def _death(pending: _Pending) -> RuntimeError:
    process, request = pending.worker.process, pending.request
    process.join(_EXIT_SECONDS)
    status = process.exitcode
    how = f"was killed by signal {-status}" if status is not None and status < 0 else f"left with exit status {status}"
    files = ", ".join(str(request.store.folder / f"{case}{SUFFIX}") for case in request.cases)
    return RuntimeError(
        f"a loading worker {how} while reading {files}. Signal 9 is mostly the system being out of memory, signal 7 a "
        "full /dev/shm: use fewer workers (-num_workers), or 0 to read in the training process and see the error."
    )
