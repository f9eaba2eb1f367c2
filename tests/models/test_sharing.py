"""One encoder under several names: the same weights for all, through decoders and copies."""

from copy import deepcopy

import pytest
import torch

from nnssl_ext.models.dense import build_dense
from nnssl_ext.models.sharing import InnerLevel, share_weights


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_shared_weights_are_the_same_tensors_wherever_the_module_is_held(request, kind):
    """Catches a copy of values, buffers that stay behind, and a decoder that goes on holding the old encoder."""
    plan = request.getfixturevalue(kind)((24, 16))
    configuration = plan.configuration("2d")
    (first, _), (second, decoder) = (build_dense(configuration, outputs) for outputs in (1, 2))
    image = torch.randn(2, 1, 24, 16)
    assert not torch.equal(first.eval()(image)[-1], second.eval()(image)[-1])
    share_weights(second, first)
    assert torch.equal(first(image)[-1], second(image)[-1])
    ours = {id(weight) for weight in first.parameters()}
    assert {id(weight) for weight in second.parameters()} == ours
    assert {id(b) for b in second.buffers()} == {id(b) for b in first.buffers()}
    if kind == "tiny_plan":
        assert {id(weight) for weight in decoder.encoder.parameters()} == ours
    both = deepcopy(torch.nn.ModuleList([first, second]))
    assert len(list(both.parameters())) == len(ours)


def test_an_inner_level_reaches_the_layers_up_to_it_alone(tiny_plan):
    """Catches the deepest map under an inner level's name, whose gradient reaches all layers."""
    encoder, _ = build_dense(tiny_plan((24, 16)).configuration("2d"), 1)
    level = InnerLevel(encoder, 1)
    (found,) = level(torch.randn(2, 1, 24, 16))
    assert found.shape == (2, encoder.channels[-1], 12, 8)
    assert level.channels == (found.shape[1],)
    found.square().mean().backward()
    reached = {name.split(".")[2] for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert "1" in reached
    assert "2" not in reached
