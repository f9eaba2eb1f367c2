"""Feature monitors: known values on features made by hand, floors when features collapse, padding left out."""

import math

import pytest
import torch

from nnssl_ext.engine.monitors import (
    FeatureMonitor,
    effective_rank,
    same_case_retrieval,
    summarise,
    token_spread,
    valid_share,
)


class Averages(torch.nn.Module):
    """Two maps: the image itself and its means over cells of 2."""

    strides = ((1, 1, 1), (2, 2, 2))

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, torch.nn.functional.avg_pool3d(x, 2)]


def test_equal_directions_have_full_rank_and_one_direction_none():
    identity = torch.eye(4)
    assert effective_rank(identity) == pytest.approx(1.0)
    line = torch.arange(6.0)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    assert effective_rank(line) == pytest.approx(0.0, abs=1e-5)


def test_rank_of_two_unequal_directions_is_the_formula():
    features = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    shares = (0.75, 0.25)
    entropy = -sum(p * math.log(p) for p in shares)
    assert effective_rank(features) == pytest.approx(math.exp(entropy) - 1)


def test_collapse_to_a_point_has_rank_zero():
    point = torch.randn(1, 16).repeat(8, 1)
    assert effective_rank(point) == 0.0
    assert effective_rank(point + 1e-8) == 0.0


def test_rank_does_not_depend_on_scale_or_offset():
    features = torch.randn(10, 5)
    assert effective_rank(1000 * features + 50) == pytest.approx(effective_rank(features), rel=1e-3)


def test_too_few_crops_have_no_rank():
    assert effective_rank(torch.randn(2, 8)) is None


def test_token_spread_is_zero_for_equal_and_one_for_opposite_tokens():
    equal = torch.ones(1, 4, 3) * torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    opposite = torch.tensor([[[1.0, 0], [-1, 0], [2, 0], [-5, 0]]])
    spread = token_spread(torch.cat([equal[..., :2], opposite]), torch.ones(2, 4, dtype=torch.bool))
    assert spread.tolist() == pytest.approx([0.0, 1.0], abs=1e-3)


def test_tokens_of_padding_do_not_count():
    tokens = torch.tensor([[[1.0, 0], [1, 0], [0, 9]]])
    assert token_spread(tokens, torch.tensor([[True, True, False]])).item() == pytest.approx(0.0, abs=1e-3)


def test_retrieval_finds_pairs_and_knows_chance():
    features = torch.tensor([[1.0, 0.1], [1, 0], [-1, 0], [-1, 0.1], [0, 5]])
    accuracy, chance = same_case_retrieval(features, ["a", "a", "b", "b", "c"])
    assert accuracy == 1.0
    assert chance == pytest.approx(1 / 4)


def test_retrieval_of_random_features_is_near_its_chance():
    generator = torch.Generator().manual_seed(0)
    cases = [f"{number % 50}" for number in range(400)]
    accuracy, chance = same_case_retrieval(torch.randn(400, 8, generator=generator), cases)
    assert chance == pytest.approx(7 / 399)
    assert accuracy == pytest.approx(chance, abs=0.02)


@pytest.mark.parametrize("cases", [["a", "b", "c"], ["a", "a", "a"]])
def test_retrieval_without_pairs_or_without_others_is_not_asked(cases):
    assert same_case_retrieval(torch.randn(3, 4), cases) is None


def test_valid_share_of_a_half_covered_cell_is_half():
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    valid[..., :1] = False
    assert valid_share(valid, (2, 2)).tolist() == [[0.5, 1.0, 0.5, 1.0]]


def test_pooled_features_ignore_padding():
    data = torch.randn(2, 3, 8, 8, 8)
    valid = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    valid[:, :, :4] = False
    filled = data.masked_fill(~valid, 1e6)
    states = []
    for image in (data, filled):
        monitor = FeatureMonitor()
        monitor.add(Averages(), image, valid, ["a", "b"])
        states.append(monitor.state())
    assert torch.allclose(states[0][0], states[1][0])
    assert torch.allclose(states[0][1], states[1][1])
    assert torch.allclose(states[0][0], data[:, :, 4:].flatten(2).mean(2), atol=1e-5)


def test_summary_of_several_ranks_is_that_of_all_crops():
    features, spread = torch.randn(6, 4), torch.rand(6)
    cases = ["a", "a", "b", "b", "c", "c"]
    together = summarise([(features, spread, cases)])
    parted = summarise([(features[:2], spread[:2], cases[:2]), (features[2:], spread[2:], cases[2:])])
    assert parted == pytest.approx(together)
    assert set(together) == {"token_spread", "effective_rank", "same_case_retrieval", "same_case_retrieval_chance"}


def test_a_single_crop_has_a_spread_and_nothing_else():
    assert set(summarise([(torch.randn(1, 4), torch.rand(1), ["a"])])) == {"token_spread"}
