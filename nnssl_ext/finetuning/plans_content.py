"""What goes into plans for fine-tuning: nnU-Net's keys, as a function of the checkpoint and the dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from nnssl_ext.core.random import seed_of
from nnssl_ext.finetuning.preprocessing_settings import NO_RESAMPLING_FUNCTION, Preprocessing, configuration_name
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.planners.primus import with_patch_size

BATCH_SIZES = {2: 12, 3: 2}
"""Default batch size by the number of dimensions: nnU-Net's reference values."""
MIN_STAGES = 3
"""With two stages nnU-Net's deep supervision has no weight left and its loss is NaN."""


def build_plans(
    pretrained: Pretrained,
    preprocessing: Preprocessing,
    fingerprint: Mapping[str, Any],
    patch_size: Sequence[int],
    batch_size: int | None,
) -> dict[str, Any]:
    """The part of nnU-Net's plans that does not depend on names.

    Args:
        pretrained: Gives the architecture.
        preprocessing: Gives spacing, axis order and normalisation.
        fingerprint: nnU-Net's, of the dataset.
        patch_size: Voxels per dimension of the network.
        batch_size: Samples a step; None for `BATCH_SIZES`.

    Raises:
        ValueError: If the patch does not fit the network, or the network does not fit nnU-Net's trainer.
    """
    dims = len(pretrained.patch_size)
    check_patch_size(patch_size, pretrained.architecture)
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
        "architecture": with_patch_size(pretrained.architecture, patch_size),
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
    if len(strides) < MIN_STAGES:
        raise ValueError(
            f"the network has {len(strides)} stages; nnU-Net's deep supervision needs {MIN_STAGES} or more"
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
