"""Destroyed targets: nobody keeps his own, samples stay whole, drawn classes tell nothing."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.sham import drawn_classes, of_another_case


@pytest.mark.parametrize(("images", "expected"), [(1, [3, 0, 1, 2]), (2, [2, 3, 0, 1])])
def test_every_sample_gets_the_rows_of_another(images, expected):
    rows = torch.arange(4)[:, None].expand(4, 3)
    assert of_another_case(rows, images)[:, 0].tolist() == expected


@pytest.mark.parametrize(("rows", "images"), [(1, 1), (2, 2)])
def test_a_single_sample_is_refused(rows, images):
    with pytest.raises(ValueError, match="batch_size of 2 or more"):
        of_another_case(torch.zeros(rows, 3), images)


def test_drawn_classes_are_uniform_and_do_not_depend_on_the_true_ones():
    """A permutation within the batch would keep the true class more often than chance."""
    random = SampleRandom(seed=0, step=0, samples=tuple(range(3000)))
    classes = torch.zeros(3000, 2, dtype=torch.int32)
    drawn = drawn_classes(classes, 4, random)
    assert (drawn.shape, drawn.dtype) == (classes.shape, classes.dtype)
    assert torch.equal(drawn, drawn_classes(classes + 1, 4, random))
    assert (torch.bincount(drawn.flatten()) / 6000).tolist() == pytest.approx([0.25] * 4, abs=0.03)
