"""What tasks may ask of the data, and that they get it."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl_ext.dataset.collection import CollectionImage, write_collection
from nnssl_ext.dataset.manifest import Manifest, write_dataset_json
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.index import Index, Provenance, write_index
from nnssl_ext.preprocessing.run import preprocess_case
from nnssl_ext.preprocessing.store import Store, write_case


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"images": 0}, "images=0 must be 1 or more"),
        ({"images": 2, "same": "patient"}, "same='patient' must be one of modality, session or None"),
        ({"same": "session"}, "same='session' says what the images of a sample share: set images to 2"),
    ],
)
def test_refuses_needs_that_say_nothing(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataNeeds(**settings)


PATCH = (6, 7, 5)
PAIRS = DataNeeds(images=2, same="modality")


def with_rows(store: Store, **columns: Sequence[Any]) -> Store:
    """The store with other columns in its index, a value for each case."""
    rows = zip(store.entries.values(), *columns.values(), strict=True)
    changed = (replace(entry, **dict(zip(columns, values, strict=True))) for entry, *values in rows)
    return Store(store.folder, {entry.case_id: entry for entry in changed})


def test_the_images_of_a_sample_lie_in_consecutive_rows(make_store) -> None:
    store = with_rows(make_store([(9, 9, 9)] * 5), modalities=[("CT",)] * 2 + [("T1w",)] * 3)
    loader = PatchLoader(store, list(store.entries), PATCH, 2, seed=3, needs=PAIRS)
    batches = list(loader.batches(0, 40))
    assert [sample for batch in batches for sample in batch.samples] == list(range(160))
    for batch in batches:
        assert batch.data.shape == (4, 1, *PATCH)
        for one, other in (batch.cases[:2], batch.cases[2:]):
            assert one != other
            assert store.entries[one].modalities == store.entries[other].modalities
        assert len({tuple(lower) for lower in batch.lower.tolist()}) > 1  # every crop has a place of its own
    assert loader.statistics().num_crops == 160


@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_ranks_see_the_pairs_that_one_with_twice_the_batch_sees(make_store, num_workers: int) -> None:
    """Planted fault: slicing ranks by rows without the number of images gives samples twice."""
    store = make_store([(9, 9, 9)] * 5)
    settings = {"patch_size": PATCH, "seed": 3, "needs": PAIRS, "accumulate": 2}
    whole = PatchLoader(store, list(store.entries), batch_size=4, **settings).batches(1, 4)
    settings |= {"batch_size": 2, "world_size": 2, "num_workers": num_workers}
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(PatchLoader(store, list(store.entries), rank=rank, **settings)).batches(1, 4)
            for rank in range(2)
        ]
        for big, *parts in zip(whole, *ranks, strict=True):
            assert torch.equal(big.data, torch.cat([part.data for part in parts]))
            assert big.samples == parts[0].samples + parts[1].samples


def test_images_of_a_session_are_cropped_at_the_same_place(make_store) -> None:
    """Both volumes are boxes of one image, cut from corners 3, 0, 0 and 0, 1, 2: equal places, equal voxels, and
    beyond one of them is padding. Planted fault: taking the first image's corner as it is shows other voxels."""
    store = make_store([(9, 12, 11), (12, 10, 8), (9, 9, 9)], spacing=(2.0, 1.0, 1.0))
    shifts = {"case_0": (3, 0, 0), "case_1": (0, 1, 2)}
    for name, corner in shifts.items():
        shape = store.entries[name].shape[1:]
        z, y, x = (axis + start for axis, start in zip(np.indices(shape), corner, strict=True))
        data = (1 + z * 400 + y * 20 + x).astype(np.float32)[None]
        origin = (2.0 * corner[0], 1.0 * corner[1], 1.0 * corner[2])
        provenance = Provenance(subject="s", session="1", grid="g", origin=origin)
        common = {"spacing": (2.0, 1.0, 1.0), "dtype": "float32", "provenance": provenance}
        store.entries[name] = write_case(store.folder, name, data, {}, data[0] > 0, **common)
    needs = DataNeeds(images=2, same="session")
    loader = PatchLoader(store, list(store.entries), PATCH, 1, seed=3, needs=needs)
    assert loader.case_ids == ("case_0", "case_1")
    partly = 0
    for batch in loader.batches(0, 30):
        assert set(batch.cases) == {"case_0", "case_1"}
        both = batch.valid.all(0)
        partly += not both.all()
        assert torch.equal(batch.data[0][both], batch.data[1][both])
        assert (batch.data[~batch.valid] == 0).all()
        assert batch.origin == tuple((2.0 * z, 1.0 * y, 1.0 * x) for z, y, x in (shifts[name] for name in batch.cases))
        places = [np.add(shifts[name], lower) for name, lower in zip(batch.cases, batch.lower.tolist(), strict=True)]
        assert places[0].tolist() == places[1].tolist()
    assert 0 < partly < 30


def test_a_place_wholly_beyond_the_other_image_is_padding(make_store) -> None:
    store = make_store([(9, 9, 9)] * 2)
    store = with_rows(store, subject=["s"] * 2, session=["1"] * 2, grid=["g"] * 2, origin=[(0, 0, 0), (50, 0, 0)])
    needs = DataNeeds(images=2, same="session")
    (batch,) = PatchLoader(store, list(store.entries), PATCH, 1, seed=0, needs=needs).batches(0, 1)
    assert batch.valid[0].all()
    assert not batch.valid[1].any()
    assert not batch.data[1].any()


def test_preprocessing_knows_sessions_grids_and_where_an_image_begins(
    roots: Path, tiny_plan: Callable[..., Plan]
) -> None:
    """Two contrasts on one oblique grid, with margins of zeros of different width, and one on another grid."""
    raw, plan = roots / "raw" / "Dataset009_Two", tiny_plan()
    (raw / "imagesTr").mkdir(parents=True)
    margins, images = {"t1": 2, "t2": 4, "other": 2}, []
    for name, margin in margins.items():
        array = np.random.default_rng(0).uniform(1, 2, (20, 20, 20)).astype(np.float32)
        array[:margin] = 0
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, 3.0))
        image.SetOrigin((5.0, 0.0, 1.0 if name == "other" else 0.0))
        sitk.WriteImage(image, str(raw / "imagesTr" / f"{name}_0000.nii.gz"))
        path = f"imagesTr/{name}_0000.nii.gz"
        images.append(CollectionImage(dataset="D", subject="p", session="v", name=name, image_path=path, modality="MR"))
    write_dataset_json(raw, channel_names=["MR"], file_ending=".nii.gz", num_cases=3)
    write_collection(raw / "pretrain_data.json", "Two", images)
    manifest, configuration = Manifest.load(raw), plan.configuration("3d_fullres")
    made = [preprocess_case(case, plan, configuration, roots / "store", "float32") for case in manifest.cases]
    other, t1, t2 = made
    assert {entry.session for entry in made} == {"v"}
    assert t1.grid == t2.grid != other.grid
    assert (t1.origin, t2.origin) == ((6.0, 0.0, 0.0), (12.0, 0.0, 0.0))


def test_an_index_without_sessions_is_still_read(make_store, tmp_path: Path) -> None:
    store = make_store([(9, 9, 9)] * 2)
    path = tmp_path / "nnssl_index.json"
    write_index(tmp_path, Index(settings={}, entries=store.entries))
    content = json.loads(path.read_text())
    content |= {"format": 1, "columns": content["columns"][:11], "cases": [row[:11] for row in content["cases"]]}
    path.write_text(json.dumps(content))
    assert Store.open(tmp_path).entries == store.entries
    path.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="damaged: its columns are not those of format 2"):
        Store.open(tmp_path)


def test_refuses_data_with_too_few_channels_and_names_who_is_left_out(
    make_store, caplog: pytest.LogCaptureFixture
) -> None:
    store = with_rows(make_store([(9, 9, 9)] * 4), dataset=["A", "A", "A", "B"])
    with pytest.raises(ValueError, match=r"needs cases with 2 or more channels, and those of .* have 1\. Use a data"):
        PatchLoader(store, list(store.entries), PATCH, 1, seed=0, needs=DataNeeds(channels=2))
    with caplog.at_level(logging.WARNING, logger="nnssl_ext"):
        PatchLoader(store, list(store.entries), PATCH, 1, seed=0, needs=PAIRS, name="validation")
    assert [record.message for record in caplog.records] == [
        "1 of 4 cases are left out of validation: their dataset has too few others of their modality."
    ]
