"""What goes into plans for fine-tuning: nnU-Net's keys, as a function of the checkpoint and the dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from nnssl_ext.core.random import seed_of
from nnssl_ext.finetuning.preprocessing_settings import NO_RESAMPLING_FUNCTION, Preprocessing, configuration_name
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.planners.primus import MIN_STRIDES, with_decoder, with_patch_size

BATCH_SIZES = {2: 12, 3: 2}
"""Default batch size by the number of dimensions: nnU-Net's reference values."""


def build_plans(
    pretrained: Pretrained,
    preprocessing: Preprocessing,
    fingerprint: Mapping[str, Any],
    patch_size: Sequence[int],
    batch_size: int | None,
    decoder: str | None = None,
) -> dict[str, Any]:
    """The part of nnU-Net's plans that does not depend on names.

    Args:
        pretrained: Gives the architecture.
        preprocessing: Gives spacing, axis order and normalisation.
        fingerprint: nnU-Net's, of the dataset.
        patch_size: Voxels per dimension of the network.
        batch_size: Samples a step; None for `BATCH_SIZES`.
        decoder: What a transformer's tokens become voxels by, one of `planners.primus.DECODERS`; None: Primus' own.

    Raises:
        ValueError: If the patch does not fit the network, or the network does not fit nnU-Net's trainer.
    """
    dims = len(pretrained.patch_size)
    architecture = pretrained.architecture
    if decoder is not None:
        architecture = with_decoder(architecture, decoder)
    check_patch_size(patch_size, architecture)
    check_rotary(patch_size, pretrained)
    order = list(preprocessing.transpose_forward)
    shapes = np.asarray(fingerprint["shapes_after_crop"], dtype=float)[:, order]
    spacings = np.asarray(fingerprint["spacings"], dtype=float)[:, order]
    configuration = {
        "data_identifier": preprocessing.identifier(),
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": BATCH_SIZES[dims] if batch_size is None else batch_size,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": _median_shape(shapes, spacings, preprocessing),
        "spacing": list(preprocessing.spacing),
        "normalization_schemes": list(preprocessing.normalization_schemes),
        "use_mask_for_norm": list(preprocessing.use_mask_for_norm),
        **preprocessing.resampling,
        "architecture": with_patch_size(architecture, patch_size),
        "batch_dice": dims == 2,
    }
    return {
        "original_median_spacing_after_transp": [float(value) for value in np.median(spacings, axis=0)],
        "original_median_shape_after_transp": [round(value) for value in np.median(shapes, axis=0)],
        "transpose_forward": order,
        "transpose_backward": list(preprocessing.transpose_backward),
        "experiment_planner_used": "nnssl_plan_finetuning",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": preprocessing.intensities,
        "configurations": {configuration_name(dims): configuration},
    }


def _median_shape(shapes: np.ndarray, spacings: np.ndarray, preprocessing: Preprocessing) -> list[float]:
    """Median shape in voxels after resampling, over the network's dimensions."""
    first = 3 - len(preprocessing.spacing)
    sizes = shapes[:, first:]
    if preprocessing.resampling["resampling_fn_data"] != NO_RESAMPLING_FUNCTION:
        sizes = np.round(sizes * spacings[:, first:] / np.asarray(preprocessing.spacing))
    return [float(value) for value in np.median(sizes, axis=0)]


def check_patch_size(patch_size: Sequence[int], architecture: Mapping[str, Any]) -> None:
    """Refuses a patch that the network cannot process, and a network that nnU-Net's trainer cannot train.

    Raises:
        ValueError: Names what the size must be divisible by, and the nearest size that fits.
    """
    strides = [tuple(stride) for stride in architecture["arch_kwargs"]["strides"]]
    if len(strides) < MIN_STRIDES:
        raise ValueError(
            f"the network has {len(strides)} stages; nnU-Net's deep supervision needs {MIN_STRIDES} or more"
        )
    if len(patch_size) != len(strides[0]):
        raise ValueError(f"patch size {tuple(patch_size)} does not fit a network of {len(strides[0])} dimensions")
    total = total_stride(architecture)
    if any(size < 1 or size % step for size, step in zip(patch_size, total, strict=True)):
        raise ValueError(
            f"patch size {tuple(patch_size)} must be divisible by {total} for this network: try "
            f"-patch_size {' '.join(map(str, _round_up(patch_size, total)))}"
        )
    if tuple(patch_size) == total:
        raise ValueError(f"patch size {tuple(patch_size)} leaves one voxel at the deepest stage; double one axis")


def check_rotary(patch_size: Sequence[int], pretrained: Pretrained) -> None:
    """Refuses another patch for a transformer whose tokens were rotated by rows of no grid (`finetuning.upstream`).

    Raises:
        ValueError: Names the only patch.
    """
    arguments = pretrained.architecture["arch_kwargs"]
    if not arguments.get("evamae_rotary"):
        return
    token = arguments["patch_embed_size"]
    learned = [size * edge for size, edge in zip(pretrained.position_grid, token, strict=True)]
    if list(patch_size) != learned:
        raise ValueError(
            f"patch size {tuple(patch_size)} is not possible: upstream's masked autoencoder mixed up the rotary "
            "positions of a patch whose first two edges differ, so that they mean something on that patch alone. Use "
            f"-patch_size {' '.join(map(str, learned))}"
        )


def total_stride(architecture: Mapping[str, Any]) -> tuple[int, ...]:
    """Voxels of the input per position of the deepest stage, per axis."""
    return tuple(prod(axis) for axis in zip(*architecture["arch_kwargs"]["strides"], strict=True))


def _round_up(sizes: Sequence[float], steps: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(1, -(-int(size) // step)) * step for size, step in zip(sizes, steps, strict=True))


def smaller_patch(configuration: Mapping[str, Any]) -> tuple[int, ...] | None:
    """A patch that still covers the median image, where the planned one is mostly padding; else None.

    Args:
        configuration: A configuration of `build_plans`.
    """
    patch, median = configuration["patch_size"], configuration["median_image_size_in_voxels"]
    needed = _round_up(np.ceil(median), total_stride(configuration["architecture"]))
    if prod(needed) * 2 > prod(patch):
        return None
    return tuple(min(size, own) for size, own in zip(needed, patch, strict=True))


def build_finetuning_network(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> Any:
    """The network as nnU-Net builds it from plans with one configuration, initialised from a fixed seed."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    (configuration,) = plans["configurations"].values()
    labels = PlansManager(dict(plans)).get_label_manager(dict(dataset_json))
    architecture = configuration["architecture"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("fresh weights"))
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            len(configuration["normalization_schemes"]),
            labels.num_segmentation_heads,
            deep_supervision=True,
        )
