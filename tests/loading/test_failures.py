"""A corrupt file is survived, and a broken disk is not."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.loading.failures import FailedCases
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.preprocessing.index import Provenance
from nnssl_ext.preprocessing.store import CorruptCaseError, Store, write_case
from tests.loading.test_loader import assert_same

MakeDamaged = Callable[..., Store]
SHAPE = (4, 4, 4)


def damage(store: Store, *numbers: int) -> None:
    for number in numbers:
        path = store.folder / f"c{number:03d}.b2nd"
        path.write_bytes(path.read_bytes()[:-9])


@pytest.fixture
def make_damaged(tmp_path: Path) -> MakeDamaged:
    """A store of many cases of two datasets by turns, some of which are cut short."""

    def make(num_cases: int, damaged: Iterable[int]) -> Store:
        entries = {}
        for number in range(num_cases):
            data, inside = np.full((1, *SHAPE), number, np.float32), np.ones(SHAPE, bool)
            name = f"c{number:03d}"
            provenance = Provenance(dataset="AB"[number % 2])
            entries[name] = write_case(tmp_path, name, data, {}, inside, spacing=(1, 1, 1), provenance=provenance)
        store = Store(tmp_path, entries)
        damage(store, *damaged)
        return store

    return make


def loader(store: Store, **settings) -> PatchLoader:
    return PatchLoader(store, list(store.entries), SHAPE, **{"batch_size": 4, "seed": 2, **settings})


@pytest.mark.parametrize(
    "settings",
    [{}, {"needs": DataNeeds(images=2, same="modality")}, {"weights": "dataset", "crops_per_case": 3}],
    ids=["one", "pairs", "weights"],
)
def test_another_case_of_the_group_takes_the_place_whatever_the_workers_ranks_and_start(
    make_damaged, settings: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted faults: drawing the replacement anew for each batch; replacing the whole batch that shows the case."""
    store = make_damaged(105, [])
    expected = list(loader(store, **settings).batches(0, 45))
    bad = expected[30].cases[0]
    damage(store, int(bad[1:]))
    whole = loader(store, **settings)
    with caplog.at_level(logging.WARNING, logger="nnssl_ext"):
        batches = list(whole.batches(0, 45))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 105 cases cannot be read" in caplog.text
    assert f"{bad}.b2nd" in caplog.text
    assert "nnssl_preprocess again" in caplog.text
    assert not any(bad in batch.cases for batch in batches)
    images = whole.needs.images
    replaced = 0
    for batch, before in zip(batches, expected, strict=True):
        for row in range(0, len(batch.cases), images):
            sample = slice(row, row + images)
            hit = bad in before.cases[sample]
            replaced += hit
            assert (batch.cases[sample] == before.cases[sample]) != hit
            datasets = {store.entries[case].dataset for case in batch.cases[sample]}
            assert len(datasets) == 1
            assert not hit or "weights" not in settings or datasets == {store.entries[bad].dataset}
            assert batch.data[row].unique().tolist() == [float(batch.cases[row][1:])]
    assert whole.statistics().num_replaced == replaced > 0
    ranks = [list(loader(store, batch_size=2, rank=r, world_size=2, **settings).batches(20, 40)) for r in range(2)]
    assert [sum((part.cases for part in parts), ()) for parts in zip(*ranks, strict=True)] == [
        batch.cases for batch in batches[20:40]
    ]


def test_workers_give_the_same_replacements(make_damaged) -> None:
    store = make_damaged(101, [3])
    expected = list(loader(store).batches(0, 30))
    with loader(store, num_workers=1) as parallel:
        assert_same(list(parallel.batches(0, 30)), expected)
        assert parallel.statistics() == replace(parallel.statistics(), num_replaced=1)


@pytest.mark.parametrize(("num_cases", "damaged", "count"), [(20, [4], "1 of 20"), (150, [4, 9], "2 of 150")])
def test_more_than_a_hundredth_is_refused(make_damaged, num_cases: int, damaged: list[int], count: str) -> None:
    store = make_damaged(num_cases, damaged)
    with pytest.raises(
        CorruptCaseError, match=f"{count} cases cannot be read, which is more than 1%: .*b2nd"
    ) as caught:
        list(loader(store).batches(0, num_cases))
    assert all(f"c{number:03d}.b2nd" in str(caught.value) for number in damaged)


def test_a_group_without_another_case_says_so(make_damaged) -> None:
    store = make_damaged(105, [17])
    store.entries["c017"] = replace(store.entries["c017"], dataset="C")
    with pytest.raises(CorruptCaseError, match=r"No case is left to take the place of c017: .*c017\.b2nd"):
        list(loader(store, weights="dataset").batches(0, 60))


def test_failures_of_two_loaders_add_up_and_count_once() -> None:
    failed = FailedCases(200)
    for name in ("a", "b", "a"):
        failed.add(name, f"{name} is gone")
    with pytest.raises(CorruptCaseError, match=r"3 of 200 .*: a is gone; b is gone; c is gone"):
        failed.add("c", "c is gone")


def test_failures_of_all_processes_count_together() -> None:
    """Fault: each process counts its own against all cases, and many times the allowed share goes unnoticed."""
    here, there = FailedCases(200), FailedCases(200)
    for failed, names in ((here, "ab"), (there, "bc")):
        for name in names:
            failed.add(name, f"{name} is gone")
    for failed in (here, there):
        with pytest.raises(CorruptCaseError, match=r"3 of 200 .*: a is gone; b is gone; c is gone"):
            failed.unite([{"a": "a is gone", "b": "b is gone"}, {"b": "b is gone", "c": "c is gone"}])
    few = FailedCases(200)
    few.unite([{"a": "a is gone"}, {}, {"a": "a is gone"}])
    assert few.reasons == {"a": "a is gone"}
