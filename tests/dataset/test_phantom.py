import numpy as np
import pytest

from nnssl_ext.core.records import read_json
from nnssl_ext.dataset.phantom import LABELS, phantom, write_phantom_dataset


def test_a_phantom_is_a_function_of_its_index():
    image, labels = phantom(3)
    again, _ = phantom(3)
    np.testing.assert_array_equal(image, again)
    assert not np.array_equal(image[:20, :40, :40], phantom(4)[0][:20, :40, :40])
    assert image.shape == labels.shape
    assert image.dtype == np.float32


def test_every_case_shows_every_structure_large_enough_to_learn():
    for index in range(12):
        sizes = np.bincount(phantom(index)[1].ravel(), minlength=len(LABELS))
        assert len(sizes) == len(LABELS)
        assert sizes[1:].min() > 900


def band_dice(index: int, value: int) -> float:
    """Dice of a structure's own band of intensities as its segmentation."""
    image, labels = phantom(index)
    inside = image[labels == value]
    low, high = np.percentile(inside, [5, 95])
    band = (image >= low) & (image <= high)
    return 2 * (band & (labels == value)).sum() / (band.sum() + inside.size)


@pytest.mark.parametrize("value", [1, 2, 3])
def test_no_threshold_segments_it(value):
    assert np.mean([band_dice(index, value) for index in range(8)]) < 0.7


def test_the_dataset_has_the_decathlons_layout(tmp_path):
    folder = write_phantom_dataset(tmp_path / "p", 2)
    description = read_json(folder / "dataset.json")
    for entry in description["training"]:
        assert (folder / entry["image"]).is_file()
        assert (folder / entry["label"]).is_file()
    with pytest.raises(ValueError, match="0 cases"):
        write_phantom_dataset(tmp_path, 0)
