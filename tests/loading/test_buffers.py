"""Memory is used again, but never under a batch that somebody still looks at."""

import gc
from itertools import islice

import numpy as np
import pytest
import torch

from nnssl_ext.loading.buffers import BufferPool
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.preprocessing.store import Store, write_case

SHAPES = [(20, 18, 16), (9, 30, 25), (33, 21, 17)]
PATCH = (12, 14, 10)


def loader(store: Store, **settings) -> PatchLoader:
    return PatchLoader(store, list(store.entries), PATCH, 2, seed=5, **settings)


@pytest.mark.parametrize("shared", [True, False])
def test_a_buffer_is_free_when_the_last_tensor_on_it_is_gone(shared: bool) -> None:
    """Planted fault: watching the leased tensor instead of what owns its memory frees it while views are left."""
    pool = BufferPool(64, shared)
    first = pool.take()
    view = pool.lease(first)[8:16].view(torch.float32)
    gc.collect()
    second = pool.take()
    assert second.number != first.number
    view.numpy()[:] = 1
    del view
    assert pool.take().number == first.number
    pool.give_back(second)
    assert pool.take().number == second.number


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_that_are_kept_do_not_change_and_those_that_are_not_take_no_memory(make_store, num_workers) -> None:
    store = make_store(SHAPES)
    with loader(store, num_workers=num_workers) as one:
        batches = one.batches(0, 40)
        kept = next(batches)
        row, copy = kept.data[1, 0, 3], kept.data[1, 0, 3].clone()
        valid, whole = kept.valid, kept.valid.clone()
        del kept
        places = {batch.data.data_ptr() for batch in islice(batches, 39)}
        assert torch.equal(row, copy)
        assert torch.equal(valid, whole)
        assert len(places) <= 4  # two read ahead, one looked at, one about to be


def test_the_stored_type_is_delivered_and_a_device_gets_float32(tmp_path) -> None:
    entries = {}
    for name, dtype in (("half", "float16"), ("whole", "float32")):
        data = np.linspace(-3, 3, 15**3, dtype=np.float32).reshape(1, 15, 15, 15)
        entries[name] = write_case(tmp_path, name, data, {}, data[0] > -9, spacing=(1, 1, 1), dtype=dtype)
    for names, dtype in ((["half"], torch.float16), (["whole"], torch.float32), (["half", "whole"], torch.float32)):
        (batch,) = PatchLoader(Store(tmp_path, entries), names, PATCH, 2, seed=0).batches(0, 1)
        assert batch.data.dtype == dtype
        moved = batch.to("cpu")
        assert moved.data.dtype == torch.float32
        assert torch.equal(moved.data, batch.data.float())
        assert torch.equal(moved.valid, batch.valid)


def test_crops_are_decoded_into_the_batch(make_store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: decoding into an array of its own, which is then copied."""
    store, targets = make_store(SHAPES), []
    read = Store.read_crop

    def spy(self: Store, case: str, lower: list, upper: list, out: np.ndarray | None = None, opened: object = None):
        targets.append(out)
        return read(self, case, lower, upper, out, opened)

    monkeypatch.setattr(Store, "read_crop", spy)
    for batch in loader(store).batches(0, 8):
        whole = [row for row, valid in enumerate(batch.valid) if valid.all()]
        shared = [out is not None and np.shares_memory(out, batch.data.numpy()) for out in targets[-len(batch.data) :]]
        assert [row for row, value in enumerate(shared) if value] == whole
    assert any(out is not None for out in targets)


def test_crops_of_one_case_in_a_batch_open_its_file_once(make_store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(SHAPES)
    opened = []
    plain = Store.open_case
    monkeypatch.setattr(Store, "open_case", lambda self, case: opened.append(case) or plain(self, case))
    batches = list(loader(store, crops_per_case=2).batches(0, 6))
    assert opened == [batch.cases[0] for batch in batches]
    assert all(len(set(batch.cases)) == 1 for batch in batches)
    assert any(not torch.equal(*batch.lower) for batch in batches)
    assert set(opened[:3]) == set(store.entries)
