"""The decoder without skips: every scale of a U-Net or of a token, from the deepest map alone."""

import pytest
import torch

from nnssl_ext.models.backbone import build_encoder
from nnssl_ext.models.skipless import SkiplessDecoder, halved


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
@pytest.mark.parametrize("size", [(16, 24, 8), (24, 16)], ids=["3d", "2d"])
def test_it_rises_through_every_scale_to_full_resolution(request, kind, size):
    """Catches axes that are halved in the wrong order, a scale that is skipped, and widths of another scale."""
    plan = request.getfixturevalue(kind)(size)
    encoder = build_encoder(plan.configuration(plan.configuration_names[0])).eval()
    decoder = SkiplessDecoder(encoder)
    image = torch.randn(2, 1, *size)
    maps = decoder(encoder(image)[-1])
    strides = [(2,) * len(size), (1,) * len(size)]
    if kind == "tiny_vit_plan" and len(size) == 3:  # tokens of 2x4x4
        strides = [(1, 2, 2), (1, 1, 1)]
    expected = [tuple(edge // step for edge, step in zip(size, stride, strict=True)) for stride in strides]
    assert [tuple(each.shape[2:]) for each in maps] == expected
    assert tuple(each.shape[1] for each in maps) == decoder.channels
    assert decoder.channels == ((8, 4) if kind == "tiny_plan" else (32, 16))


def test_tokens_are_halved_where_they_can_be():
    assert halved((8, 4, 2)) == [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 4, 2)]
    assert halved((1, 6)) == [(1, 1), (1, 3), (1, 6)]
