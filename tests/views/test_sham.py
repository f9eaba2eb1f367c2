"""Destroyed targets: nobody keeps his own, padding is not asked for, drawn classes tell nothing."""

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.sham import drawn_classes, of_another_case, restore_another_case


def test_every_sample_gets_the_row_of_another():
    assert of_another_case(torch.arange(4)[:, None].expand(4, 3))[:, 0].tolist() == [3, 0, 1, 2]


def test_what_is_restored_is_another_case_where_both_are_asked_for():
    """Catches padding of either case that is asked for, and views that are changed besides."""
    views = {"classes": torch.tensor([[1, 2], [3, 4]]), "valid": torch.tensor([[True, True], [True, False]])}
    image = torch.zeros(2, 2)
    sham = restore_another_case({**views, "image": image}, target="classes", asked="valid")
    assert sham["classes"].tolist() == [[3, 4], [1, 2]]
    assert sham["valid"].tolist() == [[True, False], [True, False]]
    assert sham["image"] is image


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="batch_size of 2 or more"):
        of_another_case(torch.zeros(1, 3))


def test_drawn_classes_are_uniform_and_do_not_depend_on_the_true_ones():
    """A permutation within the batch would keep the true class more often than chance."""
    random = SampleRandom(seed=0, step=0, samples=tuple(range(3000)))
    classes = torch.zeros(3000, 2, dtype=torch.int32)
    drawn = drawn_classes(classes, 4, random)
    assert (drawn.shape, drawn.dtype) == (classes.shape, classes.dtype)
    assert torch.equal(drawn, drawn_classes(classes + 1, 4, random))
    assert (torch.bincount(drawn.flatten()) / 6000).tolist() == pytest.approx([0.25] * 4, abs=0.03)
