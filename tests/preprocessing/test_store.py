"""The store: what is written comes back, only what is touched is read, and damage is noticed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

from nnssl_ext.preprocessing.errors import CorruptCaseError
from nnssl_ext.preprocessing.index import (
    Index,
    IndexEntry,
    Journal,
    Provenance,
    read_index,
    read_journal,
    write_index,
)
from nnssl_ext.preprocessing.layout import BLOCK_VOXELS, MAX_CELLS, block_shape, occupancy_grid, to_storage
from nnssl_ext.preprocessing.store import Store, write_case

SHAPE = (2, 37, 70, 45)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def write(folder: Path, data: np.ndarray, case_id: str = "case", **options: object) -> IndexEntry:
    return write_case(folder, case_id, data, {"spacing": [2.0, 1.0, 1.0]}, data[0] > 0, spacing=(2, 1, 1), **options)


def store_of(folder: Path, *entries: IndexEntry) -> Store:
    write_index(folder, Index(settings={}, entries={entry.case_id: entry for entry in entries}))
    return Store.open(folder)


def test_a_case_comes_back(tmp_path: Path, data: np.ndarray) -> None:
    provenance = Provenance(subject="s1", dataset="d", modalities=("T1", "T2"), content_hashes=("a", "b"))
    entry = write(tmp_path, data, provenance=provenance)
    store = store_of(tmp_path, entry)
    assert store.entries == {"case": entry}
    assert (entry.shape, entry.spacing, entry.subject, entry.modalities) == (SHAPE, (2, 1, 1), "s1", ("T1", "T2"))
    assert entry.foreground_fraction == pytest.approx((data[0] > 0).mean())
    np.testing.assert_array_equal(store.read_crop("case", (0, 0, 0), SHAPE[1:]), data.astype(np.float16))
    assert store.properties("case") == {"spacing": [2.0, 1.0, 1.0], "num_clamped_voxels": 0}
    store.verify("case")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_random_crops_equal_slices(tmp_path: Path, data: np.ndarray, dtype: str) -> None:
    store = store_of(tmp_path, write(tmp_path, data, dtype=dtype))
    rng = np.random.default_rng(1)
    for _ in range(20):
        lower = rng.integers(0, np.array(SHAPE[1:]))
        upper = rng.integers(lower + 1, np.array(SHAPE[1:]) + 1)
        expected = data[(slice(None), *map(slice, lower, upper))].astype(dtype)
        out = np.empty_like(expected)
        assert store.read_crop("case", lower, upper, out) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("lower", "upper"), [((-1, 0, 0), (4, 4, 4)), ((0, 0, 0), (38, 4, 4)), ((3, 3, 3), (3, 4, 4))])
def test_boxes_outside_the_volume_are_refused(
    tmp_path: Path, data: np.ndarray, lower: tuple[int, ...], upper: tuple[int, ...]
) -> None:
    store = store_of(tmp_path, write(tmp_path, data))
    with pytest.raises(ValueError, match=r"empty or leaves the volume \(37, 70, 45\)"):
        store.read_crop("case", lower, upper)


def test_an_unfit_destination_is_refused(tmp_path: Path, data: np.ndarray) -> None:
    store = store_of(tmp_path, write(tmp_path, data))
    for out in (np.empty((2, 4, 4, 4), np.float32), np.empty((2, 4, 4, 5), np.float16)):
        with pytest.raises(ValueError, match=r"float16 and of shape \(2, 4, 4, 4\)"):
            store.read_crop("case", (0, 0, 0), (4, 4, 4), out)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, data: np.ndarray) -> None:
    assert write(tmp_path / "a", data) == write(tmp_path / "b", data)


def test_a_crop_is_asked_for_as_a_box_and_decoded_into_what_is_given(tmp_path: Path, data: np.ndarray) -> None:
    """Planted faults: the whole volume decoded and then cut; a temporary that is copied."""
    store = store_of(tmp_path, write(tmp_path, data))
    asked: list[tuple[Any, Any]] = []

    class Opened:
        dtype = np.dtype(np.float16)

        def get_slice_numpy(self, out: np.ndarray, box: tuple[list[int], list[int]]) -> np.ndarray:
            asked.append((out, box))
            return store.open_case("case").get_slice_numpy(out, box)

    out = np.empty((len(data), 4, 5, 6), np.float16)
    crop = store.read_crop("case", (1, 2, 3), (5, 7, 9), out, Opened())
    np.testing.assert_array_equal(crop, data[:, 1:5, 2:7, 3:9].astype(np.float16))
    ((target, box),) = asked
    assert target is out is crop
    assert box == ([0, 1, 2, 3], [len(data), 5, 7, 9])


def test_damage_beyond_a_crop_does_not_hide_it(tmp_path: Path, data: np.ndarray) -> None:
    entry = write(tmp_path, data)
    store = store_of(tmp_path, entry)
    path = tmp_path / "case.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    expected = data[:1, :20, :20, :20].astype(np.float16)
    np.testing.assert_array_equal(store.read_crop("case", (0, 0, 0), (20, 20, 20))[:1], expected)
    with pytest.raises(CorruptCaseError, match=r"case\.b2nd: its bytes were altered.*nnssl_preprocess"):
        store.verify("case")


@pytest.mark.parametrize("shape", [(400, 400, 400), (300, 512, 512)])
def test_a_crop_of_160_decodes_at_most_twice_what_it_shows(shape: tuple[int, int, int]) -> None:
    """The mean over all places, axis by axis. Planted fault: blocks of 64 voxels an edge (2.7)."""
    ratio = 1.0
    for size, block in zip(shape, block_shape(shape), strict=True):
        start = np.arange(size - 160 + 1)
        ratio *= ((np.minimum(-(-(start + 160) // block) * block, size) - start // block * block) / 160).mean()
    assert 1 < ratio <= 2


def test_missing_and_truncated_files_are_named(tmp_path: Path, data: np.ndarray) -> None:
    store = store_of(tmp_path, write(tmp_path, data))
    path = tmp_path / "case.b2nd"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptCaseError, match=r"case\.b2nd: found \d+ bytes, the index says \d+"):
        store.read_crop("case", (0, 0, 0), (4, 4, 4))
    path.write_bytes(bytes(store.entries["case"].num_bytes))
    with pytest.raises(CorruptCaseError, match="is not a stored case"):
        store.occupancy("case")
    path.unlink()
    with pytest.raises(CorruptCaseError, match="found nothing"):
        store.properties("case")


def test_occupancy_by_hand() -> None:
    foreground = np.zeros((8, 4, 6), bool)
    foreground[:2, :, :4] = True
    foreground[4:, :, 4] = True
    grid, cell = occupancy_grid(foreground)
    assert cell == (4, 4, 4)
    np.testing.assert_array_equal(grid, [[[True, False]], [[False, True]]])


def test_occupancy_of_large_and_flat_volumes_stays_small(tmp_path: Path, data: np.ndarray) -> None:
    foreground = np.ones((1, 700, 900), bool)
    foreground[:, 350:] = False
    grid, cell = occupancy_grid(foreground)
    assert cell == (1, 8, 8)
    assert grid.size <= MAX_CELLS
    assert grid.mean() == pytest.approx(0.5, abs=0.01)
    stored, stored_cell = store_of(tmp_path, write(tmp_path, data)).occupancy("case")
    expected, expected_cell = occupancy_grid(data[0] > 0)
    np.testing.assert_array_equal(stored, expected)
    assert stored_cell == expected_cell


@pytest.mark.parametrize(
    "shape", [(200, 200, 200), (1, 900, 900), (20, 512, 512), (35, 51, 35), (1, 5, 7), (300, 9, 9)]
)
def test_blocks_hold_about_32_cubed_voxels(shape: tuple[int, ...]) -> None:
    block = block_shape(shape)
    assert all(edge <= size for edge, size in zip(block, shape, strict=True))
    assert BLOCK_VOXELS / 2 < np.prod(block) <= BLOCK_VOXELS or block == shape


def test_what_float16_cannot_hold_is_clamped_or_refused() -> None:
    data = np.zeros((1, 30, 30, 30), np.float32)
    data[0, 0, 0, :2] = 1e6, -1e6
    stored, clamped = to_storage(data, "float16")
    assert clamped == 2
    assert stored[0, 0, 0, :3].tolist() == [65504, -65504, 0]
    data[0, 0] = 7e4
    data[0, 1, 0, 0] = -1e6
    with pytest.raises(ValueError, match=r"901 of 27000 .*65504 .*-1e\+06 to 70000.*--dtype float32"):
        to_storage(data, "float16")
    assert to_storage(data, "float32")[0].max() == np.float32(7e4)
    for bad in (np.nan, np.inf):
        data[0, 5, 5, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            to_storage(data, "float16")


@pytest.mark.parametrize("case_id", ["", ".hidden", "a/b", "..\\a"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, data: np.ndarray, case_id: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file's name"):
        write(tmp_path, data, case_id)


def test_foreground_must_fit(tmp_path: Path, data: np.ndarray) -> None:
    with pytest.raises(ValueError, match="does not fit data"):
        write_case(tmp_path, "case", data, {}, data[0, 1:] > 0, spacing=(1, 1, 1))


LIMITED = """
import resource, signal, sys
from pathlib import Path
from typing import Any
import numpy as np
from nnssl_ext.preprocessing.errors import StorageFullError
from nnssl_ext.preprocessing.index import Journal
from nnssl_ext.preprocessing.store import write_case

folder = Path(sys.argv[1])
data = np.random.default_rng(0).normal(size=(1, 40, 40, 40)).astype(np.float32)
small = write_case(folder / "small", "case", data[:, :4], {}, data[0, :4] > 0, spacing=(1, 1, 1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write_case(folder / "full", "case", data, {}, data[0] > 0, spacing=(1, 1, 1))
except StorageFullError as error:
    print(error)
try:
    with Journal(folder, {}, []) as journal:
        while True:
            journal.add(small)
except StorageFullError as error:
    print(error)
"""


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    case, journal = run.stdout.splitlines()
    assert "File too large" in case
    assert "case.b2nd" in case
    assert list((tmp_path / "full").iterdir()) == []
    assert "nnssl_index.journal" in journal
    assert list(read_journal(tmp_path).entries) == ["case"]


def test_an_index_of_100000_cases_is_ready_and_opens_no_file(
    tmp_path: Path, data: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes, source = ("a" * 64,) * 2, ("1234567:1234567890",) * 2
    entry = write(tmp_path, data, provenance=Provenance(modalities=("T1", "T2"), content_hashes=hashes, source=source))
    names = [f"sub-{number:06d}_ses-1_T1w" for number in range(100_000)]
    write_index(tmp_path, Index(settings={}, entries={name: replace(entry, case_id=name) for name in names}))
    monkeypatch.setattr(blosc2, "open", lambda *args, **kwargs: pytest.fail("a case was opened"))
    store = Store.open(tmp_path)
    assert list(store.entries) == names
    assert store.entries[names[-1]] == replace(entry, case_id=names[-1])


def test_index_and_journal_keep_everything(tmp_path: Path, data: np.ndarray) -> None:
    first, second = write(tmp_path, data, "a"), write(tmp_path, data, "b")
    index = Index(settings={"spacing": [1, 1, 1]}, entries={"a": first, "b": second}, failed={"c": "empty"})
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    with Journal(tmp_path, index.settings, [first]) as journal:
        journal.add(second)
    assert read_journal(tmp_path) == replace(index, failed={})


def test_a_journal_cut_short_loses_its_last_case_only(tmp_path: Path, data: np.ndarray) -> None:
    first, second = write(tmp_path, data, "a"), write(tmp_path, data, "b")
    with Journal(tmp_path, {"k": 1}, [first, second]):
        pass
    path = tmp_path / "nnssl_index.journal"
    path.write_text(path.read_text()[:-20])
    assert read_journal(tmp_path) == Index(settings={"k": 1}, entries={"a": first})
    path.write_text("")
    assert read_journal(tmp_path) is None


def test_a_missing_or_damaged_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nnssl_preprocess"):
        Store.open(tmp_path)
    (tmp_path / "nnssl_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged \(.*Run nnssl_preprocess --overwrite"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", 99, r"has format 99, this version reads 1, 2, 3\. Run nnssl_preprocess --overwrite"),
        ("format", None, "has format None"),
        ("format", 2, "columns are not those of format 2"),
        ("columns", ["case_id"], "columns are not those of format 3"),
    ],
)
def test_an_index_of_another_format_is_refused(tmp_path: Path, data: np.ndarray, key, value, words) -> None:
    """Fault: a format of the future that happens to have today's columns is read as today's."""
    write_index(tmp_path, Index(settings={}, entries={"a": write(tmp_path, data, "a")}))
    path = tmp_path / "nnssl_index.json"
    assert read_index(path.parent).entries
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=words):
        read_index(tmp_path)


ENCODED = """
import sys
from pathlib import Path
from typing import Any
import numpy as np
from nnssl_ext.preprocessing.store import write_case

data = np.random.default_rng(0).normal(size=(1, 40, 41, 42)).astype(np.float32)
print(write_case(Path(sys.argv[1]), "case", data, {}, data[0] > 0, spacing=(1, 1, 1)).checksum)
"""


def test_the_checksum_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    checksums = {
        subprocess.run(
            [sys.executable, "-c", ENCODED, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "BLOSC_NTHREADS": threads},
        ).stdout
        for threads in ("1", "8")
    }
    assert len(checksums) == 1
