"""The planner's rules as pure functions: memory of a pretraining step, topology, patch size and batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from nnssl_ext.planners.architecture import Topology, measure_unet

GIBIBYTE = 2**30
MIXED_PRECISION_BYTES = 2
FULL_PRECISION_BYTES = 4
PARAMETER_BYTES = 4
OPTIMIZER_SLOTS = 2
TRANSIENT_MAPS = 4
USABLE_SHARE = 0.9
MIN_BATCH_SIZE = 2
MIN_FEATURE_MAP = 4
MIN_STAGES = 3
NO_LIMIT = 999999
DATASET_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one training step of a trainer holds in memory, beyond the network's own size."""

    views: float = 1.0
    """Patch-sized forward passes whose activations are kept for the gradient; half a patch counts .5."""
    copies: int = 1
    """Copies of the weights on the device: 1 for the network alone, 2 with a teacher."""
    decoder: bool = True
    """Whether the step runs the decoder."""

    def __post_init__(self) -> None:
        if self.views <= 0 or self.copies < 1:
            raise ValueError(f"a step has more than 0 views and at least 1 copy, not {self.views} and {self.copies}")


def estimate_memory(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    batch_size: int,
    cost: StepCost,
    *,
    num_channels: int = 1,
    bytes_per_value: int = MIXED_PRECISION_BYTES,
) -> float:
    """Device memory that one pretraining step needs at its peak, in GiB.

    Four parts, each a count times its bytes:

    - activations kept for the gradient: per convolution its output and the normalised one (the activation works in
      place), per decoder stage the concatenation of skip and upsampled features; for each view and sample;
    - what lives for a moment in the backward pass: `TRANSIENT_MAPS` maps of the largest size, per sample;
    - parameters in fp32: weights, gradients and two optimiser slots (AdamW; SGD has one);
    - one more set of weights for each further copy (a teacher).

    Not counted: the device's context and the allocator's waste, for which planning leaves `1 - USABLE_SHARE` free.
    Published for ResEnc L, MAE, bf16, 192³, batch 2, SGD on an H200: 18.3 GiB; this gives 18.6.

    Args:
        architecture: nnU-Net's `architecture` block of a residual-encoder U-Net.
        patch_size: Voxels per axis.
        batch_size: Samples per step and device.
        cost: Of the trainer's step.
        num_channels: Input channels, which the network also puts out.
        bytes_per_value: Of an activation: 2 under autocast, 4 without.

    Raises:
        ValueError: If the architecture is not known.
    """
    size = measure_unet(architecture, patch_size, num_channels, num_channels)
    parameters, kept = size.encoder_parameters, size.encoder_values
    if cost.decoder:
        parameters, kept = parameters + size.decoder_parameters, kept + size.decoder_values
    values = batch_size * (cost.views * kept + TRANSIENT_MAPS * size.largest_map)
    weights = parameters * (1 + OPTIMIZER_SLOTS + cost.copies)
    return (values * bytes_per_value + weights * PARAMETER_BYTES) / GIBIBYTE
