"""Memory for a GPU: page-locked while it is in use, and never written to while a copy of it goes on."""

import gc
import weakref
from itertools import islice

import pytest
import torch

from nnssl_ext.loading import loader as loading
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.buffers import BufferPool
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.loading.pinning import CudaHostMemory, host_memory

SHAPES = [(20, 18, 16), (9, 30, 25), (33, 21, 17)]
PATCH = (12, 14, 10)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Mark:
    def __init__(self, events: list[str], passed: bool) -> None:
        self.events, self.passed = events, passed

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.events.append("wait")
        self.passed = True


class FakeHost:
    """A device that comes past its marks when it is told to, and notes what it was asked."""

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick
        self.events: list[str] = []
        self.marks: list[Mark] = []
        self.locked: set[int] = set()

    def lock(self, memory: torch.Tensor) -> None:
        assert memory.data_ptr() not in self.locked
        self.locked.add(memory.data_ptr())
        self.events.append("lock")

    def unlock(self, memory: torch.Tensor) -> None:
        self.locked.remove(memory.data_ptr())
        self.events.append("unlock")

    def mark(self) -> Mark:
        self.events.append("mark")
        self.marks.append(Mark(self.events, self.quick))
        return self.marks[-1]


@pytest.mark.parametrize("shared", [True, False])
def test_a_buffer_is_free_only_when_the_device_has_copied_it(shared: bool) -> None:
    """Planted fault: a buffer that is free as soon as no tensor is left on it."""
    host = FakeHost()
    pool = BufferPool(64, shared, host)
    first, second = pool.take(), pool.take()
    leases = [pool.lease(first)[8:], pool.lease(second)]
    assert host.events == ["lock", "lock"]
    leases.pop(0)
    leases.pop()
    assert host.events == ["lock", "lock", "mark", "mark"]
    third = pool.take()
    assert third.number == 2
    host.marks[0].passed = True
    assert pool.take() is first
    assert pool.take().number == 3
    host.marks[1].passed = True
    assert pool.take() is second


def test_closing_waits_for_the_device_and_unlocks_what_is_lent_too() -> None:
    """Planted faults: unlocking before the wait; taking back what was lent when the pool was closed."""
    host = FakeHost()
    pool = BufferPool(64, False, host)
    kept, dropped = pool.lease(pool.take()), pool.lease(pool.take())
    kept[:] = 7
    del dropped
    pool.close()
    assert host.events == ["lock", "lock", "mark", "mark", "wait", "unlock", "unlock"]
    assert kept.tolist() == [7] * 64
    del kept
    pool.close()
    assert host.events[7:] == []
    assert pool.take().number == 2
    assert len(host.locked) == 1


def test_a_pool_that_nobody_closed_unlocks_its_memory_when_it_goes() -> None:
    host = FakeHost()
    pool = BufferPool(64, False, host)
    pool.give_back(pool.take())
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    assert host.events == ["lock", "mark", "wait", "unlock"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_for_a_device(make_store, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    """The same crops, from memory that is used again only once it was copied, and unlocked even after an error."""
    store = make_store(SHAPES)
    (expected,) = PatchLoader(store, list(store.entries), PATCH, 2, seed=5).batches(8, 9)
    for quick, places in ((True, range(1, 5)), (False, range(12, 13))):
        host = FakeHost(quick)
        monkeypatch.setattr(loading, "host_memory", lambda device, host=host: host)
        loader = PatchLoader(store, list(store.entries), PATCH, 2, seed=5, num_workers=num_workers, device="cuda")
        with pytest.raises(KeyError), loader:
            batches = loader.batches(0, 12)
            seen = {batch.data.data_ptr() for batch in islice(batches, 8)}
            ninth = next(batches)
            assert torch.equal(ninth.data, expected.data)
            seen |= {ninth.data.data_ptr(), *(batch.data.data_ptr() for batch in batches)}
            assert len(seen) in places
            assert seen <= host.locked
            raise KeyError
        assert not host.locked
        assert host.events.index("unlock") > max(i for i, event in enumerate(host.events) if event == "wait")


def test_nobody_waits_for_a_copy_to_a_gpu_but_for_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted faults: not waiting for copies from a GPU; nor for those to devices that buffers are not kept for."""
    asked = []
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        asked.append(options["non_blocking"])
        return plain(tensor, "meta")

    monkeypatch.setattr(torch.Tensor, "to", to)
    data, row = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2)
    batch = Batch(data=data, valid=data.bool(), cases=("a",), samples=(0,), lower=row.long(), spacing=row)
    batch.to("cuda:1").to("cpu")
    batch.to("mps")
    assert asked == [True] * 4 + [False] * 8


def test_a_cpu_needs_nothing_and_a_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext
    from types import SimpleNamespace

    assert host_memory("cpu") is None
    runtime = SimpleNamespace(cudaHostRegister=lambda place, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(RuntimeError, match=r"64 bytes cannot be page-locked for cuda:0 \(CUDA error 2\).*-num_workers"):
        BufferPool(64, False, CudaHostMemory(torch.device("cuda:0"))).take()


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_gpu_gets_the_same_numbers_however_late_it_copies(make_store, num_workers: int) -> None:
    """Planted fault: buffers that are free as soon as no tensor is left are overwritten while the GPU still waits."""
    store, device = make_store([(120, 110, 100)] * 3), torch.device("cuda")
    settings = {"seed": 5, "num_workers": num_workers}
    patch, steps = (96, 96, 96), 24
    with PatchLoader(store, list(store.entries), patch, 2, device=device, **settings) as loader:
        copies, places = [], set()
        for batch in loader.batches(0, steps):
            assert batch.data.is_pinned()
            assert batch.valid.is_pinned()
            torch.cuda._sleep(20_000_000)  # the copy has to wait for this, and the host goes on
            copies.append(batch.to(device).data.half())
            places.add(batch.data.data_ptr())
            if len(copies) % 8 == 0:
                torch.cuda.synchronize(device)
        kept = batch
    assert not kept.data.is_pinned()
    assert len(places) < steps
    reference = PatchLoader(store, list(store.entries), patch, 2, seed=5).batches(0, steps)
    for copy, expected in zip(copies, reference, strict=True):
        assert torch.equal(copy.cpu(), expected.data.half())
