"""Labelled cases for frozen features: image and label map of a raw dataset, prepared as a pretraining's plans say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.imageio import read_image, read_segmentation_of
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.preprocessing.case import preprocess_array
from nnssl_ext.preprocessing.labels import resample_labels

IGNORE = "ignore"
"""nnU-Net's name of the label that is neither learned nor scored."""


@dataclass(frozen=True)
class LabelledCase:
    """A prepared volume with its labels."""

    case_id: str
    data: torch.Tensor
    """(C, Z, Y, X), float32, normalised and resampled."""
    labels: torch.Tensor
    """(Z, Y, X), int64: 0 background, -1 where nothing is known."""


def read_labelled(
    manifest: Manifest, case_ids: Sequence[str], plan: Plan, configuration: Configuration
) -> list[LabelledCase]:
    """Reads, transposes, crops, normalises and resamples cases and, in the same way, their labels.

    The store keeps no labels, and a checkpoint carries the plans that its images were prepared with, so the raw dataset
    is all it takes, whatever it was preprocessed for.

    Args:
        manifest: The raw dataset.
        case_ids: Which cases.
        plan: Of the pretraining.
        configuration: Of that plan.

    Raises:
        FileNotFoundError: If a case has no label, or a file is missing.
        ValueError: If a case is unknown, or image and label differ in shape or place.
    """
    return [_read(manifest, case_id, plan, configuration) for case_id in case_ids]


def _read(manifest: Manifest, case_id: str, plan: Plan, configuration: Configuration) -> LabelledCase:
    case = manifest.case(case_id)
    if case.label is None:
        raise FileNotFoundError(f"{manifest.dataset_name}: case {case_id} has no label, which a probe needs")
    image, geometry = read_image(case.images)
    labels = read_segmentation_of(case.label, image.shape[1:], geometry)
    prepared = preprocess_array(image, geometry.spacing, plan, configuration)
    axes = configuration.transpose_forward
    box = tuple(slice(*side) for side in prepared.properties["bbox_used_for_cropping"])
    cropped = np.transpose(labels, axes)[box].astype(np.int16)
    ignored = (manifest.labels or {}).get(IGNORE)
    if ignored is not None:
        cropped = np.where(cropped == ignored, -1, cropped)
    if cropped.shape != prepared.data.shape[1:]:
        old_spacing = [geometry.spacing[axis] for axis in axes]
        kwargs = configuration.resampling_fn_seg_kwargs
        cropped = resample_labels(cropped[None], prepared.data.shape[1:], old_spacing, prepared.spacing, **kwargs)[0]
    return LabelledCase(case_id, torch.from_numpy(prepared.data), torch.from_numpy(cropped.astype(np.int64)))
