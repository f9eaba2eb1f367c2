"""The planner's rules as pure functions: memory of a pretraining step, topology, patch size and batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from nnssl_ext.core.checks import above_zero, at_least, within
from nnssl_ext.planners.architecture import RESENC_CLASS, Size, Topology, measure_unet
from nnssl_ext.planners.primus import PRIMUS_CLASS, measure_primus

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
MIN_PATCH_EDGE = {2: 64, 3: 32}
MAX_PADDED = 1.5
NO_LIMIT = 999999
DATASET_SHARE = 0.05
MEASURES: Mapping[str, Callable[..., Size]] = {RESENC_CLASS: measure_unet, PRIMUS_CLASS: measure_primus}
"""How the networks are measured whose memory can be estimated, by class name."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one training step of a trainer holds in memory, beyond the network's own size."""

    views: float = 1.0
    """Patch-sized forward passes whose activations are kept for the gradient; half a patch counts .5."""
    copies: int = 1
    """Copies of the weights on the device: 1 for the network alone, 2 with a teacher."""
    decoder: bool = True
    """Whether the step runs the decoder."""
    tokens: float = 1.0
    """Share of its tokens that a transformer's encoder sees, in (0, 1]; a U-Net sees every voxel."""

    def __post_init__(self) -> None:
        within(self, "(0, 1]", "tokens")
        above_zero(self, "views")
        at_least(self, copies=1)


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

    - activations kept for the gradient, for each view and sample. In a U-Net: per convolution its output and the
      normalised one (the activation works in place), per decoder stage the concatenation of skip and upsampled
      features. In a transformer: what each block keeps of the tokens it sees (see `measure_primus`);
    - what lives for a moment in the backward pass: `TRANSIENT_MAPS` maps of the largest size, per sample;
    - parameters in fp32: weights, gradients and two optimiser slots (AdamW; SGD has one);
    - one more set of weights for each further copy (a teacher).

    Not counted: the device's context and the allocator's waste, for which planning leaves `1 - USABLE_SHARE` free.
    Published for ResEnc L, MAE, bf16, 192³, batch 2, SGD on an H200: 18.3 GiB; this gives 18.6.

    Args:
        architecture: nnU-Net's `architecture` block of a residual-encoder U-Net or of Primus.
        patch_size: Voxels per axis.
        batch_size: Samples per step and device.
        cost: Of the trainer's step.
        num_channels: Input channels, which the network also puts out.
        bytes_per_value: Of an activation: 2 under autocast, 4 without.

    Raises:
        ValueError: If the architecture is not known.
    """
    name = architecture["network_class_name"]
    if name not in MEASURES:
        raise ValueError(
            f"the size of {name} is not known, only that of {' and '.join(MEASURES)}. Set batch and patch size in the "
            "plans by hand"
        )
    size = MEASURES[name](architecture, patch_size, num_channels, num_channels)
    seen = cost.tokens if name == PRIMUS_CLASS else 1.0
    parameters, kept = size.encoder_parameters, seen * size.encoder_values
    if cost.decoder:
        parameters, kept = parameters + size.decoder_parameters, kept + size.decoder_values
    values = batch_size * (cost.views * kept + TRANSIENT_MAPS * size.largest_map)
    weights = parameters * (1 + OPTIMIZER_SLOTS + cost.copies)
    return (values * bytes_per_value + weights * PARAMETER_BYTES) / GIBIBYTE


def topology(spacing: Sequence[float], patch_size: Sequence[int]) -> Topology:
    """nnU-Net's topology for a patch: axes are pooled while they are at least 8 voxels and of similar spacing.

    Args:
        spacing: mm per axis.
        patch_size: Voxels per axis; the result's patch is padded up to what the strides divide.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, patch, divisor = get_pool_and_conv_props(spacing, patch_size, MIN_FEATURE_MAP, NO_LIMIT)
    return Topology(
        patch_size=tuple(int(size) for size in patch),
        strides=tuple(tuple(int(step) for step in stride) for stride in strides),
        kernel_sizes=tuple(tuple(int(size) for size in kernel) for kernel in kernels),
        divisor=tuple(int(step) for step in divisor),
    )


def largest_patch(spacing: Sequence[float], median_shape: Sequence[float], max_voxels: float) -> tuple[int, ...]:
    """The patch of equal physical extent on all axes that covers the median case or holds `max_voxels`.

    What an axis shorter than that extent leaves over goes to the longer ones.

    Args:
        spacing: mm per axis.
        median_shape: Voxels of the median case per axis.
        max_voxels: Most voxels of a patch.
    """
    if prod(median_shape) <= max_voxels:
        return tuple(max(1, round(size)) for size in median_shape)
    free, patch = set(range(len(spacing))), [float(size) for size in median_shape]
    while free:
        left = max_voxels / prod(size for axis, size in enumerate(patch) if axis not in free)
        extent = (left * prod(spacing[axis] for axis in free)) ** (1 / len(free))
        short = {axis for axis in free if median_shape[axis] * spacing[axis] <= extent}
        if not short:
            for axis in free:
                patch[axis] = extent / spacing[axis]
            break
        free -= short
    return tuple(max(1, round(size)) for size in patch)


def patch_candidates(
    spacing: Sequence[float],
    median_shape: Sequence[float],
    max_voxels: float,
    topology: Callable[[Sequence[float], Sequence[int]], Topology] = topology,
) -> Iterator[Topology]:
    """Patches from the largest downwards, each with its topology; each has fewer voxels than the one before.

    As in nnU-Net the axis that covers most of the median case shrinks first, by the least step that the topology of the
    smaller patch divides. None but the first has fewer voxels than a cube of 32 (a square of 64). All have three stages
    or more, which nnU-Net's deep supervision needs: where the images are smaller than that, the patch is larger.

    Args:
        spacing: mm per axis.
        median_shape: Voxels of the median case per axis.
        max_voxels: Most voxels of a patch; one that covers the median case may instead be half as large again as it.
        topology: Of a patch for a spacing; a transformer's is `token_topology`.
    """
    dims, patch, floor = len(spacing), largest_patch(spacing, median_shape, max_voxels), 1
    current = topology(spacing, patch)
    while len(current.strides) < MIN_STAGES:
        floor *= 2
        current = topology(spacing, [max(floor, size) for size in patch])
    first, least = current, MIN_PATCH_EDGE[dims] ** dims
    covers = prod(median_shape) <= max_voxels
    limit = MAX_PADDED * prod(median_shape) if covers else max_voxels
    found = False
    for _ in range(sum(first.patch_size)):  # each step takes a voxel or more off an edge
        if prod(current.patch_size) <= limit and len(current.strides) >= MIN_STAGES:
            found, limit = True, prod(current.patch_size) - 1
            yield current
        current = _shrink(spacing, median_shape, current, topology)
        if prod(current.patch_size) < least:
            break
    if not found:
        yield first


def _shrink(
    spacing: Sequence[float],
    median_shape: Sequence[float],
    current: Topology,
    topology: Callable[[Sequence[float], Sequence[int]], Topology],
) -> Topology:
    covered = [size / whole for size, whole in zip(current.patch_size, median_shape, strict=True)]
    axis = covered.index(max(covered))
    smaller = list(current.patch_size)
    smaller[axis] -= current.divisor[axis]
    smaller[axis] = current.patch_size[axis] - topology(spacing, smaller).divisor[axis]
    return topology(spacing, smaller)


def choose_patch(
    candidates: Iterator[Topology],
    memory: Callable[[Topology, int], float],
    memory_target: float,
    max_batch_size: Callable[[Topology], int],
) -> tuple[Topology, int]:
    """The largest patch that fits with a batch of two, and the batch size.

    The batch grows beyond two only for the largest candidate, so more memory never gives fewer voxels per step.

    Args:
        candidates: Patches, largest first.
        memory: GiB for a patch and a batch size; affine in the batch size.
        memory_target: GiB of the device; a tenth of it stays free.
        max_batch_size: Most samples that make sense for a patch.

    Raises:
        ValueError: If not even the smallest patch fits.
    """
    usable, largest, need = USABLE_SHARE * memory_target, True, 0.0
    for candidate in candidates:
        need = memory(candidate, MIN_BATCH_SIZE)
        if need <= usable:
            each = need / MIN_BATCH_SIZE - memory(candidate, 0) / MIN_BATCH_SIZE
            room = MIN_BATCH_SIZE + int((usable - need) / each)
            batch = min(room, max_batch_size(candidate)) if largest else MIN_BATCH_SIZE
            return candidate, max(MIN_BATCH_SIZE, batch)
        largest = False
    raise ValueError(
        f"a memory target of {memory_target:g} GB is too small: the smallest patch with batch {MIN_BATCH_SIZE} needs "
        f"{need / USABLE_SHARE:.1f}. Give -gpu_memory_target more, or a smaller network, for example: "
        "-pl nnsslPlannerResEncXS"
    )
