"""Label resampling against nnU-Net's own function, voxel by voxel."""

import tracemalloc

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from scipy import ndimage

from nnssl_ext.preprocessing import labels as module
from nnssl_ext.preprocessing.labels import resample_labels
from nnssl_ext.preprocessing.resample import new_shape

SHAPE = (13, 22, 17)
DEFAULTS = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}


def parts(seed: int, shape: tuple[int, ...] = SHAPE, sigma: float = 1.5) -> np.ndarray:
    """Labels -1, 0, 1, 3 and 7 in smooth regions that meet in threes and fours."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), sigma) for _ in range(5)]
    return np.array([-1, 0, 1, 3, 7], np.int16)[np.argmax(fields, axis=0)]


@pytest.mark.parametrize(
    ("spacing", "target", "options"),
    [
        ((1.0, 1.0, 1.0), (0.8, 1.3, 1.1), {}),
        ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), {}),
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), {}),
        ((1.0, 1.0, 1.0), (1.0, 0.25, 1.0), {}),
        ((2.0, 1.1, 0.9), (1.0, 1.0, 1.0), {}),
        ((1.0, 1.0, 1.0), (0.8, 1.3, 1.1), {"order": 0}),
        ((5.0, 1.0, 1.0), (3.0, 0.8, 1.2), {}),
        ((5.0, 1.0, 1.0), (3.0, 0.5, 0.5), {"order_z": 1}),
        ((5.0, 1.0, 1.0), (2.5, 0.8, 1.2), {"order_z": 1}),
        ((1.0, 4.0, 1.0), (1.2, 1.5, 1.0), {"order_z": 1}),
        ((1.0, 1.0, 5.0), (1.2, 0.7, 5.0), {}),
        ((2.0, 1.0, 1.0), (1.0, 1.0, 1.2), {"force_separate_z": True}),
        ((5.0, 1.0, 1.0), (5.0, 2.0, 2.0), {"force_separate_z": False}),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), {}),
    ],
)
def test_labels_equal_nnunets(
    spacing: tuple[float, ...], target: tuple[float, ...], options: dict[str, object]
) -> None:
    labels = np.stack([parts(0), parts(1, sigma=0.4)])
    shape = new_shape(SHAPE, spacing, target)
    settings = DEFAULTS | options
    reference = resample_data_or_seg_to_shape(labels, shape, spacing, target, **settings)
    ours = resample_labels(labels, shape, spacing, target, **settings)
    assert ours.dtype == np.int16
    np.testing.assert_array_equal(ours, reference)


def test_slabs_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = parts(2)[None]
    whole = resample_labels(labels, (29, 31, 33), (1, 1, 1), (1, 1, 1))
    monkeypatch.setattr(module, "SLAB_VOXELS", 3000)
    np.testing.assert_array_equal(resample_labels(labels, (29, 31, 33), (1, 1, 1), (1, 1, 1)), whole)


def test_a_flat_map_and_small_types() -> None:
    labels = parts(3, (1, 30, 31)).clip(0)[None].astype(np.uint8)
    reference = resample_data_or_seg_to_shape(labels, (1, 47, 20), (999, 1, 1), (999, 0.64, 1.55), **DEFAULTS)
    ours = resample_labels(labels, (1, 47, 20), (999, 1, 1), (999, 0.64, 1.55))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, reference)


def test_memory_does_not_grow_with_the_number_of_labels() -> None:
    rng = np.random.default_rng(4)
    centres = rng.uniform(0, 60, (60, 3))
    grid = np.stack(np.meshgrid(*[np.arange(60)] * 3, indexing="ij"), axis=-1)
    distances = np.stack([((grid - centre) ** 2).sum(axis=-1) for centre in centres])
    labels = np.argmin(distances, axis=0).astype(np.uint8)[None]
    one_volume = np.dtype(np.float64).itemsize * 90**3
    tracemalloc.start()
    resample_labels(labels, (90, 90, 90), (1, 1, 1), (1, 1, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(labels)) == 60
    assert peak < 4 * one_volume  # one-hot takes 60 of them


@pytest.mark.parametrize("settings", [{"order": 3}, {"order_z": 3}, {"is_seg": False}])
def test_other_orders_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="resampling_fn_seg_kwargs"):
        resample_labels(parts(0)[None], SHAPE, (1, 1, 1), (1, 1, 1), **settings)
