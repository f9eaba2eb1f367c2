"""A hundred thousand cases: ready without opening a file, as there is none, in memory that does not grow."""

import tracemalloc
from pathlib import Path

import pytest

from nnssl_ext.loading.cases import SamplingWeights
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.preprocessing.index import Index, IndexEntry, write_index
from nnssl_ext.preprocessing.store import Store

NUM_CASES = 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index without any file beside it."""
    path = tmp_path_factory.mktemp("large")
    entries = {}
    for number in range(NUM_CASES):
        name = f"Dataset_{number % 50:03d}__sub-{number:06d}__ses-1__T1w"
        entries[name] = IndexEntry(
            case_id=name,
            shape=(1, 192, 224, 192),
            spacing=(1.0, 1.0, 1.0),
            subject=f"sub-{number:06d}",
            dataset=f"Dataset_{number % 50:03d}",
            modalities=("T1w" if number % 3 else "FLAIR",),
            checksum=f"{number:064x}",
            num_bytes=10**7,
            foreground_fraction=0.4,
            content_hashes=(f"{number:064x}",),
            source=("12345678:1700000000000000000",),
        )
    write_index(path, Index(settings={}, entries=entries))
    return path


@pytest.mark.parametrize(
    ("weights", "needs"),
    [("uniform", DataNeeds()), ({"Dataset_007": 3.0}, DataNeeds(images=2, same="modality"))],
    ids=["plain", "pairs"],
)
def test_ready_without_a_file_and_no_larger_after_a_million_samples(
    folder: Path, weights: SamplingWeights, needs: DataNeeds
) -> None:
    store = Store.open(folder)
    loader = PatchLoader(store, list(store.entries), (96, 96, 96), 2, seed=0, weights=weights, needs=needs)
    assert len(loader._request(0).cases) == 2 * needs.images
    for sample in range(0, 8 * NUM_CASES, 1997):
        loader._sampler.cases(sample)
    tracemalloc.start()
    for sample in range(10**8, 10**8 + 8 * NUM_CASES, 1997):
        loader._sampler.cases(sample)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 5 * 8 * NUM_CASES  # the orders of four rounds, in place of those of the rounds before
