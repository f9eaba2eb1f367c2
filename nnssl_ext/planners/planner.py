"""The planner: from a fingerprint and an amount of memory to a plan. A preset is a subclass with other numbers."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nnssl_ext.core.records import read_json, to_dict, write_json
from nnssl_ext.core.registry import Registry
from nnssl_ext.dataset.manifest import DATASET_FILE, Manifest, write_dataset_json
from nnssl_ext.fingerprint.record import Fingerprint
from nnssl_ext.imageio import reader_name_for
from nnssl_ext.planners.architecture import Topology, resenc_architecture
from nnssl_ext.planners.plan import Plan
from nnssl_ext.planners.rules import (
    DATASET_SHARE,
    MIXED_PRECISION_BYTES,
    StepCost,
    choose_patch,
    estimate_memory,
    patch_candidates,
    topology,
)
from nnssl_ext.planners.spacing import (
    check_spacing_rule,
    is_two_dimensional,
    resampled_shapes,
    resampling_keys,
    target_spacing,
    transposition,
)

logger = logging.getLogger(__name__)

DEFAULT_PLANS_NAME = "nnsslPlans"
NORMALIZATIONS = ("auto", "zscore", "ct", "rescale", "none", "percentile")
CROP_RATIO_FOR_MASK = 0.75


@dataclass(frozen=True, kw_only=True)
class PlanningOptions:
    """What the user decides; all else follows from the data."""

    memory_target: float | None = None
    """GB of the device that one training step may fill; None takes the planner's own default."""
    spacing: str | tuple[float, ...] = "iso"
    """`iso`, `median`, `noresample`, or mm per axis (z, y, x)."""
    cost: StepCost = field(default_factory=StepCost)
    """Of the trainer that the plan is for; the default is MAE's."""
    bytes_per_value: int = MIXED_PRECISION_BYTES
    """Of an activation: 2 under autocast, 4 without."""
    normalization: str = "auto"
    """`auto` goes by the channels' names as nnU-Net does; `percentile` cannot be reproduced by stock nnU-Net."""
    plans_name: str = DEFAULT_PLANS_NAME
    """Name of the plans, their file and the folder of the preprocessed data."""

    def __post_init__(self) -> None:
        if self.memory_target is not None and self.memory_target <= 0:
            raise ValueError(f"a memory target of {self.memory_target:g} GB is not possible; give a number above 0")
        if not re.fullmatch(r"[\w.-]+", self.plans_name):
            raise ValueError(f"plans name {self.plans_name!r} is not possible: use letters, digits, '_', '-' and '.'")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization {self.normalization!r} is not known. Give {', '.join(NORMALIZATIONS)}")
        check_spacing_rule(self.spacing)


class nnsslPlanner:  # noqa: N801 - nnU-Net's naming of planners
    """The full ResEnc U-Net with the largest patch, up to nnU-Net's start of 256³, that the memory allows."""

    base_features: ClassVar[int] = 32
    """Width of the first stage."""
    blocks: ClassVar[tuple[int, ...]] = (1, 3, 4, 6, 6, 6)
    """Residual blocks per stage; the last entry serves all deeper stages."""
    max_features: ClassVar[dict[int, int]] = {2: 512, 3: 320}
    """Greatest width, by the number of dimensions; nnU-Net's."""
    max_edge: ClassVar[dict[int, int]] = {2: 2048, 3: 256}
    """The patch has at most as many voxels as a cube (square) of this edge; nnU-Net's starting values."""
    default_memory: ClassVar[float] = 8.0
    """GB assumed where neither a target is given nor a device is found; nnU-Net's default."""

    def __init__(self, options: PlanningOptions) -> None:
        self.options = options
        self.memory_target = options.memory_target or self.default_memory

    def plan(self, fingerprint: Fingerprint, manifest: Manifest) -> Plan:
        """Plans a dataset: `3d_fullres` for volumes, `2d` for single slices.

        Raises:
            ValueError: If there is no case, the spacing rule is unknown, or the memory does not suffice.
        """
        cases = list(fingerprint.cases.values())
        if not cases:
            raise ValueError(f"{fingerprint.dataset_name} has no readable case to plan from. See its fingerprint")
        shapes = np.array([case.shape_after_crop for case in cases])
        spacings = np.array([case.spacing for case in cases])
        spacing = target_spacing(self.options.spacing, spacings, shapes)
        flat = is_two_dimensional(shapes)
        forward, backward = transposition((inf, *spacing[1:]) if flat else spacing)
        kept = self.options.spacing == "noresample"
        median_shape = np.median(shapes if kept else resampled_shapes(shapes, spacings, spacing), axis=0)
        name, axes = ("2d", forward[1:]) if flat else ("3d_fullres", forward)
        configuration = self._configuration(
            name, [spacing[axis] for axis in axes], [float(median_shape[axis]) for axis in axes], fingerprint, manifest
        )
        return Plan(
            {
                "dataset_name": fingerprint.dataset_name,
                "plans_name": self.options.plans_name,
                "original_median_spacing_after_transp": np.median(spacings, axis=0)[list(forward)].tolist(),
                "original_median_shape_after_transp": np.rint(np.median(shapes, axis=0))
                .astype(int)[list(forward)]
                .tolist(),
                "image_reader_writer": reader_name_for(manifest.file_ending, manifest.cases[0].images[0]),
                "transpose_forward": list(forward),
                "transpose_backward": list(backward),
                "configurations": {name: configuration},
                "experiment_planner_used": type(self).__name__,
                "label_manager": "LabelManager",
                "foreground_intensity_properties_per_channel": {
                    channel: to_dict(values)
                    for channel, values in fingerprint.foreground_intensity_properties_per_channel.items()
                },
                "nnssl_planning": self._provenance(fingerprint, configuration),
            }
        )

    def _configuration(
        self,
        name: str,
        spacing: Sequence[float],
        median_shape: Sequence[float],
        fingerprint: Fingerprint,
        manifest: Manifest,
    ) -> dict[str, Any]:
        schemes = [self._normalization(channel) for channel in manifest.channel_names]
        chosen, batch_size = self._patch_and_batch(spacing, median_shape, len(fingerprint.cases), len(schemes))
        masked = fingerprint.median_relative_size_after_cropping < CROP_RATIO_FOR_MASK
        return {
            "data_identifier": f"{self.options.plans_name}_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": batch_size,
            "patch_size": list(chosen.patch_size),
            "median_image_size_in_voxels": list(median_shape),
            "spacing": list(spacing),
            "normalization_schemes": schemes,
            "use_mask_for_norm": [masked and scheme == "ZScoreNormalization" for scheme in schemes],
            **resampling_keys(self.options.spacing == "noresample"),
            "architecture": self.architecture(chosen),
            "batch_dice": name == "2d",
        }

    def architecture(self, topology: Topology) -> dict[str, Any]:
        """nnU-Net's `architecture` block for a topology."""
        return resenc_architecture(
            topology,
            base_features=self.base_features,
            max_features=self.max_features[len(topology.patch_size)],
            blocks=self.blocks,
        )

    def topology(self, spacing: Sequence[float], patch_size: Sequence[int]) -> Topology:
        """What the network asks of a patch: its strides, and the patch padded up to what they divide."""
        return topology(spacing, patch_size)

    def _patch_and_batch(
        self, spacing: Sequence[float], median_shape: Sequence[float], num_cases: int, num_channels: int
    ) -> tuple[Topology, int]:
        dims = len(spacing)

        def memory(candidate: Topology, batch_size: int) -> float:
            return self._memory(self.architecture(candidate), candidate.patch_size, batch_size, num_channels)

        def max_batch_size(candidate: Topology) -> int:
            return round(DATASET_SHARE * num_cases * prod(median_shape) / prod(candidate.patch_size))

        candidates = patch_candidates(spacing, median_shape, self.max_edge[dims] ** dims, self.topology)
        return choose_patch(candidates, memory, self.memory_target, max_batch_size)

    def _memory(
        self, architecture: dict[str, Any], patch_size: Sequence[int], batch_size: int, num_channels: int
    ) -> float:
        options = self.options
        return estimate_memory(
            architecture,
            patch_size,
            batch_size,
            options.cost,
            num_channels=num_channels,
            bytes_per_value=options.bytes_per_value,
        )

    def _normalization(self, channel: str) -> str:
        from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

        names = {
            "zscore": "ZScoreNormalization",
            "ct": "CTNormalization",
            "rescale": "RescaleTo01Normalization",
            "none": "NoNormalization",
            "percentile": "PercentileNormalization",
        }
        return names.get(self.options.normalization) or get_normalization_scheme(channel).__name__

    def _provenance(self, fingerprint: Fingerprint, configuration: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        channels = len(configuration["normalization_schemes"])
        batch_size = configuration["batch_size"]
        need = self._memory(configuration["architecture"], configuration["patch_size"], batch_size, channels)
        return {
            "spacing_rule": options.spacing if isinstance(options.spacing, str) else list(options.spacing),
            "memory_target_gb": self.memory_target,
            "estimated_memory_gb": round(need, 2),
            "bytes_per_value": options.bytes_per_value,
            "step_cost": to_dict(options.cost),
            "foreground_rule": fingerprint.foreground_rule,
            "num_cases": len(fingerprint.cases),
        }


def save_plan(plan: Plan, manifest: Manifest, folder: Path) -> Path:
    """Writes the plans and, as nnU-Net does, `dataset.json` beside them.

    Configurations of the user's own in plans of that name that are there already are kept. Where others of the plans'
    differ, perhaps edited by hand, the former file is kept as `NAME.json.old`.

    Args:
        plan: Just made.
        manifest: Of the dataset.
        folder: `$nnssl_preprocessed/DatasetXXX_Name`.

    Returns:
        Path of the plans file.
    """
    path = folder / f"{plan.plans_name}.json"
    if path.is_file():
        earlier = Plan.load(path).raw["configurations"]
        own = {name: values for name, values in earlier.items() if values.get("inherits_from")}
        plan = Plan({**plan.raw, "configurations": {**own, **plan.raw["configurations"]}})
        if plan.raw["configurations"] != earlier:
            former = path.with_name(f"{path.name}.old")
            shutil.copyfile(path, former)
            logger.warning("%s held other plans, now in %s", path, former.name)
    description = manifest.folder / DATASET_FILE
    if description.is_file():
        write_json(folder / DATASET_FILE, read_json(description))
    else:
        write_dataset_json(
            folder,
            channel_names=manifest.channel_names,
            file_ending=manifest.file_ending,
            num_cases=len(manifest.cases),
            labels=manifest.labels,
        )
    plan.save(path)
    return path


PLANNERS: Registry[type[nnsslPlanner]] = Registry(kind="planner", package="nnssl_ext.planners")
PLANNERS.register(nnsslPlanner)


def plan_experiment(
    fingerprint: Fingerprint,
    manifest: Manifest,
    planner_name: str = "nnsslPlanner",
    options: PlanningOptions | None = None,
) -> Plan:
    """Plans a dataset with a planner given by name.

    Args:
        fingerprint: Of the dataset.
        manifest: Of the dataset; gives channel names and the file ending.
        planner_name: One of `PLANNERS.names()`.
        options: The user's decisions.

    Raises:
        ValueError: If the planner is unknown or the dataset cannot be planned.
    """
    return PLANNERS.get(planner_name)(options or PlanningOptions()).plan(fingerprint, manifest)
