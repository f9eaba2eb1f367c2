"""The convolutional backbones: nnU-Net's residual and plain U-Nets, built as the plan says.

The networks are those of dynamic_network_architectures, made by nnU-Net's own function, so what is pretrained here is
what nnU-Net fine-tunes, weight for weight and name for name.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_ext.models.encoder import Encoder
from nnssl_ext.planners.plan import Configuration

UNET_CLASSES = ("ResidualEncoderUNet", "PlainConvUNet")
EXPORT_SEED = 0
"""Seed of the freshly initialised parts of an exported network: the same ones every time."""


class UNetEncoder(Encoder):
    """The encoder of one of nnU-Net's U-Nets."""

    kind = "cnn"

    def __init__(self, network: Any) -> None:
        """Takes the encoder out of a network, which keeps sharing it.

        Args:
            network: A U-Net of dynamic_network_architectures.
        """
        super().__init__()
        self.module: nn.Module = network.encoder
        self.channels = tuple(network.encoder.output_channels)
        self.strides = tuple(accumulate((tuple(stride) for stride in network.encoder.strides), _multiply))
        self.stem_key = network.key_to_stem
        self.stages_key = network.key_to_encoder
        self.in_proj_keys = tuple(network.keys_to_in_proj)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The skip connections, full resolution first; see `Encoder.feature_maps`."""
        return self.module(x)

    def hand_over(self, network: Any) -> None:
        """See `Encoder.hand_over`."""
        network.encoder.load_state_dict(self.module.state_dict(), assign=True)


def _multiply(total: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(total, step, strict=True))


def build_network(configuration: Configuration, num_outputs: int) -> Any:
    """The plan's segmentation network as nnU-Net builds and initialises it, without deep supervision.

    Args:
        configuration: Holds the architecture and the number of input channels.
        num_outputs: Output channels.
    """
    architecture = configuration.architecture
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        configuration.num_input_channels,
        num_outputs,
        deep_supervision=False,
    )


def build_unet(configuration: Configuration, num_outputs: int) -> tuple[UNetEncoder, nn.Module]:
    """The plan's U-Net in two parts, to be run as `decoder(encoder(x))`.

    The decoder's output layers at lower scales, which only deep supervision uses, are frozen: no loss reaches them.

    Args:
        configuration: Holds the architecture, the number of input channels and the patch size.
        num_outputs: Output channels of the decoder.

    Returns:
        The encoder and the decoder.

    Raises:
        ValueError: Where the architecture is no U-Net, or the patch is not divisible by its strides.
    """
    name = configuration.architecture["network_class_name"]
    if name.split(".")[-1] not in UNET_CLASSES:
        raise ValueError(
            f"this method runs on {' and '.join(UNET_CLASSES)}, not on {name}. "
            "Plan a convolutional network with: nnssl_plan_experiment -d DATASET -pl nnsslPlanner"
        )
    network = build_network(configuration, num_outputs)
    encoder = UNetEncoder(network)
    check_divisible(configuration.patch_size, encoder.strides[-1])
    for head in network.decoder.seg_layers[:-1]:
        head.requires_grad_(False)
    return encoder, network.decoder


def check_divisible(patch_size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Refuses a patch that the network cannot halve all the way down.

    Raises:
        ValueError: Names the nearest larger patch that fits.
    """
    if any(size % step for size, step in zip(patch_size, stride, strict=True)):
        fitting = tuple(-(-size // step) * step for size, step in zip(patch_size, stride, strict=True))
        raise ValueError(
            f"patch_size {patch_size} is not divisible by the network's strides {stride}. "
            f"Set patch_size to {fitting} in the plans, or plan anew with: nnssl_plan_experiment -d DATASET"
        )


def export_unet(configuration: Configuration, encoder: Encoder, decoder: nn.Module | None = None) -> nn.Module:
    """The plan's whole network in nnU-Net's key names.

    Args:
        configuration: What the encoder was built from.
        encoder: The trained encoder; the network shares its memory.
        decoder: The trained decoder where there is one (then nothing is initialised in vain), else a fresh one is made,
            the same every time, with as many outputs as input channels.

    Returns:
        The network in eval mode, on the encoder's device.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if decoder is None else "meta"):
        torch.manual_seed(EXPORT_SEED)
        network = build_network(configuration, _num_outputs(decoder) or configuration.num_input_channels)
    if decoder is None:
        network.to(next(encoder.parameters()).device)
    encoder.hand_over(network)
    if decoder is not None:
        network.decoder.load_state_dict(decoder.state_dict(), assign=True)
    network.eval()
    return network


def _num_outputs(decoder: Any) -> int | None:
    return None if decoder is None else decoder.seg_layers[-1].out_channels
