"""Visible tokens of several modalities: a fixed number for every sample, fairly shared, whole, and within limits."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.modalities import apportion, keep_modalities, of_modality

ROWS = 200
RANDOM = SampleRandom(seed=1, step=2, samples=tuple(range(ROWS)))
TOKEN, SHAPE, TOKENS = (2, 4, 4), (8, 16, 12), 48


def whole(rows: int = ROWS) -> torch.Tensor:
    return torch.ones(rows, 1, *SHAPE, dtype=torch.bool)


@pytest.mark.parametrize(
    ("shares", "total", "most", "expected"),
    [
        ([5.0, 3.0, 2.0], 10, 10, [5, 3, 2]),
        ([0.47, 0.33, 0.20], 10, 10, [5, 3, 2]),  # 4.7, 3.3, 2.0: the largest remainder is the first's
        ([0.44, 0.37, 0.19], 10, 10, [4, 4, 2]),  # 4.4, 3.7, 1.9: two are left over, for the third and the second
        ([0.44, 0.43, 0.13], 10, 10, [5, 4, 1]),  # rounding each to the nearest gives 4 + 4 + 1
        ([0.35, 0.35, 0.30], 10, 10, [4, 3, 3]),  # rounding each to the nearest gives 4 + 4 + 3
        ([0.8, 0.1, 0.1], 10, 6, [6, 2, 2]),
        ([0.8, 0.15, 0.05], 10, 6, [6, 3, 1]),
        ([0.9, 0.09, 0.01], 15, 6, [6, 6, 3]),
        ([1.0, 0.0, 0.0], 4, 10, [4, 0, 0]),
        ([0.5, 0.3, 0.2], 10, 2, [2, 2, 2]),  # no more exist
        ([0.5, 0.3, 0.2], 10, 0, [0, 0, 0]),
    ],
)
def test_largest_remainders_within_limits(shares, total, most, expected):
    """By hand. Catches rounding to the nearest, truncation, and a limit that loses what it cuts off."""
    assert apportion(torch.tensor([shares]), total, torch.tensor([most])).tolist() == [expected]


def test_numbers_add_up_whatever_the_shares():
    shares = torch.from_numpy(RANDOM.uniform("shares", shape=(4,))) ** 4
    most = torch.arange(ROWS) % 30
    found = apportion(shares, 40, most)
    assert torch.equal(found.sum(1), (4 * most).clamp(max=40))
    assert (found >= 0).all()
    assert (found <= most[:, None]).all()
    free = most >= 40
    exact = 40 * shares / shares.sum(1, keepdim=True)
    assert ((found - exact).abs() < 1)[free].all()


@pytest.mark.parametrize("modalities", [2, 3])
def test_every_sample_shows_the_same_number(modalities):
    """Catches shares that are rounded each on its own."""
    kept = keep_modalities(RANDOM, whole(), TOKEN, modalities, 5 / 6)
    assert kept.shape == (ROWS, round(modalities * TOKENS / 6))
    assert (kept >= 0).all()
    assert (kept < modalities * TOKENS).all()
    assert (kept.diff(dim=1) > 0).all()


def test_shares_are_those_of_a_flat_dirichlet_distribution():
    """With two modalities a flat Dirichlet is uniform: mean 1/2, variance 1/12. Fixed halves, or uniform numbers that
    are divided by their sum (variance .03), differ. No more exist than the visible ones, so none is capped."""
    kept = keep_modalities(RANDOM, whole(), TOKEN, 2, 0.5)
    share = (of_modality(kept, 0, TOKENS) >= 0).float().mean(1)
    assert share.mean() == pytest.approx(0.5, abs=0.06)
    assert share.var() == pytest.approx(1 / 12, abs=0.015)
    assert (share == 0).any() or share.min() < 0.03


def test_no_more_of_a_modality_than_exist():
    """Nine in ten visible: each modality gives what it has, and the rest comes from the other one."""
    kept = keep_modalities(RANDOM, whole(), TOKEN, 2, 0.1)
    counts = torch.stack([(of_modality(kept, number, TOKENS) >= 0).sum(1) for number in (0, 1)], 1)
    assert (counts.sum(1) == round(0.9 * 2 * TOKENS)).all()
    assert (counts <= TOKENS).all()
    assert (counts == TOKENS).any()


def test_tokens_with_padding_are_never_visible():
    """The number stays the same as long as so many exist; of a very small volume all are shown."""
    valid = whole()
    valid[:100, :, :, 7:] = False  # one of four rows of tokens is whole
    valid[0] = False
    valid[0, :, :4, :4, :4] = True  # two tokens
    kept = keep_modalities(RANDOM, valid, TOKEN, 2, 5 / 6)
    assert ((kept[1:] >= 0).sum(1) == 16).all()
    index = torch.arange(TOKENS).view(4, 4, 3)
    allowed = index[:, :1].flatten()
    seen = torch.cat([of_modality(kept[1:100], number, TOKENS) for number in (0, 1)], 1)
    assert set(seen[seen >= 0].tolist()) == set(allowed.tolist())
    assert sorted(kept[0][kept[0] >= 0].tolist()) == sorted([0, 12, TOKENS, TOKENS + 12])


def test_modalities_show_different_places():
    kept = keep_modalities(RANDOM, whole(), TOKEN, 2, 0.5)
    first, second = (set(of_modality(kept, number, TOKENS)[0].tolist()) - {-1} for number in (0, 1))
    assert first != second


def test_places_of_a_modality():
    kept = torch.tensor([[0, 5, 47, 48, 53, 95, -1]])
    assert of_modality(kept, 0, 48).tolist() == [[0, 5, 47, -1, -1, -1, -1]]
    assert of_modality(kept, 1, 48).tolist() == [[-1, -1, -1, 0, 5, 47, -1]]


def test_a_sample_has_its_tokens_whatever_batch_it_is_in():
    some = replace(RANDOM, samples=(5, 6))
    all_rows = keep_modalities(RANDOM, whole(), TOKEN, 2, 0.8)
    assert torch.equal(keep_modalities(some, whole(2), TOKEN, 2, 0.8), all_rows[5:7])
