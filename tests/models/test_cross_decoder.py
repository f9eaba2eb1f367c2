"""The decoder that looks at other tokens: attention against a slow version, positions, empty places."""

from math import prod

import pytest
import torch

from nnssl_ext.models.cross_decoder import Attention, CrossDecoder
from nnssl_ext.models.primus import PrimusEncoder

PATCH, TOKEN, GRID = (8, 16, 12), (2, 4, 4), (4, 4, 3)
PLACES = prod(GRID)


def make_decoder(rotary: bool = True, channels: int = 1, depth: int = 2) -> CrossDecoder:
    torch.manual_seed(0)
    encoder = PrimusEncoder(1, PATCH, TOKEN, embed_dim=24, eva_depth=1, eva_numheads=2)
    decoder = CrossDecoder(encoder, channels, depth, num_heads=2, rotary=rotary)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder.eval()


def tokens(rows: int, number: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, number, 24, generator=torch.Generator().manual_seed(seed))


def turned(vector: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Pairs (a, b) of a vector turned by the angles of a rotary row (sines, then cosines)."""
    sines, cosines = row.chunk(2)
    result = torch.empty_like(vector)
    for first in range(0, len(vector), 2):
        a, b = vector[first], vector[first + 1]
        result[first] = a * cosines[first] - b * sines[first]
        result[first + 1] = b * cosines[first + 1] + a * sines[first + 1]
    return result


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_is_that_of_a_slow_version(rotary):
    """Head by head and token by token. Catches values that are rotated, a mask that is inverted, mixed up heads."""
    torch.manual_seed(0)
    attention = Attention(24, 2)
    x, context = tokens(1, 3), tokens(1, 4, seed=2)
    table = make_decoder().rope
    rows, context_rows = (table[[5, 40, 7]], table[[0, 1, 30, 47]]) if rotary else (None, None)
    mask = torch.tensor([True, True, False, True])
    output = attention(
        x, context, rows, None if context_rows is None else context_rows[None, None], mask[None, None, None]
    )
    query = attention.query(x)[0].view(3, 2, 12)
    key, value = (part.view(4, 2, 12) for part in attention.key_value(context)[0].chunk(2, dim=-1))
    expected = torch.zeros(3, 2, 12)
    for head in range(2):
        for n in range(3):
            q = turned(query[n, head], rows[n]) if rotary else query[n, head]
            scores = []
            for m in range(4):
                k = turned(key[m, head], context_rows[m]) if rotary else key[m, head]
                scores.append((q * k).sum() / 12**0.5 if mask[m] else torch.tensor(-torch.inf))
            weights = torch.stack(scores).softmax(0)
            expected[n, head] = sum(weights[m] * value[m, head] for m in range(4))
    torch.testing.assert_close(output[0], attention.out(expected.flatten(1)))


def test_context_is_known_by_its_places_not_by_its_order():
    decoder = make_decoder()
    kept, places = torch.tensor([[0, 7], [3, 5]]), torch.stack([torch.randperm(PLACES)[:20] for _ in range(2)])
    seen, context = tokens(2, 2), tokens(2, 20, seed=2)
    order = torch.randperm(20)
    expected = decoder(seen, kept, context, places)
    torch.testing.assert_close(decoder(seen, kept, context[:, order], places[:, order]), expected)
    assert not torch.allclose(decoder(seen, kept, context, places[:, order]), expected, atol=1e-3)


def test_empty_places_have_no_influence():
    decoder = make_decoder()
    kept, places = torch.tensor([[4, -1]]), torch.tensor([[9, 2, -1, -1]])
    seen, context = tokens(1, 2), tokens(1, 4, seed=2)
    few = decoder(seen[:, :1], kept[:, :1], context[:, :2], places[:, :2])
    torch.testing.assert_close(decoder(seen, kept, context, places), few)
    nothing = torch.full((1, 4), -1)
    assert torch.isfinite(decoder(seen, kept, context, nothing)).all()


def test_rotary_positions_know_distances_alone():
    """Without learned positions, image and context moved by one token along every axis give the same, moved.

    Catches rotary rows of the wrong places, or of one side only. Without the rotation places would not matter at all.
    """
    for rotary in (True, False):
        decoder = make_decoder(rotary)
        with torch.no_grad():
            decoder.position.zero_()
        decoder.blocks[0].self_attention = decoder.blocks[1].self_attention = Still()
        grid = torch.arange(PLACES).view(GRID)
        here, there = grid[:-1, :-1, :-1].flatten()[None], grid[1:, 1:, 1:].flatten()[None]
        seen, context = tokens(1, here.shape[1]), tokens(1, 6, seed=2)
        outputs = []
        for block in (here, there):
            output = decoder(seen, block, context, block[:, ::3])
            outputs.append(unfolded(output)[0, block[0]])
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)
        mixed = unfolded(decoder(seen, here, context, here[:, ::3].flip(1)))[0, here[0]]
        assert torch.allclose(mixed, outputs[0], atol=1e-3) is not rotary


class Still(torch.nn.Module):
    """Attention that adds nothing."""

    def forward(self, x, *arguments):
        return torch.zeros_like(x)


def unfolded(image: torch.Tensor) -> torch.Tensor:
    """(1, 1, *patch) to (1, tokens, voxels of a token)."""
    for axis, edge in enumerate(TOKEN, start=2):
        image = image.unflatten(2 * axis - 2, (-1, edge))
    return image.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(1, PLACES, prod(TOKEN))


def test_every_part_of_a_block_counts():
    decoder = make_decoder(depth=1)
    arguments = tokens(1, 2), torch.tensor([[0, 7]]), tokens(1, 5, seed=2), torch.tensor([[1, 2, 3, 4, 5]])
    decoder(*arguments).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_half_precision_stays_close():
    decoder = make_decoder(channels=2)
    arguments = tokens(2, 2), torch.tensor([[0, 7], [3, -1]]), tokens(2, 5, seed=2), torch.tensor([[1, 2, 3, 4, 5]] * 2)
    exact = decoder(*arguments)
    assert exact.shape == (2, 2, *PATCH)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(*arguments)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()
