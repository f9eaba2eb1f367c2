"""Decoders with which a transformer is fine-tuned where its own, a few transposed convolutions, is too coarse.

Both see the tokens after several blocks. The one of UNETR (Hatamizadeh et al. 2022, arXiv:2103.10504) is a pyramid of
convolutions up to full resolution, with the image itself as the finest skip; each scale has an output for deep
supervision. The all-MLP one (SegFormer, Xie et al. 2021, arXiv:2105.15203) has no kernel that looks beyond a token: it
joins the maps, gives every token a finer grid of features, and interpolates the logits. SegFormer's encoder has four
scales; a plain transformer has one, so here the finer grid comes from the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn
from torch.nn import functional

HE_SLOPE = 1e-2
"""Negative slope that the library initialises its convolutions for."""
INTERPOLATION = {2: "bilinear", 3: "trilinear"}
PYRAMID_WIDTH = 16
"""Features of the pyramid at full resolution, doubled at every scale below: UNETR's."""
PYRAMID_MAX_WIDTH = 320
"""Greatest width of the pyramid, nnU-Net's."""
CONVS_PER_SCALE = 2
MLP_MAPS = 4
"""Maps that the all-MLP decoder joins: SegFormer's number."""
MLP_WIDTH = 128
"""Width to which each of them is brought."""
MLP_FINE_WIDTH = 16
"""Width on the finer grid."""
MLP_STRIDE = 2
"""Voxels per position of the finer grid, along axes whose tokens are not smaller."""
NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class PyramidDecoder(nn.Module):
    """UNETR's: convolutions from the tokens up, joined at every scale by tokens of an earlier block.

    Scale 0 is the image's, the last one the tokens'.

    Args:
        input_channels: Of the image.
        embed_dim: Width of a token.
        num_classes: Output channels.
        strides: Of the scales, the first all ones, their product the token.
        deep_supervision: Whether the outputs of all scales above the tokens' come in a list, full resolution first.
    """

    def __init__(
        self,
        input_channels: int,
        embed_dim: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        steps = [tuple(step) for step in strides[1:]]
        dims, self.num_maps = len(steps[0]), len(steps)
        conv = convert_dim_to_conv_op(dims)
        widths = [min(PYRAMID_MAX_WIDTH, PYRAMID_WIDTH * 2**scale) for scale in range(len(steps))]
        skips: list[nn.Module] = [_convolutions(dims, input_channels, widths[0])]
        skips += [_rise(dims, embed_dim, widths[scale:], steps[scale:]) for scale in range(1, len(steps))]
        self.skips = nn.ModuleList(skips)
        below = [*widths[1:], embed_dim]
        rises = [
            TRANSPOSED[dims](wide, width, step, step) for wide, width, step in zip(below, widths, steps, strict=True)
        ]
        self.rises = nn.ModuleList(rises)
        self.joins = nn.ModuleList([_convolutions(dims, 2 * width, width) for width in widths])
        self.seg_layers = nn.ModuleList([conv(width, num_classes, 1) for width in widths])
        self.apply(InitWeights_He(HE_SLOPE))

    def forward(self, image: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Logits from the image (B, C, *size) and maps of tokens (B, D, *grid), those of earlier blocks first."""
        outputs: list[torch.Tensor] = []
        sources, x = [image, *maps[:-1]], maps[-1]
        for scale in reversed(range(self.num_maps)):
            skip = self.skips[scale](sources[scale])
            x = self.joins[scale](torch.cat([self.rises[scale](x), skip], dim=1))
            if self.deep_supervision or scale == 0:
                outputs.insert(0, self.seg_layers[scale](x))
        return outputs if self.deep_supervision else outputs[0]


class MLPDecoder(nn.Module):
    """SegFormer's, for a transformer of one scale: each token by itself, then linear interpolation.

    Args:
        embed_dim: Width of a token.
        num_classes: Output channels.
        token_size: Voxels per axis of a token.
        deep_supervision: Whether the output comes in a list.
    """

    num_maps = MLP_MAPS

    def __init__(self, embed_dim: int, num_classes: int, token_size: Sequence[int], deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.token_size = tuple(token_size)
        dims = len(self.token_size)
        conv = convert_dim_to_conv_op(dims)
        finer = tuple(max(1, edge // MLP_STRIDE) for edge in self.token_size)
        self.norms = nn.ModuleList([nn.LayerNorm(embed_dim) for _ in range(MLP_MAPS)])
        self.fuse = nn.Linear(MLP_MAPS * embed_dim, MLP_WIDTH)  # of the maps' own projections and their fusion in one
        self.refine = TRANSPOSED[dims](MLP_WIDTH, MLP_FINE_WIDTH, finer, finer)
        self.seg_layers = nn.ModuleList([conv(MLP_FINE_WIDTH, num_classes, 1)])
        self.apply(InitWeights_He(HE_SLOPE))

    def forward(self, image: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Logits from maps of tokens (B, D, *grid); of the image (B, C, *size) only the size counts."""
        tokens = [norm(features.movedim(1, -1)) for norm, features in zip(self.norms, maps, strict=True)]
        joined = functional.gelu(self.fuse(torch.cat(tokens, dim=-1)).movedim(-1, 1))
        logits = self.seg_layers[0](functional.gelu(self.refine(joined)))
        output = functional.interpolate(logits, size=image.shape[2:], mode=INTERPOLATION[len(self.token_size)])
        return [output] if self.deep_supervision else output


def _convolutions(dims: int, inputs: int, outputs: int) -> nn.Module:
    """Convolutions of 3 voxels, each normalised and activated."""
    return StackedConvBlocks(
        CONVS_PER_SCALE,
        convert_dim_to_conv_op(dims),
        inputs,
        outputs,
        kernel_size=3,
        initial_stride=1,
        conv_bias=True,
        norm_op=NORMS[dims],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def _rise(dims: int, inputs: int, widths: Sequence[int], steps: Sequence[tuple[int, ...]]) -> nn.Module:
    """From the tokens up to the scale that the first step leads to."""
    layers: list[nn.Module] = []
    for width, step in zip(reversed(widths), reversed(steps), strict=True):
        layers += [TRANSPOSED[dims](inputs, width, step, step), NORMS[dims](width, affine=True), nn.LeakyReLU()]
        inputs = width
    return nn.Sequential(*layers)
