"""The head of self-distillation: lengths of 1, frozen prototypes, and no dependence on the batch."""

import pytest
import torch

from nnssl_ext.models.heads import PrototypeHead


def make(width: int = 16) -> PrototypeHead:
    torch.manual_seed(0)
    return PrototypeHead(width, num_prototypes=12)


@pytest.mark.parametrize(("width", "hidden", "bottleneck"), [(16, 128, 32), (320, 2048, 256)])
def test_widths_are_the_papers_or_what_a_small_encoder_deserves(width, hidden, bottleneck):
    head = make(width)
    assert [layer.out_features for layer in head.layers if isinstance(layer, torch.nn.Linear)] == [
        hidden,
        hidden,
        bottleneck,
    ]
    assert head.weight.shape == (12, bottleneck)


def test_scores_are_cosines_however_long_prototypes_have_grown():
    """Fails if the last layer's gain can learn: logits then grow without bound."""
    head, x = make(), torch.randn(5, 16)
    cosines = head(x)
    embeddings = head.embed(x)
    expected = [[torch.cosine_similarity(e, w, dim=0).item() for w in head.weight] for e in embeddings]
    assert torch.allclose(cosines, torch.tensor(expected), atol=1e-5)
    with torch.no_grad():
        head.weight.mul_(torch.rand(12, 1) * 9 + 1)
    assert torch.allclose(head(x), cosines, atol=1e-5)


def test_prototypes_are_frozen_until_they_may_move_while_all_else_learns():
    head, x = make(), torch.randn(5, 16)
    scores = []
    for moving in (0.0, 1.0):
        head.zero_grad()
        head.moving.fill_(moving)
        scores.append(head(x))
        scores[-1].square().sum().backward()
        assert bool(head.weight.grad.any()) == bool(moving)
        assert all(p.grad.any() for p in head.layers.parameters())
    assert torch.equal(*scores)


def test_a_sample_does_not_depend_on_the_others():
    """Fails with batch normalisation, which at two samples gives 1 and -1 whatever they are."""
    head, x = make(), torch.randn(5, 16)
    assert torch.allclose(head(x)[:1], head(x[:1]), atol=1e-6)


def test_it_computes_in_float32_under_autocast():
    head, x = make(), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), make()(x))
        assert head(x).dtype == torch.float32
