"""Plans and weights with which nnU-Net fine-tunes a pretrained network, and their baseline from scratch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.paths import find_dataset
from nnssl_ext.core.random import seed_of
from nnssl_ext.core.records import from_dict, read_json, to_dict, write_json
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split, folds_by_subject
from nnssl_ext.finetuning.config import PLANS_KEY, FinetuningConfig
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.finetuning.nnunet_dataset import NNUNET_PLANS, prepare_dataset
from nnssl_ext.finetuning.preprocessing_settings import (
    Mode,
    Preprocessing,
    configuration_name,
    resolve_preprocessing,
)
from nnssl_ext.finetuning.pretrained import Pretrained, read_pretrained
from nnssl_ext.finetuning.weights import Adapted, Transfer, adapt_weights, save_weights

logger = logging.getLogger(__name__)
PREFIX = "ptPlans__"
SPLITS_FILE = "splits_final.json"
PRETRAINED_LR = 1e-3
"""Peak learning rate of SGD for a pretrained CNN (upstream); from scratch it is nnU-Net's 1e-2."""
BATCH_SIZES = {2: 12, 3: 2}
"""Default batch size by the number of dimensions: nnU-Net's reference values."""
NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class FinetuningPlan:
    """What `plan_finetuning` wrote."""

    plans_path: Path
    """`$nnUNet_preprocessed/DATASET/ptPlans__NAME.json`."""
    configuration: str
    """The configuration in it: `3d_fullres`, or `2d` for a 2D network."""
    weights_path: Path | None
    """`ptPlans__NAME.pth` beside it, for `-pretrained_weights`; None from scratch."""
    report_path: Path
    """`ptPlans__NAME_report.json`: preprocessing, provenance, and every key of the weights."""
    report: dict[str, Any]
    """Its content."""

    @property
    def plans_name(self) -> str:
        """For nnU-Net's `-p`."""
        return self.plans_path.stem


def plan_finetuning(
    dataset: int | str,
    checkpoint: Path,
    name: str,
    *,
    mode: Mode = "like_pretrained",
    spacing: Sequence[float] | None = None,
    transfer: Transfer = "encoder",
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    from_scratch: bool = False,
    ignore_keys: Sequence[str] = (),
    splits: Sequence[Split] | None = None,
    num_processes: int = 1,
    **settings: Any,
) -> FinetuningPlan:
    """Writes plans, adapted weights and a report for fine-tuning a checkpoint on a labelled dataset.

    Args:
        dataset: Id or name of a dataset in `nnUNet_raw`.
        checkpoint: A pretrained checkpoint.
        name: The plans become `ptPlans__NAME`.
        mode: How images are prepared, see `resolve_preprocessing`.
        spacing: mm per axis (z, y, x), with mode `fixed`.
        transfer: Which weights to take over.
        patch_size: Voxels; by default what the checkpoint recommends.
        batch_size: Samples per step; by default 2 in 3D and 12 in 2D.
        from_scratch: Write the fair baseline instead: the same plans without weights.
        ignore_keys: Prefixes of checkpoint keys that may be dropped without a known reason.
        splits: Folds; by default those of `splits_final.json`, which is written, by patient, where there is none.
        num_processes: For nnU-Net's fingerprint, where that is missing.
        settings: Fields of `FinetuningConfig`.

    Raises:
        FileNotFoundError: If checkpoint, dataset or a label is missing.
        ValueError: If something does not fit; the message says what is allowed.
    """
    pretrained = read_pretrained(checkpoint)
    folder = prepare_dataset(dataset, num_processes, with_plans=mode == "default_nnunet")
    fingerprint, dataset_json = read_json(folder / "dataset_fingerprint.json"), read_json(folder / "dataset.json")
    preprocessing = resolve_preprocessing(
        mode,
        pretrained,
        num_channels=len(dataset_json["channel_names"]),
        fingerprint=fingerprint,
        nnunet_plans=read_json(folder / f"{NNUNET_PLANS}.json") if mode == "default_nnunet" else None,
        spacing=spacing,
    )
    plans = _plans(pretrained, preprocessing, fingerprint, tuple(patch_size or pretrained.patch_size), batch_size)
    plans |= {"dataset_name": folder.name, "plans_name": _plans_name(name), "image_reader_writer": _reader(folder.name)}
    adapted = None if from_scratch else adapt_weights(pretrained, _network(plans, dataset_json), transfer, ignore_keys)
    config = _config(folder, pretrained, splits, adapted, _plans_name(name), settings)
    plans[PLANS_KEY] = to_dict(config)
    plans["pretrain_info"] = _pretrain_info(pretrained, mode, transfer, from_scratch)
    return _write(folder, plans, adapted, pretrained, mode)


def derive_plans(base: Path, name: str, splits: Sequence[Split], seed: int, **settings: Any) -> Path:
    """Writes a variant of plans with other folds and another seed, under a name of its own, which its results go by.

    Args:
        base: Plans of `plan_finetuning`, or any plans of nnU-Net's for a labelled dataset.
        name: File and plans name of the variant, such as `ptPlans__mae__n5__s0`.
        splits: Training and validation ids of every fold.
        seed: Seed of the runs.
        settings: Further fields of `FinetuningConfig` to change.

    Returns:
        The variant, beside `base`.

    Raises:
        FileNotFoundError: If there is no `base`.
        ValueError: If the name is that of `base`, or a setting does not fit.
    """
    if not base.is_file():
        raise FileNotFoundError(
            f"no plans at {base}. Write them with nnssl_plan_finetuning or nnUNetv2_plan_experiment"
        )
    if name == base.stem:
        raise ValueError(f"the variant needs a name other than that of its base, {base.stem}")
    plans = read_json(base)
    own = {"splits": [to_dict(split) for split in splits], "seed": seed, **settings}
    config = from_dict(FinetuningConfig, {**plans.get(PLANS_KEY, {}), **own}, name)
    path = base.with_name(f"{name}.json")
    write_json(path, {**plans, "plans_name": name, PLANS_KEY: to_dict(config)})
    return path


def _plans_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"name {name!r} is not allowed: letters, digits, '_' and '-' only")
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


def _plans(
    pretrained: Pretrained,
    preprocessing: Preprocessing,
    fingerprint: Mapping[str, Any],
    patch_size: tuple[int, ...],
    batch_size: int | None,
) -> dict[str, Any]:
    """The plans' content that depends on checkpoint and data, in nnU-Net's keys."""
    dims = len(pretrained.patch_size)
    check_patch_size(patch_size, pretrained)
    order = list(preprocessing.transpose_forward)
    shapes = np.asarray(fingerprint["shapes_after_crop"], dtype=float)[:, order]
    spacings = np.asarray(fingerprint["spacings"], dtype=float)[:, order]
    configuration = {
        "data_identifier": preprocessing.identifier(),
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": BATCH_SIZES[dims] if batch_size is None else batch_size,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": _median_shape(shapes, spacings, preprocessing, dims),
        "spacing": list(preprocessing.spacing),
        "normalization_schemes": list(preprocessing.normalization_schemes),
        "use_mask_for_norm": list(preprocessing.use_mask_for_norm),
        **preprocessing.resampling,
        "architecture": pretrained.architecture,
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


def _median_shape(shapes: np.ndarray, spacings: np.ndarray, preprocessing: Preprocessing, dims: int) -> list[float]:
    """Median shape in voxels after resampling, over the network's dimensions."""
    shapes, spacings = shapes[:, 3 - dims :], spacings[:, 3 - dims :]
    if preprocessing.resampling["resampling_fn_data"] != "no_resampling_hack":
        shapes = np.round(shapes * spacings / np.asarray(preprocessing.spacing))
    return [float(value) for value in np.median(shapes, axis=0)]


def check_patch_size(patch_size: Sequence[int], pretrained: Pretrained) -> None:
    """Refuses a patch that the pretrained network cannot process.

    Raises:
        ValueError: Names what the size must be divisible by, or that it is too small.
    """
    strides = [tuple(stride) for stride in pretrained.architecture["arch_kwargs"]["strides"]]
    if len(patch_size) != len(strides[0]):
        raise ValueError(f"patch size {tuple(patch_size)} does not fit a network of {len(strides[0])} dimensions")
    total = tuple(prod(stride[axis] for stride in strides) for axis in range(len(strides[0])))
    if any(size < 1 or size % step for size, step in zip(patch_size, total, strict=True)):
        nearest = tuple(-(-max(size, 1) // step) * step for size, step in zip(patch_size, total, strict=True))
        raise ValueError(
            f"patch size {tuple(patch_size)} must be divisible by {total} for this network: try "
            f"-patch_size {' '.join(map(str, nearest))}"
        )
    if prod(patch_size) == prod(total):
        raise ValueError(f"patch size {tuple(patch_size)} leaves one voxel at the deepest stage; double one axis")


def _network(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> Any:
    """The network as nnU-Net builds it from the plans; what is fresh in the weights file comes from a fixed seed."""
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


def _reader(dataset_name: str) -> str:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    raw = nnunet_root("raw") / dataset_name
    example = str(Manifest.load(raw).cases[0].images[0])
    return determine_reader_writer_from_dataset_json(read_json(raw / "dataset.json"), example, verbose=False).__name__


def _config(
    folder: Path,
    pretrained: Pretrained,
    splits: Sequence[Split] | None,
    adapted: Adapted | None,
    plans_name: str,
    settings: Mapping[str, Any],
) -> FinetuningConfig:
    own: dict[str, Any] = {"splits": [to_dict(split) for split in splits or dataset_splits(folder)]}
    if adapted is not None:
        own |= {
            "pretrained_weights": f"{plans_name}.pth",
            "pretraining_content_hashes": list(pretrained.content_hashes),
            "lr": PRETRAINED_LR,
            "schedule": "warmup",
        }
    return from_dict(FinetuningConfig, {**own, **settings}, plans_name)


def dataset_splits(folder: Path) -> list[Split]:
    """The folds of nnU-Net's `splits_final.json`; where there is none, five folds by patient are written to it.

    Args:
        folder: The dataset's preprocessed folder.
    """
    path = folder / SPLITS_FILE
    if not path.is_file():
        manifest = Manifest.load(find_dataset(folder.name, nnunet_root("raw")))
        write_json(path, [to_dict(split) for split in folds_by_subject(manifest.subjects(), num_folds=NUM_FOLDS)])
    return [from_dict(Split, split, str(path)) for split in read_json(path)]


def _pretrain_info(pretrained: Pretrained, mode: Mode, transfer: Transfer, from_scratch: bool) -> dict[str, Any]:
    """Upstream's block of the same name, without the path, and how the plans were made."""
    return {
        "checkpoint_name": pretrained.name,
        "key_to_encoder": pretrained.encoder_key,
        "key_to_stem": pretrained.stem_key,
        "keys_to_in_proj": list(pretrained.in_proj_keys),
        "key_to_lpe": None,
        "pt_num_in_channels": pretrained.num_channels,
        "pt_used_patchsize": list(pretrained.configuration.get("patch_size", pretrained.patch_size)),
        "pt_recommended_downstream_patchsize": list(pretrained.patch_size),
        "citations": list(pretrained.citations),
        "mode": mode,
        "transfer": None if from_scratch else transfer,
    }


def _write(
    folder: Path, plans: dict[str, Any], adapted: Adapted | None, pretrained: Pretrained, mode: Mode
) -> FinetuningPlan:
    path = folder / f"{plans['plans_name']}.json"
    ((configuration, settings),) = plans["configurations"].items()
    rows = [] if adapted is None else [to_dict(row) for row in adapted.rows]
    counts = {
        status: sum(row["status"] == status for row in rows) for status in ("loaded", "adapted", "fresh", "left over")
    }
    kept = ("spacing", "patch_size", "batch_size", "normalization_schemes", "data_identifier")
    report = {
        "plans_name": plans["plans_name"],
        "checkpoint": pretrained.name,
        "pretrained": adapted is not None,
        "mode": mode,
        "preprocessing": {key: settings[key] for key in kept},
        "tensors": counts,
        "keys": rows,
    }
    weights_path = None
    if adapted is not None:
        weights_path = path.with_suffix(".pth")
        save_weights(weights_path, adapted, pretrained.citations)
    report_path = path.with_name(f"{path.stem}_report.json")
    write_json(report_path, report)
    write_json(path, plans)
    return FinetuningPlan(
        plans_path=path,
        configuration=configuration,
        weights_path=weights_path,
        report_path=report_path,
        report=report,
    )
