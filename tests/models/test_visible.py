"""An encoder that is run on what is visible: five things that a dense encoder on an image with holes cannot do.

The tests measure and return the truth; each is also asked of the dense encoder, which is the fault that it catches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.regularization import DropPath, SqueezeExcite
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from torch import Tensor, nn

from nnssl_ext.models import visible as module
from nnssl_ext.models.resenc import UNetEncoder
from nnssl_ext.models.visible import Densify, check_visible_only, scale_masks, visible_feature_maps, visible_norm

CONVS, NORMS = {2: nn.Conv2d, 3: nn.Conv3d}, {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
PATCHES = {2: (24, 16), 3: (8, 24, 16)}
STRIDES = {2: ((1, 1), (2, 2), (2, 1)), 3: ((1, 1, 1), (1, 2, 2), (2, 2, 1))}
KINDS = ["basic", "bottleneck", "plain"]

Norm = Callable[[nn.Module, Tensor, Tensor], Tensor]


def make_encoder(dims: int, kind: str, **changes) -> UNetEncoder:
    """A stock U-Net's encoder of three stages; residual ones have pooled, projected and plain skip branches."""
    torch.manual_seed(0)
    arguments = {
        "input_channels": 2,
        "n_stages": 3,
        "features_per_stage": (4, 6, 8),
        "conv_op": CONVS[dims],
        "kernel_sizes": 3,
        "strides": STRIDES[dims],
        "num_classes": 2,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": NORMS[dims],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }
    if kind == "plain":
        network = PlainConvUNet(n_conv_per_stage=2, **arguments)
    else:
        block, width = (BasicBlockD, None) if kind == "basic" else (BottleneckD, 4)
        network = ResidualEncoderUNet(n_blocks_per_stage=2, block=block, bottleneck_channels=width, **arguments)
    return UNetEncoder(network.double())


@pytest.fixture(params=product(PATCHES, KINDS), ids=lambda each: f"{each[0]}d-{each[1]}")
def encoder(request) -> UNetEncoder:
    return make_encoder(*request.param)


def make_input(encoder: UNetEncoder) -> tuple[Tensor, Tensor]:
    """Two images, and a few visible cells in each, more in the first."""
    cell = encoder.strides[-1]
    patch = PATCHES[len(cell)]
    random = torch.Generator().manual_seed(1)
    grid = [size // edge for size, edge in zip(patch, cell, strict=True)]
    order = torch.rand(2, torch.Size(grid).numel(), generator=random).argsort(1)
    visible = (order < torch.tensor([[8], [5]])).view(2, 1, *grid)
    for axis, edge in enumerate(cell, start=2):
        visible = visible.repeat_interleave(edge, axis)
    return torch.randn(2, 2, *patch, generator=random).double() + 1, visible


def watch_norms(monkeypatch, norm: Norm) -> None:
    monkeypatch.setattr(module, "visible_norm", norm)


def dense(monkeypatch) -> None:
    """Turns the encoder into the stock one on an image with zeros in its holes."""
    watch_norms(monkeypatch, lambda norm, x, visible: norm(x))


def convolutions_see_zeros(encoder: UNetEncoder) -> bool:
    x, visible = make_input(encoder)
    masks = {tuple(mask.shape[2:]): mask for mask in scale_masks(visible, encoder.strides)}
    seen: list[bool] = []

    def look(layer: nn.Module, args: tuple[Tensor]) -> None:
        hidden = ~masks[tuple(args[0].shape[2:])]
        seen.append(not args[0].masked_select(hidden).any())

    layers = {layer for layer in encoder.modules() if isinstance(layer, tuple(CONVS.values()))}
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    visible_feature_maps(encoder, x, visible)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) >= 6
    return all(seen)


def noise_before_norms_is_stopped(encoder: UNetEncoder, monkeypatch) -> bool:
    x, visible = make_input(encoder)
    clean = visible_feature_maps(encoder, x, visible)
    norm = module.visible_norm
    watch_norms(monkeypatch, lambda layer, x, mask: norm(layer, x + 100 * torch.randn_like(x) * ~mask, mask))
    noisy = visible_feature_maps(encoder, x, visible)
    masks = scale_masks(visible, encoder.strides)
    return all(torch.equal(a * mask, b * mask) for a, b, mask in zip(clean, noisy, masks, strict=True))


def visible_moments_are_standard(encoder: UNetEncoder, monkeypatch) -> bool:
    """Weights are 1 and biases 0 at the start, so what a norm gives is what it has before its affine map."""
    x, visible = make_input(encoder)
    norm, moments = module.visible_norm, []

    def spy(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        layer.eps = 0.0
        output = norm(layer, x, mask)
        for sample, where in zip(output, mask[:, 0], strict=True):
            values = sample[:, where]
            moments.append(torch.stack([values.mean(1), values.var(1, unbiased=False) - 1]))
        return output

    watch_norms(monkeypatch, spy)
    visible_feature_maps(encoder, x, visible)
    return bool(torch.cat(moments, 1).abs().max() < 1e-5)


def nonzero_shares_are_the_visible_one(encoder: UNetEncoder) -> bool:
    x, visible = make_input(encoder)
    share = visible.double().flatten(1).mean(1)
    maps = visible_feature_maps(encoder, x, visible)
    return all(torch.equal((each != 0).double().flatten(1).mean(1), share) for each in maps)


def test_every_convolution_sees_zeros_where_it_is_hidden(encoder, monkeypatch):
    """Fault: convolutions spread visible values into the holes, layer after layer."""
    assert convolutions_see_zeros(encoder)
    dense(monkeypatch)
    assert not convolutions_see_zeros(encoder)


def test_noise_at_hidden_positions_before_a_norm_has_no_influence(encoder, monkeypatch):
    """Fault: statistics count hidden positions, so visible features know what the holes hold."""
    assert noise_before_norms_is_stopped(encoder, monkeypatch)
    dense(monkeypatch)
    assert not noise_before_norms_is_stopped(encoder, monkeypatch)


def test_visible_features_are_standardised(encoder, monkeypatch):
    """Fault: zeros of the holes are counted, so mean and variance shift with the hidden share."""
    with monkeypatch.context() as patch:
        assert visible_moments_are_standard(encoder, patch)
    dense(monkeypatch)
    assert not visible_moments_are_standard(encoder, monkeypatch)


def test_the_nonzero_share_is_the_visible_share_at_every_scale(encoder, monkeypatch):
    """Fault: the mask erodes, until the deepest map is full."""
    assert nonzero_shares_are_the_visible_one(encoder)
    dense(monkeypatch)
    assert not nonzero_shares_are_the_visible_one(encoder)


def test_with_nothing_hidden_it_is_the_stock_encoder(encoder):
    """Fault: a walk that skips a layer of a block, or takes another order than the library."""
    x, visible = make_input(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        maps = visible_feature_maps(encoder, x, torch.ones_like(visible))
        torch.testing.assert_close(maps, encoder(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(visible_feature_maps(encoder, x, visible)[0], encoder(x)[0])


def test_stochastic_depth_is_walked_too():
    """Fault: a regularisation of the stock network is passed over."""
    encoder = make_encoder(2, "basic")
    for block in encoder.modules():
        if isinstance(block, BasicBlockD):
            block.apply_stochastic_depth, block.drop_path = True, DropPath(0.5)
    x, visible = make_input(encoder)
    once, again = (visible_feature_maps(encoder, x, visible)[-1] for _ in range(2))
    assert not torch.equal(once, again)
    encoder.eval()
    maps = visible_feature_maps(encoder, x, torch.ones_like(visible))
    torch.testing.assert_close(maps, encoder(x), rtol=1e-5, atol=1e-5)
    assert nonzero_shares_are_the_visible_one(encoder)


@pytest.mark.parametrize("rubbish", [1e6, float("nan"), float("inf")])
def test_hidden_voxels_have_no_influence(encoder, rubbish):
    x, visible = make_input(encoder)
    expected = visible_feature_maps(encoder, x, visible)
    found = visible_feature_maps(encoder, x.masked_fill(~visible, rubbish), visible)
    assert all(map(torch.equal, found, expected))


def slow_norm(norm: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    for b, c in product(range(len(x)), range(x.shape[1])):
        where = visible[b, 0]
        values = x[b, c][where]
        spread = ((values - values.mean()).square().mean() + norm.eps).sqrt()
        result[b, c][where] = (values - values.mean()) / spread * norm.weight[c] + norm.bias[c]
    return result


@pytest.mark.parametrize("dims", [2, 3])
def test_norm_equals_a_loop_over_visible_values(dims):
    norm = NORMS[dims](3, affine=True)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x = 5 * torch.randn(2, 3, *PATCHES[dims]) + 50
    visible = torch.rand(2, 1, *PATCHES[dims]) < 0.3
    torch.testing.assert_close(visible_norm(norm, x, visible), slow_norm(norm, x, visible), rtol=1e-4, atol=1e-4)


def test_statistics_are_exact_in_half_precision():
    """Fault: a mean rounded to bf16, which at 21 is wrong by up to 0.06 of the spread."""
    x = (torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) + 21.3).bfloat16()
    visible = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(1)) < 0.5
    found = visible_norm(nn.InstanceNorm2d(1), x, visible)
    assert found.dtype == torch.bfloat16
    values = found.float()[visible]
    assert values.mean().item() == pytest.approx(0, abs=2e-3)
    assert values.var(unbiased=False).item() == pytest.approx(1, abs=2e-3)


def test_a_sample_without_visible_voxels_is_all_zeros(encoder):
    x, visible = make_input(encoder)
    visible[1] = False
    maps = visible_feature_maps(encoder, x, visible)
    assert all(each[0].any() and not each[1].any() for each in maps)


@pytest.mark.parametrize("dims", [2, 3])
def test_holes_are_filled_and_nothing_else_is_changed(dims):
    """Fault: visible features run through the convolution, so that an exported network lacks a layer."""
    fill = Densify(3, dims)
    features = torch.randn(2, 3, *PATCHES[dims])
    visible = torch.rand(2, 1, *PATCHES[dims]) < 0.7
    with torch.no_grad():
        fill.token.fill_(2)
        fill.conv.weight.fill_(1 / (3 * 3**dims))
        filled = fill(features, visible)
    wanted = torch.where(visible, features, 2)
    mean = nn.functional.pad(wanted, [1] * 2 * dims).mean(1, keepdim=True)
    for axis in range(2, dims + 2):
        mean = mean.unfold(axis, 3, 1).mean(-1)
    torch.testing.assert_close(filled, torch.where(visible, features, mean.expand_as(features)))
    assert torch.equal(fill(features, torch.ones_like(visible)), features)


def test_an_encoder_with_other_statistics_is_refused():
    """Fault: batch norm or squeeze and excitation would count hidden positions without a word."""
    batch = {"norm_op": nn.BatchNorm2d, "norm_op_kwargs": {}}
    with pytest.raises(ValueError, match=r"needs .* instance normalisation throughout; this one has BatchNorm2d"):
        check_visible_only(make_encoder(2, "plain", **batch))
    with pytest.raises(ValueError, match="this one has none"):
        check_visible_only(make_encoder(2, "plain", norm_op=None))
    encoder = make_encoder(2, "basic")
    check_visible_only(encoder)
    encoder.module.stages[0].blocks[0].squeeze_excitation = SqueezeExcite(4, nn.Conv2d)
    with pytest.raises(ValueError, match="this one has SqueezeExcite"):
        check_visible_only(encoder)


def test_a_part_of_unknown_inside_is_refused():
    encoder = make_encoder(2, "plain")
    x, visible = make_input(encoder)
    encoder.module.stages[0] = nn.ModuleList([encoder.module.stages[0]])
    with pytest.raises(TypeError, match="ModuleList is a part of an encoder whose inside is not known"):
        visible_feature_maps(encoder, x, visible)
