"""Running a U-Net's encoder on the visible part of an image only, with dense tensors.

Three things would carry what is hidden, or where, into visible features, and each is closed: the input is 0 where it is
hidden; a convolution spreads visible values one voxel into the holes, and the normalisation after it sets them back to
0; and that normalisation counts visible positions alone. Pooling and the sum with a skip branch then keep zeros zero,
because a hidden cell is a cell of the deepest feature map: no window of the encoder's pooling holds both kinds.

The modules are the stock ones, walked in their own order, so weights and names stay what nnU-Net knows, and with
nothing hidden the features are those of the stock encoder. After SparK (Tian et al. 2023, arXiv:2301.03580), which
reaches the same with sparse tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.regularization import SqueezeExcite
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn

from nnssl_ext.models.encoder import Encoder

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
OTHER_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, SqueezeExcite)
"""Layers whose statistics would count hidden positions."""
CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
INITIAL_STD = 0.02
"""Spread of the mask tokens at the start, SparK's."""

Masks = Mapping[tuple[int, ...], Tensor]
"""Which positions are visible, (B, 1, *size), by the size of a feature map."""


def visible_feature_maps(encoder: Encoder, x: Tensor, visible: Tensor) -> list[Tensor]:
    """The encoder's feature maps, 0 at every hidden position and a function of the visible voxels only.

    Args:
        encoder: That of a U-Net, after `check_visible_only`.
        x: Images (B, C, *patch); what they hold at hidden voxels has no influence.
        visible: (B, 1, *patch), bool, the same throughout a cell of the deepest feature map.

    Returns:
        As `Encoder.feature_maps`.
    """
    masks = {tuple(mask.shape[2:]): mask for mask in scale_masks(visible, encoder.strides)}
    module: Any = encoder.module
    x = torch.where(visible, x, 0)
    x = x if getattr(module, "stem", None) is None else _run(module.stem, x, masks)
    maps = []
    for stage in module.stages:
        x = _run(stage, x, masks)
        maps.append(x)
    return maps


def scale_masks(visible: Tensor, strides: Sequence[Sequence[int]]) -> list[Tensor]:
    """Which positions of each feature map are visible.

    Args:
        visible: (B, 1, *patch), bool, constant in each cell of the deepest map.
        strides: Voxels per position, one tuple per map.

    Returns:
        (B, 1, *patch / stride) per map.
    """
    corners = [tuple(slice(None, None, step) for step in stride) for stride in strides]
    return [visible[(slice(None), slice(None), *corner)] for corner in corners]


def check_visible_only(encoder: Encoder) -> None:
    """Refuses an encoder whose layers would mix hidden positions into visible ones.

    Raises:
        ValueError: Names the layer.
    """
    layers = list(encoder.modules())
    wrong = [type(layer).__name__ for layer in layers if isinstance(layer, OTHER_STATISTICS)]
    if wrong or not any(isinstance(layer, INSTANCE_NORMS) for layer in layers):
        raise ValueError(
            "this method keeps features to visible positions and needs a convolutional network with instance "
            f"normalisation throughout; this one has {wrong[0] if wrong else 'none'}. nnssl_plan_experiment plans such "
            "networks"
        )


def _run(module: nn.Module, x: Tensor, masks: Masks) -> Tensor:
    """The stock forward pass of a part of the encoder, its normalisation counting visible positions."""
    match module:
        case nn.InstanceNorm2d() | nn.InstanceNorm3d():
            return visible_norm(module, x, masks[tuple(x.shape[2:])])
        case ConvDropoutNormReLU():
            return _run(module.all_modules, x, masks)
        case StackedConvBlocks():
            return _run(module.convs, x, masks)
        case StackedResidualBlocks():
            return _run(module.blocks, x, masks)
        case BasicBlockD() | BottleneckD():
            return _run_block(module, x, masks)
        case nn.Sequential():
            for layer in module:
                x = _run(layer, x, masks)
            return x
    if next(module.children(), None) is not None:
        raise TypeError(f"{type(module).__name__} is a part of an encoder whose inside is not known here")
    return module(x)


def _run_block(block: BasicBlockD | BottleneckD, x: Tensor, masks: Masks) -> Tensor:
    convolutions = ("conv1", "conv2") if isinstance(block, BasicBlockD) else ("conv1", "conv2", "conv3")
    added = x
    for name in convolutions:
        added = _run(getattr(block, name), added, masks)
    if block.apply_stochastic_depth:
        added = block.drop_path(added)
    skipped = _run(block.skip, x, masks) if isinstance(block.skip, nn.Module) else x
    return getattr(block, f"nonlin{len(convolutions)}")(added + skipped)


def visible_norm(norm: nn.InstanceNorm2d | nn.InstanceNorm3d, x: Tensor, visible: Tensor) -> Tensor:
    """Instance normalisation whose statistics are those of the visible positions, 0 at all others.

    Args:
        norm: The stock layer: epsilon, weight and bias.
        x: (B, C, *size); what it holds at hidden positions has no influence.
        visible: (B, 1, *size), bool.

    Returns:
        (B, C, *size) of the type of `x`; computed in fp32.
    """
    axes = tuple(range(2, x.ndim))
    count = visible.sum(axes, keepdim=True).clamp(min=1)
    values = torch.where(visible, x.float(), 0)
    centred = torch.where(visible, values - values.sum(axes, keepdim=True) / count, 0)
    scale = (centred.square().sum(axes, keepdim=True) / count + norm.eps).rsqrt()
    if not norm.affine:
        return (centred * scale).to(x.dtype)
    weight, bias = (value.view(1, -1, *[1] * len(axes)) for value in (norm.weight, norm.bias))
    return torch.where(visible, centred * (scale * weight) + bias, 0).to(x.dtype)


class Densify(nn.Module):
    """Fills the holes of a feature map: a learned token first, then a 3³ convolution, which looks at the rim.

    Visible features are handed on as they are; in SparK the convolution runs over them too. So with nothing hidden this
    does nothing, and the decoder after it is trained on the features that it will meet in fine-tuning.

    Args:
        channels: Features of the map.
        dims: Spatial dimensions, 2 or 3.
    """

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, channels, *[1] * dims))
        nn.init.trunc_normal_(self.token, std=INITIAL_STD)
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1, bias=False)

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        """From features (B, C, *size) and where they are visible (B, 1, *size) to features everywhere."""
        filled = torch.where(visible, features, self.token.to(features.dtype))
        return torch.where(visible, features, self.conv(filled).to(features.dtype))
