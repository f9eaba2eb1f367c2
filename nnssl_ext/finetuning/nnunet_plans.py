"""Plans and weights with which nnU-Net fine-tunes a pretrained network, and their baseline from scratch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnssl_ext.core.paths import find_dataset
from nnssl_ext.core.records import apply_overrides, file_hash, from_dict, read_json, to_dict, write_json
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split, folds_by_subject
from nnssl_ext.finetuning.config import PLANS_KEY, FinetuningConfig
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.finetuning.hub import locate, name_on_hub
from nnssl_ext.finetuning.nnunet_dataset import NNUNET_PLANS, prepare_dataset
from nnssl_ext.finetuning.plans_content import build_finetuning_network, build_plans, smaller_patch
from nnssl_ext.finetuning.preprocessing_settings import Mode, Preprocessing, resolve_preprocessing
from nnssl_ext.finetuning.pretrained import Pretrained, read_pretrained
from nnssl_ext.finetuning.weights import Adapted, Transfer, adapt_weights, save_weights
from nnssl_ext.planners.primus import is_transformer

logger = logging.getLogger(__name__)
PREFIX = "ptPlans__"
SPLITS_FILE = "splits_final.json"
PRETRAINED_LR = 1e-3
"""Peak learning rate of SGD for a pretrained CNN (upstream); from scratch it is nnU-Net's 1e-2."""
TRANSFORMER = {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 5e-2, "gradient_clip": 1.0, "schedule": "warmup"}
"""Settings for a transformer (upstream's): from scratch as they are, pretrained with `PRETRAINED_TRANSFORMER_LR`."""
PRETRAINED_TRANSFORMER_LR = 1e-4
_STATUSES = ("loaded", "adapted", "fresh", "left over")
_REPORTED = ("spacing", "patch_size", "batch_size", "normalization_schemes", "data_identifier")


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
    checkpoint: Path | str,
    name: str,
    *,
    mode: Mode = "like_pretrained",
    spacing: Sequence[float] | None = None,
    transfer: Transfer = "encoder",
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    decoder: str | None = None,
    token_order: str | None = None,
    from_scratch: bool = False,
    allow_sham: bool = False,
    ignore_keys: Sequence[str] = (),
    splits: Sequence[Split] | None = None,
    num_processes: int = 1,
    command: Sequence[str] = (),
    **settings: Any,
) -> FinetuningPlan:
    """Writes plans, adapted weights and a report for fine-tuning a checkpoint on a labelled dataset.

    Args:
        dataset: Id or name of a dataset in `nnUNet_raw`.
        checkpoint: A pretrained checkpoint, or its address on the Hugging Face hub (`finetuning.hub`).
        name: The plans become `ptPlans__NAME`.
        mode: How images are prepared, see `resolve_preprocessing`.
        spacing: mm per axis (z, y, x), with mode `fixed`.
        transfer: Which weights to take over.
        patch_size: Voxels; by default what the checkpoint recommends.
        batch_size: Samples per step; by default 2 in 3D and 12 in 2D.
        decoder: For a transformer, one of `planners.primus.DECODERS`; by default Primus' own.
        token_order: For a transformer of upstream's, one of `upstream.TokenOrder`; by default what the checkpoint says.
        from_scratch: Write the fair baseline instead: the same plans without weights.
        allow_sham: Take a control run's weights, which were trained on destroyed targets.
        ignore_keys: Prefixes of checkpoint keys that may be dropped without a known reason.
        splits: Folds; by default those of `splits_final.json`, which is written, by patient, where there is none.
        num_processes: For nnU-Net's fingerprint, where that is missing.
        command: Words of the command line that asked for it, for the record.
        settings: Fields of `FinetuningConfig`.

    Raises:
        FileNotFoundError: If checkpoint, dataset or a label is missing.
        ValueError: If something does not fit; the message says what is allowed.
    """
    plans_name = _plans_name(name)
    pretrained = _pretrained(checkpoint, token_order, allow_sham or from_scratch)
    folder = prepare_dataset(dataset, num_processes, with_plans=mode == "default_nnunet")
    fingerprint, dataset_json = read_json(folder / "dataset_fingerprint.json"), read_json(folder / "dataset.json")
    preprocessing = _preprocessing(folder, pretrained, mode, spacing, fingerprint, dataset_json)
    patch_size = patch_size or pretrained.patch_size
    plans = _names(folder.name, plans_name)
    plans |= build_plans(pretrained, preprocessing, fingerprint, patch_size, batch_size, decoder)
    adapted = None
    if not from_scratch:
        adapted = adapt_weights(pretrained, build_finetuning_network(plans, dataset_json), transfer, ignore_keys)
    folds = _checked_folds(splits or dataset_splits(folder), Manifest.load(nnunet_root("raw") / folder.name))
    plans[PLANS_KEY] = to_dict(_config(plans_name, pretrained, folds, adapted, transfer, settings))
    plans["pretrain_info"] = _pretrain_info(pretrained, mode, None if from_scratch else transfer)
    return _write(folder, plans, adapted, pretrained, command)


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


FOLLOWS = {
    "splits": "--splits FILE, or the dataset",
    "pretrained_weights": "-pc CHECKPOINT",
    "weights_hash": "-pc CHECKPOINT",
    "transfer": "-transfer",
    "pretraining_content_hashes": "-pc CHECKPOINT",
}
"""Settings of the plans file that nobody sets by hand, and what they follow from."""


def default_config() -> FinetuningConfig:
    """The settings' defaults, with a placeholder for the folds, which have none."""
    return FinetuningConfig(splits=(Split(("train",), ("val",)),))


def parse_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings for `plan_finetuning` from texts such as `lr=1e-2`.

    Raises:
        ValueError: If one is no setting, follows from something else, or its value does not fit.
    """
    names = [override.partition("=")[0].strip() for override in overrides]
    for name in names:
        if name in FOLLOWS:
            raise ValueError(f"--set {name}=... is not possible: it follows from {FOLLOWS[name]}")
    changed = to_dict(apply_overrides(default_config(), overrides))
    return {name: changed[name] for name in names}


def read_splits(path: Path) -> list[Split]:
    """Folds in the format of nnU-Net's `splits_final.json`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no list of `{"train": [...], "val": [...]}`.
    """
    folds = read_json(path)
    if not isinstance(folds, list):
        raise ValueError(f'{path} must hold a list of folds, each {{"train": [...], "val": [...]}}')
    return [from_dict(Split, fold, f"{path}, fold {index}") for index, fold in enumerate(folds)]


def dataset_splits(folder: Path) -> list[Split]:
    """The folds of nnU-Net's `splits_final.json`; where there is none, five folds by patient are written to it.

    Args:
        folder: The dataset's preprocessed folder.
    """
    path = folder / SPLITS_FILE
    if not path.is_file():
        manifest = Manifest.load(find_dataset(folder.name, nnunet_root("raw")))
        write_json(path, [to_dict(split) for split in folds_by_subject(manifest.subjects())])
    return read_splits(path)


def _plans_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"name {name!r} is not allowed: letters, digits, '_' and '-' only")
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


def _pretrained(checkpoint: Path | str, token_order: str | None, allow_sham: bool) -> Pretrained:
    path = locate(checkpoint)
    pretrained = replace(read_pretrained(path, token_order, name_on_hub(checkpoint)), file_hash=file_hash(path))
    if pretrained.sham and not allow_sham:
        raise ValueError(
            f"{checkpoint} is of a sham run, a control whose targets were destroyed. Use the checkpoint of the real "
            "run, or, for the control arm of a comparison, --allow_sham"
        )
    return pretrained


def _names(dataset_name: str, plans_name: str) -> dict[str, Any]:
    """The head of the plans: whose they are, and how images are read."""
    return {"dataset_name": dataset_name, "plans_name": plans_name, "image_reader_writer": _reader(dataset_name)}


def _checked_folds(splits: Sequence[Split], manifest: Manifest) -> Sequence[Split]:
    """Refuses folds with unknown cases; warns of patients on both sides (nnU-Net's own folds know no patients)."""
    subject_of = manifest.subjects()
    unknown = sorted({case for split in splits for case in (*split.train, *split.val)} - set(subject_of))
    if unknown:
        raise ValueError(
            f"the folds name {len(unknown)} cases that {manifest.dataset_name} does not have, such as {unknown[0]}. "
            f"Correct {SPLITS_FILE} beside the plans, or give other folds with --splits"
        )
    for index, split in enumerate(splits):
        both = shared_patients(split, subject_of)
        if both:
            logger.warning(
                "fold %d trains and validates on images of the same %d patients, such as %s: its result will be too "
                "good. Remove %s to get folds by patient",
                *(index, len(both), min(both), SPLITS_FILE),
            )
    return splits


def shared_patients(split: Split, subject_of: Mapping[str, str]) -> set[str]:
    """The patients of whom there are images on both sides of a fold."""
    return {subject_of[case] for case in split.train} & {subject_of[case] for case in split.val}


def _preprocessing(
    folder: Path,
    pretrained: Pretrained,
    mode: Mode,
    spacing: Sequence[float] | None,
    fingerprint: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
) -> Preprocessing:
    return resolve_preprocessing(
        mode,
        pretrained,
        num_channels=len(dataset_json["channel_names"]),
        fingerprint=fingerprint,
        nnunet_plans=read_json(folder / f"{NNUNET_PLANS}.json") if mode == "default_nnunet" else None,
        spacing=spacing,
    )


def _reader(dataset_name: str) -> str:
    """nnU-Net's choice of a reader for the dataset, by class name."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    raw = nnunet_root("raw") / dataset_name
    example = str(Manifest.load(raw).cases[0].images[0])
    return determine_reader_writer_from_dataset_json(read_json(raw / "dataset.json"), example, verbose=False).__name__


def _config(
    plans_name: str,
    pretrained: Pretrained,
    splits: Sequence[Split],
    adapted: Adapted | None,
    transfer: Transfer,
    settings: Mapping[str, Any],
) -> FinetuningConfig:
    transformer = is_transformer(pretrained.architecture)
    own: dict[str, Any] = {"splits": [to_dict(split) for split in splits], **(TRANSFORMER if transformer else {})}
    if adapted is not None:
        own |= {
            "pretrained_weights": f"{plans_name}.pth",
            "weights_hash": adapted.content_hash,
            "transfer": transfer,
            "pretraining_content_hashes": list(pretrained.content_hashes),
            "lr": PRETRAINED_TRANSFORMER_LR if transformer else PRETRAINED_LR,
            "schedule": "warmup",
        }
    return from_dict(FinetuningConfig, {**own, **settings}, plans_name)


def _pretrain_info(pretrained: Pretrained, mode: Mode, transfer: Transfer | None) -> dict[str, Any]:
    """Upstream's block of the same name, without the checkpoint's path, and how the plans were made."""
    return {
        "checkpoint_name": pretrained.name,
        "checkpoint_hash": pretrained.file_hash,
        "key_to_encoder": pretrained.encoder_key,
        "key_to_stem": pretrained.stem_key,
        "keys_to_in_proj": list(pretrained.in_proj_keys),
        "key_to_lpe": pretrained.position_key,
        "pt_num_in_channels": pretrained.num_channels,
        "pt_used_patchsize": list(pretrained.configuration.get("patch_size", pretrained.patch_size)),
        "pt_recommended_downstream_patchsize": list(pretrained.patch_size),
        "citations": list(pretrained.citations),
        "mode": mode,
        "transfer": transfer,
    }


def _write(
    folder: Path, plans: dict[str, Any], adapted: Adapted | None, pretrained: Pretrained, command: Sequence[str]
) -> FinetuningPlan:
    """Writes weights and report first: where the plans are, the rest is."""
    path = folder / f"{plans['plans_name']}.json"
    ((configuration, own),) = plans["configurations"].items()
    report = {
        "plans_name": plans["plans_name"],
        "command": list(command),
        "pretrain_info": plans["pretrain_info"],
        "preprocessing": {key: own[key] for key in _REPORTED},
        **_key_report(adapted),
    }
    fitting = smaller_patch(own)
    if fitting is not None:
        logger.warning(
            "patch size %s is more than twice the volume of the median image (%s voxels): most of a patch would be "
            "padding. Consider -patch_size %s",
            own["patch_size"],
            own["median_image_size_in_voxels"],
            " ".join(map(str, fitting)),
        )
    weights_path = path.with_suffix(".pth") if adapted is not None else None
    if adapted is not None and weights_path is not None:
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


def _key_report(adapted: Adapted | None) -> dict[str, Any]:
    """Tensors by what became of them: counts, then one row each."""
    rows = [] if adapted is None else [to_dict(row) for row in adapted.rows]
    counts = {status: sum(row["status"] == status for row in rows) for status in _STATUSES}
    return {"tensors": counts, "keys": rows}
