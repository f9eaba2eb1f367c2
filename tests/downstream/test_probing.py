"""Probes find what features hold and nothing else; every number by hand or by a slow second way."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import generator
from nnssl_ext.downstream.labelled import LabelledCase
from nnssl_ext.downstream.probing import (
    LinearProbe,
    ProbeConfig,
    Samples,
    dice,
    draw_subset,
    draw_voxels,
    fit_linear,
    join,
    linear_logits,
    probe,
    vote,
)

from .test_windows import pyramid


def ball(number: int, contrast: float = 4.0) -> LabelledCase:
    """A bright ball beside a dark one in noise."""
    rng = generator("balls", number)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (12, 14, 11)), indexing="ij"))
    labels = np.zeros(grid.shape[1:], dtype=np.int64)
    for value, centre in ((1, (4, 4, 5)), (2, (7, 10, 5))):
        shifted = np.array(centre) + rng.uniform(-1, 1, 3)
        labels[((grid - shifted[:, None, None, None]) ** 2).sum(0) < 8] = value
    image = rng.standard_normal(labels.shape) + contrast * ((labels == 1) * 1.0 - (labels == 2))
    return LabelledCase(f"ball_{number}", torch.tensor(image, dtype=torch.float32)[None], torch.from_numpy(labels))


CONFIG = ProbeConfig(num_labelled=2, subset_seeds=(0, 1), voxels_per_case=300, neighbours=5, bank_voxels_per_case=150)


def test_probes_find_what_the_features_hold_and_miss_what_they_do_not():
    """Fails where labels and features are taken at different voxels, in fitting or in scoring."""
    results = {
        contrast: probe(
            pyramid(8, 8, 8), [ball(n, contrast) for n in range(3)], [ball(n, contrast) for n in range(3, 6)], CONFIG
        )
        for contrast in (6.0, 0.0)
    }
    assert results[6.0].classes == (1, 2)
    assert results[6.0].cases == ("ball_3", "ball_4", "ball_5")
    assert results[6.0].linear.shape == results[6.0].knn.shape == (2, 3, 2)
    for found, missed in ((results[6.0].linear, results[0.0].linear), (results[6.0].knn, results[0.0].knn)):
        assert found.mean() > 0.65
        assert np.nanmean(missed) < 0.3


def test_a_probe_is_the_same_every_time_and_depends_on_the_subset():
    cases = [ball(n, 2.0) for n in range(5)]
    first, second = (probe(pyramid(8, 8, 8), cases[:4], cases[4:], CONFIG) for _ in range(2))
    assert np.array_equal(first.linear, second.linear)
    assert np.array_equal(first.knn, second.knn)
    assert draw_subset(4, 2, 0) != draw_subset(4, 2, 1)
    assert not np.array_equal(first.linear[0], first.linear[1])


def test_two_dimensional_encoders_are_probed_slice_by_slice():
    cases = [ball(n, 6.0) for n in range(3)]
    assert probe(pyramid(8, 8), cases[:2], cases[2:], CONFIG).linear.min() > 0.7


def test_a_class_without_a_test_case_is_undefined_and_neighbours_can_be_left_out():
    """Catches a class that no test case holds and that counts as found or missed."""
    cases = [ball(n) for n in range(3)]
    unseen = replace(cases[2], labels=cases[2].labels.where(cases[2].labels != 2, 0))
    result = probe(pyramid(8, 8, 8), cases[:2], [unseen], ProbeConfig(num_labelled=2, neighbours=0))
    assert result.knn is None
    assert np.isfinite(result.linear).all(axis=(0, 1)).tolist() == [True, False]


@pytest.mark.parametrize(
    ("labelled", "test", "words"),
    [
        ((0, 1), (1, 2), "1 test cases are among the labelled ones, such as ball_1"),
        ((0,), (1,), "1 labelled and 1 test"),
    ],
)
def test_cases_that_cannot_be_compared_are_refused(labelled, test, words):
    with pytest.raises(ValueError, match=words):
        probe(pyramid(8, 8, 8), [ball(n) for n in labelled], [ball(n) for n in test], CONFIG)


def test_drawn_voxels_are_equal_over_classes_and_stand_for_all_of_them():
    labels = torch.zeros(4, 10, 10, dtype=torch.int64)
    labels[0, 0, :4], labels[1, :5], labels[3] = 2, 1, -1
    places, weights = draw_voxels(labels, 30, generator("test"))
    drawn = labels[tuple(places.T)]
    assert torch.bincount(drawn).tolist() == [10, 10, 4]
    assert len(set(map(tuple, places.tolist()))) == 24
    assert [weights[drawn == value].sum().item() for value in (0, 1, 2)] == pytest.approx([246, 50, 4])


def test_weights_mean_as_much_as_copies():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=rng)
    labels = (features @ torch.randn(4, 3, generator=rng) + torch.randn(60, 3, generator=rng)).argmax(1)
    weights = torch.randint(1, 4, (60,), generator=rng)
    copies = torch.arange(60).repeat_interleave(weights)
    weighted, copied = Samples(features, labels, weights.float()), features[copies]
    first = fit_linear(weighted, [0, 1, 2], 1e-2)
    second = fit_linear(Samples(copied, labels[copies], torch.ones(len(copies))), [0, 1, 2], 1e-2)
    chances = [(features @ each.weight.T + each.bias).softmax(1) for each in (first, second)]
    assert torch.allclose(*chances, atol=0.02)  # they are standardised by slightly other moments


@pytest.mark.parametrize("values", [(0, 2), (0, 1, 2)])
def test_a_fit_is_the_minimum_of_its_loss(values):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(40, 3, generator=rng)
    labels = torch.tensor(values)[torch.randint(len(values), (40,), generator=rng)]
    samples = Samples(functional.normalize(features - features.mean(0), dim=0) * math.sqrt(40), labels, torch.ones(40))
    found = fit_linear(samples, [0, 1, 2], 0.1)
    weight = found.weight[list(values)].double().requires_grad_()
    bias = found.bias[list(values)].double().requires_grad_()
    target = torch.tensor([values.index(value) for value in labels.tolist()])
    loss = functional.cross_entropy(samples.features.double() @ weight.T + bias, target)
    penalty = 2 if len(values) == 2 else 1  # two classes share one coefficient vector
    (loss + 0.1 * penalty * weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 2e-3
    assert bias.grad.abs().max() < 2e-3
    assert (found.bias.isinf() == torch.tensor([value not in values for value in (0, 1, 2)])).all()


def test_logits_of_maps_are_those_of_upsampled_features():
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 2, 8, 8, 4, generator=rng), torch.randn(1, 3, 4, 4, 2, generator=rng)]
    probes = [LinearProbe(torch.randn(3, 5, generator=rng), torch.randn(3, generator=rng)) for _ in range(2)]
    upsampled = torch.cat([functional.interpolate(m, size=(8, 8, 4), mode="trilinear") for m in maps], dim=1)[0]
    expected = torch.stack(
        [torch.einsum("kc,czyx->kzyx", p.weight, upsampled) + p.bias[:, None, None, None] for p in probes]
    )
    assert torch.allclose(linear_logits(maps, probes, (8, 8, 4)), expected, atol=1e-5)


def test_votes_count_by_likeness_and_by_what_they_stand_for():
    similarities = torch.tensor([[0.9, 0.8, 0.8, -1.0], [0.9, 0.0, -0.1, 0.9]])
    labels = torch.tensor([0, 1, 1, 2])
    even, rare = torch.ones(4), torch.tensor([1.0, 1, 1, 0.5])
    assert vote(similarities, labels, even, [0, 1, 2], 3).tolist() == [0, 0]
    assert vote(similarities, labels, torch.tensor([1.0, 9, 9, 1.5]), [0, 1, 2], 3).tolist() == [1, 2]
    assert vote(similarities, labels, rare, [0, 1, 2], 50).tolist() == [0, 0]


def test_dice_of_hand_made_maps():
    """The third class is on neither side, which is right; the fourth is predicted where it is not."""
    reference = torch.tensor([0, 1, 1, 2, -1, -1, 0])
    prediction = torch.tensor([1, 1, 0, 2, 2, 1, 4])
    assert dice(prediction, reference, [1, 2, 3, 4]) == pytest.approx([0.5, 1.0, 1.0, 0.0])


def test_joined_samples_are_in_order_and_cut():
    samples = [Samples(torch.full((3, 1), float(n)), torch.full((3,), n), torch.ones(3)) for n in range(3)]
    assert join(samples, (0, 2), 2).labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    "settings", [{"num_labelled": 0}, {"penalty": 0}, {"bank_voxels_per_case": 2000}, {"subset_seeds": ()}]
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ProbeConfig(**settings)
