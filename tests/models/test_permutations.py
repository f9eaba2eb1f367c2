"""Permutations for jigsaws: all different, and far apart."""

import pytest
import torch

from nnssl_ext.models.permutations import distant_permutations


def nearest(permutations: torch.Tensor) -> int:
    """The least number of places in which two of them differ."""
    differing = (permutations[:, None] != permutations).sum(2)
    return int(differing.masked_fill(torch.eye(len(permutations), dtype=torch.bool), 99).min())


@pytest.mark.parametrize(("num_items", "least"), [(27, 24), (9, 6)])
def test_a_hundred_permutations_are_far_apart(num_items, least):
    """Catches permutations as they are drawn: of 27 items the nearest then differ in 21 places, of 9 in 2."""
    permutations = distant_permutations(num_items, 100)
    assert torch.equal(permutations.sort(1).values, torch.arange(num_items).expand(100, -1))
    assert nearest(permutations) >= least
    assert torch.equal(permutations, distant_permutations(num_items, 100))


def test_all_permutations_of_few_items_are_found_and_no_more():
    permutations = distant_permutations(3, 6)
    assert len(permutations.unique(dim=0)) == 6
    with pytest.raises(ValueError, match=r"permutations=7 must lie in \[2, 6\]"):
        distant_permutations(3, 7)
