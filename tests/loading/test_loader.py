import logging
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from nnssl_ext.loading.loader import Batch, PatchLoader
from nnssl_ext.loading.patches import all_finite
from nnssl_ext.preprocessing.store import CorruptCaseError, Store

SHAPES = [(20, 18, 16), (9, 30, 25), (33, 21, 17), (16, 12, 8), (14, 14, 40)]
PATCH = (12, 14, 10)


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("data", "valid", "lower", "spacing"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.cases, a.samples, a.foreground) == (b.cases, b.samples, b.foreground)


def loader(store: Store, **settings) -> PatchLoader:
    defaults = {"patch_size": PATCH, "batch_size": 2, "seed": 5}
    return PatchLoader(store, list(store.entries), **{**defaults, **settings})


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(make_store, num_workers: int) -> None:
    store = make_store(SHAPES)
    expected = list(loader(store).batches(0, 9))
    with loader(store, num_workers=num_workers) as parallel:
        assert_same(list(parallel.batches(0, 9)), expected)
        workers = [worker.process.pid for worker in parallel._reader._workers]
        assert_same(list(parallel.batches(4, 9)), expected[4:])
        assert [worker.process.pid for worker in parallel._reader._workers] == workers
        assert len(workers) == num_workers
        assert parallel.wait_seconds > 0


def test_start_in_the_middle(make_store) -> None:
    store = make_store(SHAPES)
    whole = list(loader(store, accumulate=3).batches(0, 5))
    assert len(whole) == 15
    assert_same(list(loader(store, accumulate=3).batches(2, 4)), whole[6:12])


def test_a_left_reading_does_not_disturb_the_next(make_store) -> None:
    store = make_store(SHAPES)
    with loader(store, num_workers=2) as parallel:
        for _ in parallel.batches(0, 100):
            break
        assert_same(list(parallel.batches(3, 6)), list(loader(store).batches(3, 6)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_see_what_one_with_twice_the_batch_sees(make_store, accumulate: int) -> None:
    store = make_store(SHAPES)
    whole = loader(store, batch_size=4, accumulate=accumulate).batches(0, 4)
    ranks = [loader(store, batch_size=2, accumulate=accumulate, rank=r, world_size=2).batches(0, 4) for r in range(2)]
    for big, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(big.data, torch.cat([part.data for part in parts]))
        assert big.samples == sum((part.samples for part in parts), ())
        assert big.cases == sum((part.cases for part in parts), ())


def test_every_sample_has_its_own_index(make_store) -> None:
    batches = list(loader(make_store(SHAPES), accumulate=2).batches(0, 6))
    samples = [sample for batch in batches for sample in batch.samples]
    assert samples == list(range(24))
    assert {case for batch in batches[:5] for case in batch.cases} == {f"case_{i}" for i in range(5)}


def voxel_by_voxel(store: Store, batch: Batch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The crop as its definition has it."""
    volume = store.read_crop(batch.cases[row], (0, 0, 0), store.entries[batch.cases[row]].shape[1:])
    crop, valid = np.zeros(batch.data.shape[1:], np.float32), np.zeros(batch.data.shape[2:], bool)
    for index in np.ndindex(valid.shape):
        where = tuple(int(low) + i for low, i in zip(batch.lower[row], index, strict=True))
        if all(0 <= place < size for place, size in zip(where, volume.shape[1:], strict=True)):
            crop[(slice(None), *index)] = volume[(slice(None), *where)]
            valid[index] = True
    return crop, valid


def test_crops_and_validity_are_what_their_corner_says(make_store) -> None:
    store = make_store([(7, 9, 30), (20, 18, 5)], num_channels=2, spacing=(3.0, 1.0, 0.5))
    for batch in loader(store, patch_size=(8, 8, 8)).batches(0, 3):
        assert batch.data.dtype == torch.float32
        assert batch.data.shape == (2, 2, 8, 8, 8)
        assert batch.valid.dtype == torch.bool
        assert batch.spacing.tolist() == [[3.0, 1.0, 0.5]] * 2
        for row in range(2):
            crop, valid = voxel_by_voxel(store, batch, row)
            assert not valid.all()
            assert_array_equal(batch.data[row].numpy(), crop)
            assert_array_equal(batch.valid[row, 0].numpy(), valid)


@pytest.mark.parametrize("depth", [1, 9])
def test_2d_patches_are_pieces_of_one_slice(make_store, depth: int) -> None:
    spacing = (999.0, 2.0, 1.0)
    store = make_store([(depth, 20, 12), (depth, 11, 30)], spacing=spacing)
    batches = list(loader(store, patch_size=(14, 16)).batches(0, 10))
    slices = set()
    for batch in batches:
        assert batch.data.shape == (2, 1, 14, 16)
        assert batch.valid.shape == (2, 1, 14, 16)
        assert batch.lower.shape == (2, 2)
        assert batch.spacing.tolist() == [[2.0, 1.0]] * 2
        for row, case in enumerate(batch.cases):
            volume = store.read_crop(case, (0, 0, 0), store.entries[case].shape[1:])[0]
            low = batch.lower[row].tolist()
            z = int((8 * batch.data[row][batch.valid[row]].max().item() - 10000 * int(case[-1])) // 1000)
            sides = [slice(max(0, a), a + edge) for a, edge in zip(low, (14, 16), strict=True)]
            assert_array_equal(batch.data[row][batch.valid[row]].numpy(), volume[z][tuple(sides)].ravel())
            slices.add(z)
    assert len(slices) == 1 if depth == 1 else len(slices) > 3


def test_parent_scale_reads_a_larger_crop(make_store) -> None:
    batch = next(loader(make_store(SHAPES), patch_size=(6, 5, 4), parent_scale=1.5).batches(0, 1))
    assert batch.data.shape[2:] == (9, 8, 6)


def test_sparse_cases_are_counted_and_logged(make_store, caplog: pytest.LogCaptureFixture) -> None:
    sparse = np.zeros(SHAPES[0], bool)
    sparse[:4, :4, :4] = True
    store = make_store(SHAPES[:2], {0: sparse})
    one = loader(store, patch_size=(10, 10, 10), batch_size=1)
    with caplog.at_level(logging.INFO, logger="nnssl_ext"):
        list(one.batches(0, 10))
    statistics = one.statistics()
    assert statistics.num_crops == 10
    assert statistics.num_degraded == 5
    assert statistics.num_padded == 5  # case_1 has 9 slices
    assert statistics.mean_foreground == pytest.approx(0.5 + 0.5 * 0.064, abs=0.01)
    assert [record.message for record in caplog.records] == [
        "In the first round of training 1 of 2 crops have less than 50% foreground, as their cases offer no more.",
        "In the first round of training 1 of 2 crops are padded, as their cases are smaller than (10, 10, 10).",
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "altered", "nan"])
def test_a_damaged_file_is_named(make_store, num_workers: int, damage: str) -> None:
    store = make_store(SHAPES)
    path = store.folder / "case_2.b2nd"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "deleted":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    else:
        blosc2.open(str(path), mode="a")[:] = np.nan
        store.entries["case_2"] = replace(store.entries["case_2"], num_bytes=path.stat().st_size)
    with loader(store, num_workers=num_workers) as broken, pytest.raises(ValueError, match=r"case_2\.b2nd: .*nnssl_p"):
        list(broken.batches(0, 9))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, "max", "min", "tiny"])
def test_what_is_not_finite_is_found_whatever_its_sign(dtype: type, value: float | str) -> None:
    limits = np.finfo(dtype)
    number = dtype(getattr(limits, value) if isinstance(value, str) else value)
    for others in (-3, 0, 3):
        voxels = np.full((1, 2, 3, 4), others, dtype)
        voxels[0, 1, 2, 3] = number
        assert all_finite(voxels) == np.isfinite(number)


def test_errors_in_this_process_keep_their_type(make_store) -> None:
    store = make_store(SHAPES[:1])
    (store.folder / "case_0.b2nd").unlink()
    with pytest.raises(CorruptCaseError, match="found nothing"):
        list(loader(store).batches(0, 1))


def test_a_worker_that_dies_is_an_error_that_names_its_files(make_store) -> None:
    store = make_store(SHAPES[:2])
    with loader(store, num_workers=2) as parallel:
        batches = parallel.batches(0, 100)
        next(batches)
        parallel._reader._workers[1].process.kill()
        with pytest.raises(RuntimeError, match=r"killed by signal 9 while reading .*case_[01]\.b2nd") as caught:
            list(batches)
        assert "-num_workers" in str(caught.value)
        assert_same(list(parallel.batches(0, 2)), list(loader(store).batches(0, 2)))  # and it can go on


def test_reading_before_workers_start_does_not_deadlock(make_store) -> None:
    store = make_store(SHAPES)
    before = blosc2.set_nthreads(2)
    try:
        blosc2.open(str(store.folder / "case_0.b2nd"))[:]
    finally:
        blosc2.set_nthreads(before)
    with loader(store, num_workers=1) as parallel:
        assert_same(list(parallel.batches(0, 3)), list(loader(store).batches(0, 3)))


def test_spawned_workers_read_the_same(make_store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no forkserver."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    store = make_store(SHAPES[:2])
    with loader(store, num_workers=1) as parallel:
        assert_same(list(parallel.batches(0, 3)), list(loader(store).batches(0, 3)))
        assert type(parallel._reader._workers[0].process).__name__ == "SpawnProcess"


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.preprocessing.store import Store, write_case
import numpy as np

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    entry = write_case(folder, "a", np.ones((1, 9, 9, 9), np.float32), {}, np.ones((9, 9, 9), bool), spacing=(1, 1, 1))
    loader = PatchLoader(Store(folder, {"a": entry}), ["a"], (8, 8, 8), 1, seed=0, num_workers=2)
    batches = loader.batches(0, 10**6)
    loader._reader._start()
    workers = [worker.process.pid for worker in loader._reader._workers]
    for _ in range(2 if sys.argv[2] == "signals" else 0):  # while they start, and while they read
        for pid in workers:
            for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(pid, name)
        time.sleep(0.3)
        for _ in range(20):
            next(batches)
    print(*workers, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(tmp_path: Path, mode: str) -> tuple[int, list[int]]:
    script = tmp_path / "script.py"
    script.write_text(ORPHAN)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "store", mode], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, [int(pid) for pid in done.stdout.split()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize(("mode", "status"), [("kill", -9), ("signals", 0)])
def test_no_worker_outlives_its_parent_and_none_heeds_its_signals(tmp_path: Path, mode: str, status: int) -> None:
    code, workers = run_script(tmp_path, mode)
    assert code == status
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": (8,)}, r"patch_size=\(8,\) must have 2 or 3 entries"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"num_workers": -1}, "num_workers=-1 must be 0 or more"),
        ({"parent_scale": 0.5}, "parent_scale=0.5 must be 1.0 or more"),
        ({"min_foreground": 1.5}, r"min_foreground=1.5 must lie in \[0, 1\]"),
        ({"rank": 2, "world_size": 2}, "rank=2 must lie in"),
    ],
)
def test_refusals(make_store, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(make_store(SHAPES[:1]), **settings)


def test_refuses_cases_that_are_not_there_or_do_not_match(make_store) -> None:
    store = make_store(SHAPES[:2])
    with pytest.raises(ValueError, match=r"1 of 2 cases are not in .*'other'.*nnssl_preprocess"):
        PatchLoader(store, ["case_0", "other"], PATCH, 2, seed=0)
    with pytest.raises(ValueError, match="no cases to load"):
        PatchLoader(store, [], PATCH, 2, seed=0)
    store.entries["case_1"] = make_store([(8, 8, 8)], num_channels=2).entries["case_0"]
    with pytest.raises(ValueError, match=r"differ in their number of channels: \[1, 2\]"):
        PatchLoader(store, ["case_0", "case_1"], PATCH, 2, seed=0)
