"""The residual-encoder U-Net as nnU-Net's plans describe it: building the block, counting parameters and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

RESENC_CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
KEYS_TO_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")

Shape = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Depth and shape of a U-Net for one patch size, by nnU-Net's rules."""

    patch_size: tuple[int, ...]
    """Voxels, divisible by the product of the strides."""
    strides: tuple[tuple[int, ...], ...]
    """Of each stage, the first all ones."""
    kernel_sizes: tuple[tuple[int, ...], ...]
    """Of each stage."""
    divisor: tuple[int, ...]
    """What the patch is divisible by, per axis."""


def resenc_architecture(
    topology: Topology, *, base_features: int, max_features: int, blocks: Sequence[int]
) -> dict[str, Any]:
    """nnU-Net's `architecture` block of a residual-encoder U-Net.

    Args:
        topology: Strides and kernels of the stages.
        base_features: Width of the first stage; each further stage doubles it.
        max_features: Greatest width.
        blocks: Residual blocks of each stage; the last entry serves all deeper stages.
    """
    num_stages, dims = len(topology.strides), len(topology.patch_size)
    return {
        "network_class_name": RESENC_CLASS,
        "arch_kwargs": {
            "n_stages": num_stages,
            "features_per_stage": [min(max_features, base_features * 2**stage) for stage in range(num_stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [list(kernel) for kernel in topology.kernel_sizes],
            "strides": [list(stride) for stride in topology.strides],
            "n_blocks_per_stage": [blocks[min(stage, len(blocks) - 1)] for stage in range(num_stages)],
            "n_conv_per_stage_decoder": [1] * (num_stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": list(KEYS_TO_IMPORT),
    }


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a network holds: parameters, and feature-map values kept per sample for the gradient."""

    encoder_parameters: int
    """Of stem and stages."""
    decoder_parameters: int
    """Of upsampling, convolutions and all output layers."""
    encoder_values: int
    """Kept by the encoder: the output of every convolution, and the normalised one that follows it."""
    decoder_values: int
    """Kept by the decoder: the same, and the concatenation of skip and upsampled features."""
    largest_map: int
    """Values of the largest single feature map."""


def measure_unet(architecture: Mapping[str, Any], patch_size: Shape, num_channels: int, num_outputs: int) -> Size:
    """Counts parameters and kept feature-map values of a residual-encoder U-Net without building it.

    Args:
        architecture: nnU-Net's `architecture` block.
        patch_size: Voxels per axis.
        num_channels: Input channels.
        num_outputs: Output channels.
    """
    arch = architecture["arch_kwargs"]
    sizes = _stage_sizes(arch["strides"], patch_size)
    encoder_parameters, encoder_values = _measure_encoder(arch, sizes, num_channels)
    decoder_parameters, decoder_values = _measure_decoder(arch, sizes, num_outputs)
    return Size(
        encoder_parameters=encoder_parameters,
        decoder_parameters=decoder_parameters,
        encoder_values=encoder_values,
        decoder_values=decoder_values,
        largest_map=max(width * voxels for width, voxels in zip(arch["features_per_stage"], sizes, strict=True)),
    )


def _stage_sizes(strides: Sequence[Shape], patch_size: Shape) -> list[int]:
    shape, sizes = tuple(patch_size), []
    for stride in strides:
        shape = tuple(size // step for size, step in zip(shape, stride, strict=True))
        sizes.append(prod(shape))
    return sizes


def _conv(kernel: Shape, inputs: int, outputs: int, *, bias: bool = True, norm: bool = True) -> int:
    return prod(kernel) * inputs * outputs + outputs * (int(bias) + 2 * int(norm))


def _measure_encoder(arch: Mapping[str, Any], sizes: Sequence[int], num_channels: int) -> tuple[int, int]:
    inputs = arch["features_per_stage"][0]
    parameters = _conv(arch["kernel_sizes"][0], num_channels, inputs)
    values = 2 * inputs * sizes[0]
    stages = zip(
        arch["strides"],
        arch["features_per_stage"],
        arch["kernel_sizes"],
        arch["n_blocks_per_stage"],
        sizes,
        strict=True,
    )
    for stride, width, kernel, blocks, voxels in stages:
        parameters += _conv(kernel, inputs, width) + (2 * blocks - 1) * _conv(kernel, width, width)
        values += 4 * blocks * width * voxels
        if inputs != width:  # a 1x1 convolution on the block's bypass; the sum takes its normalised output
            parameters += _conv((1,), inputs, width, bias=False)
            values += width * voxels
            values += inputs * voxels if prod(stride) > 1 else 0
        inputs = width
    return parameters, values


def _measure_decoder(arch: Mapping[str, Any], sizes: Sequence[int], num_outputs: int) -> tuple[int, int]:
    features, kernels, repeats = arch["features_per_stage"], arch["kernel_sizes"], arch["n_conv_per_stage_decoder"]
    parameters = values = 0
    for stage in range(len(features) - 1):
        width, below, convs = features[stage], features[stage + 1], repeats[len(features) - 2 - stage]
        parameters += prod(arch["strides"][stage + 1]) * below * width + width
        parameters += _conv(kernels[stage], 2 * width, width) + (convs - 1) * _conv(kernels[stage], width, width)
        parameters += width * num_outputs + num_outputs
        values += (2 + 2 * convs) * width * sizes[stage]
    return parameters, values
