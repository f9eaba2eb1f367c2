"""The losses of self-distillation against loops, by hand, and the properties that keep them from cheating."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from nnssl_ext.losses.dino import dino_loss, known_case
from nnssl_ext.losses.gram import gram_loss
from nnssl_ext.losses.ibot import ibot_loss
from nnssl_ext.losses.koleo import koleo


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cross_entropy(target: torch.Tensor, logits: torch.Tensor, temperature: float) -> float:
    exponentials = [math.exp(value / temperature) for value in logits.tolist()]
    return -sum(p * math.log(e / sum(exponentials)) for p, e in zip(target.tolist(), exponentials, strict=True))


def test_dino_is_the_mean_over_pairs_of_different_views():
    """Fails if a view is paired with itself, or if a local crop meets only one of the two targets."""
    student, teacher = draw(5, 3, 7), draw(2, 3, 7, seed=1).softmax(-1)
    pairs = [(t, s, b) for t in range(2) for s in range(5) for b in range(3) if s != t]
    expected = sum(cross_entropy(teacher[t, b], student[s, b], 0.1) for t, s, b in pairs) / len(pairs)
    assert dino_loss(student, teacher, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_dino_gives_no_gradient_to_a_view_from_its_own_target():
    student = draw(2, 1, 4).requires_grad_()
    teacher = torch.stack([draw(1, 4, seed=1).softmax(-1), student[0].detach().softmax(-1)])
    dino_loss(student, teacher, 1.0).backward()
    assert torch.allclose(student.grad[0], torch.zeros(1, 4), atol=1e-7)  # it agrees with the other view's target
    assert student.grad[1].abs().max() > 1e-3


def test_ibot_weights_samples_alike_however_many_tokens_they_hide():
    """Fails if tokens are averaged over the batch: then samples that hide more count more."""
    student, teacher = draw(4, 6, 5), draw(4, 6, 5, seed=1).softmax(-1)
    counts = (1, 4, 0, 6)
    hidden = torch.arange(6) < torch.tensor(counts)[:, None]
    means = [
        sum(cross_entropy(teacher[b, m], student[b, m], 0.1) for m in range(count)) / count
        for b, count in enumerate(counts)
        if count
    ]
    assert ibot_loss(student, teacher, hidden, 0.1).item() == pytest.approx(sum(means) / 3, rel=1e-5)


def test_ibot_without_hidden_tokens_is_zero_and_gives_no_gradient():
    student = draw(2, 3, 4).requires_grad_()
    loss = ibot_loss(student, draw(2, 3, 4).softmax(-1), torch.zeros(2, 3, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_koleo_is_minus_the_log_of_the_distance_to_the_nearest_that_counts():
    """Fails if the excluded repel: two views of one image, or a feature itself, are always the nearest."""
    features, queue = draw(3, 4), draw(5, 4, seed=1)
    others = torch.cat([features, queue])
    excluded = torch.zeros(3, 8, dtype=torch.bool)
    excluded[range(3), range(3)] = True
    excluded[0, 5:] = True
    expected = []
    for i in range(3):
        rest = [others[j] for j in range(8) if not excluded[i, j]]
        nearest = min((normalize(features[i], dim=0) - normalize(x, dim=0)).norm().item() for x in rest)
        expected.append(-math.log(nearest + 1e-6))
    assert koleo(features, others, excluded).item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_koleo_pushes_neighbours_apart_and_is_finite_where_they_coincide():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1]]).requires_grad_()
    own = torch.eye(2, dtype=torch.bool)
    koleo(features, features, own).backward()
    assert features.grad[0, 1] > 0 > features.grad[1, 1]  # a step against the gradient moves them apart
    same = torch.ones(2, 2).requires_grad_()
    loss = koleo(same, same, own)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(2e-6), rel=1e-3)
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("others", [torch.ones(0, 4), torch.ones(2, 4)])
def test_koleo_of_a_feature_without_others_is_zero(others):
    features = draw(2, 4).requires_grad_()
    loss = koleo(features, others, torch.ones(2, len(others), dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not features.grad.any()


def test_gram_compares_all_pairs_and_not_the_tokens_themselves():
    student, anchor = draw(2, 5, 3), draw(2, 5, 4, seed=1)
    expected = 0.0
    for b in range(2):
        for i in range(5):
            for j in range(5):
                ours, theirs = (normalize(t[b, i], dim=0) @ normalize(t[b, j], dim=0) for t in (student, anchor))
                expected += (ours - theirs).item() ** 2
    assert gram_loss(student, anchor).item() == pytest.approx(expected / 50, rel=1e-5)
    turned = student @ torch.linalg.qr(draw(3, 3, seed=2))[0]
    assert gram_loss(student, turned).item() == pytest.approx(0, abs=1e-10)  # similarities do not see a rotation


@pytest.mark.parametrize("loss", ["dino", "ibot", "koleo", "gram"])
def test_losses_are_computed_in_float32_whatever_is_around_them(loss):
    """Fails if a product is left to autocast, which rounds float32 factors to eight bits."""
    a, b = draw(2, 3, 4).bfloat16(), draw(2, 3, 4, seed=1).bfloat16()
    own = torch.eye(3, dtype=torch.bool)
    value = {
        "dino": lambda a, b: dino_loss(a, b.softmax(-1), 0.1),
        "ibot": lambda a, b: ibot_loss(a, b.softmax(-1), torch.ones(2, 3, dtype=torch.bool), 0.1),
        "koleo": lambda a, b: koleo(a[0], a[0], own),
        "gram": gram_loss,
    }[loss]
    assert value(a, b).dtype == torch.float32
    assert value(a, b).item() == pytest.approx(value(a.float(), b.float()).item(), rel=1e-2)
    a, b = draw(2, 3, 4) + 30, draw(2, 3, 4, seed=1)  # nearly the same directions: rounded, others are the nearest
    with torch.autocast("cpu", torch.bfloat16):
        under = value(a, b)
    assert under.dtype == torch.float32
    assert torch.equal(under, value(a, b))


def test_a_case_is_known_where_its_own_view_predicts_its_target_best():
    """Fails if a target is compared with itself, or if another crop of the same case counts as a wrong answer."""
    case = torch.tensor([1, 2, 3, 1])
    student, teacher = draw(3, 4, 8), (draw(2, 4, 8, seed=1) * 3).softmax(-1)
    hits, total = 0, 0
    for t in range(2):
        for s in range(3):
            for b in range(4) if s != t else ():
                fit = [-cross_entropy(teacher[t, b], student[s, c], 0.1) for c in range(4)]
                hits += fit[b] > max(fit[c] for c in range(4) if case[c] != case[b])
                total += 1
    known, chance = known_case(student, teacher, case, 0.1)
    assert known.item() == pytest.approx(hits / total)
    assert chance.item() == pytest.approx((1 / 3 + 1 / 4 + 1 / 4 + 1 / 3) / 4)


def test_a_collapsed_student_knows_no_case_whatever_its_loss():
    same = (20 * torch.nn.functional.one_hot(torch.tensor(2), 8)).float().expand(3, 4, 8)
    teacher = same[:2].softmax(-1)
    assert dino_loss(same, teacher, 0.1) < 1e-3
    known, chance = known_case(same, teacher, torch.arange(4), 0.1)
    assert known == 0 < chance
