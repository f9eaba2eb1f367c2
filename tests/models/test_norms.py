"""Instance normalisation of channels-last tensors, against torch's own."""

import pytest
import torch
from torch import nn

from nnssl_ext.engine.device import autocast
from nnssl_ext.models.norms import ChannelsLastNorms

SHAPES = {(3, 6, 5, 7, 4): torch.channels_last_3d, (3, 6, 9, 8): torch.channels_last}


def forward_and_back(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    gradients = torch.autograd.grad((weights * y.sin()).sum(), (leaf, *norm.parameters()))
    return (y, *gradients)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torchs_and_leaves_the_channels_last(shape: tuple[int, ...]) -> None:
    """Samples differ in mean and spread: statistics shared between them, as a batch norm has them, would be found."""
    torch.manual_seed(0)
    norm = (nn.InstanceNorm3d if len(shape) == 5 else nn.InstanceNorm2d)(6, affine=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    scale = torch.tensor([1.0, 5.0, 0.2]).view(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(shape) * scale + 3 * scale).contiguous(memory_format=SHAPES[shape])
    expected = forward_and_back(norm, x)
    with ChannelsLastNorms():
        result = forward_and_back(norm, x)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert result[0].is_contiguous(memory_format=SHAPES[shape])
    assert not expected[0].is_contiguous(memory_format=SHAPES[shape])


def test_other_tensors_and_running_statistics_are_left_to_torch() -> None:
    torch.manual_seed(0)
    x, tracking = torch.randn(2, 3, 4, 4, 4), nn.InstanceNorm3d(3, track_running_stats=True)
    expected = nn.InstanceNorm3d(3)(x)
    with ChannelsLastNorms():
        assert torch.equal(nn.InstanceNorm3d(3)(x), expected)
        tracking(x.contiguous(memory_format=torch.channels_last_3d))
    assert torch.allclose(tracking.running_mean, 0.1 * x.mean((0, 2, 3, 4)), atol=1e-6)


def test_bf16_on_a_cpu_uses_it_and_fp32_does_not() -> None:
    x, norm = torch.randn(2, 4, 5, 5, 5).contiguous(memory_format=torch.channels_last_3d), nn.InstanceNorm3d(4)
    cpu, layout = torch.device("cpu"), {}
    for precision in ("fp32", "bf16"):
        with autocast(precision, cpu):
            layout[precision] = norm(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert layout == {"fp32": False, "bf16": True}
