"""Checkpoints: one file that resumes a run, that nnU-Net loads, and that upstream's fine-tuning tools understand.

A checkpoint is a dict of plain builtins and CPU tensors, which `torch.load(weights_only=True)` reads. Its released
form, what fine-tuning needs, has these keys:

- `network_weights`: the whole segmentation network under nnU-Net's names, every alias included;
- `citations`: what to cite when using it;
- `nnssl_adaptation_plan`: where the parts lie and how the data was prepared, in upstream's schema;
- `nnssl_plans`: the plans with the one configuration that was used;
- `nnssl_pretraining`: trainer, recipe without paths, whether the decoder was trained, number of cases, and `predictor`,
  what a task's own predictions take beside the encoder, where it makes any;
- `nnssl_content_hashes`: hashes of the images trained on, by which an evaluation notices that it would test on them.

While a run can go on, `resume` holds the rest. No paths and no case names are in it.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.records import atomic_path, to_dict
from nnssl_ext.engine.task import PretextTask, PretrainTrainer
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.planners.architecture import Topology, resenc_architecture
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.planners.primus import primus_name

ARCHITECTURES = {
    "cnn": {"type": "Architecture", "name": "Residual encoder U-Net", "paper": "arXiv:2404.09556"},
    "vit": {"type": "Architecture", "name": "Primus", "paper": "arXiv:2503.01835"},
}
"""What to cite for each kind of backbone."""
FRAMEWORKS = (
    {"type": "Framework", "name": "nnU-Net", "paper": "doi:10.1038/s41592-020-01008-z"},
    {"type": "Framework", "name": "nnssl, the checkpoint's format", "paper": "arXiv:2412.17041"},
)


def build_checkpoint(
    task: PretextTask,
    trainer: PretrainTrainer,
    plan: Plan,
    *,
    content_hashes: Sequence[str],
    resume: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The checkpoint of a task, ready for `save_checkpoint`.

    Args:
        task: The trained task.
        trainer: The recipe it was trained with.
        plan: The plans it was built from.
        content_hashes: Hashes of the images trained on.
        resume: What continuing needs (states of task, optimiser and so on); None gives the released form.

    Returns:
        A dict that still shares memory with the task.
    """
    configuration = task.configuration
    checkpoint: dict[str, Any] = {
        "network_weights": task.export_network().state_dict(),
        "citations": citations(trainer, task.encoder.kind),
        "nnssl_adaptation_plan": adaptation_plan(plan, configuration, task.encoder),
        "nnssl_plans": {**plan.raw, "configurations": {configuration.name: configuration.raw}},
        "nnssl_pretraining": {
            "trainer": type(trainer).__name__,
            "recipe": to_dict(_without_paths(trainer)),
            "trains_decoder": task.trains_decoder and task.encoder.kind == "cnn",
            "num_cases": task.num_cases,
        },
        "nnssl_content_hashes": sorted(content_hashes),
    }
    if predictor := dict(task.predictor()):
        checkpoint["nnssl_pretraining"]["predictor"] = predictor
    return checkpoint if resume is None else {**checkpoint, "resume": dict(resume)}


def _without_paths(trainer: PretrainTrainer) -> PretrainTrainer:
    """The recipe without the files that its task was given: where they lie is nobody else's business."""
    values = {setting.name: getattr(trainer.task_config, setting.name) for setting in fields(trainer.task_config)}
    return replace(trainer, task_config=replace(trainer.task_config, **_pathless(values)))


def _pathless(values: Any) -> Any:
    """The same with None for paths, in dicts at any depth."""
    if isinstance(values, Mapping):
        return {name: _pathless(value) for name, value in values.items()}
    return None if isinstance(values, Path) else values


def citations(trainer: PretrainTrainer, backbone: str) -> list[dict[str, str]]:
    """What to cite when using weights of this trainer on that kind of backbone: type, name and paper of each."""
    methods = [{"type": "Pretraining Method", "name": name, "paper": paper} for name, paper in trainer.papers.items()]
    return [*methods, dict(ARCHITECTURES[backbone]), *(dict(entry) for entry in FRAMEWORKS)]


def adaptation_plan(plan: Plan, configuration: Configuration, encoder: Encoder) -> dict[str, Any]:
    """How to adapt the weights to another dataset, in the schema that upstream's fine-tuning tools read.

    Args:
        plan: The plans.
        configuration: The only configuration that is written.
        encoder: Knows where its parts lie in the exported network.
    """
    return {
        "architecture_plans": _architecture_plans(configuration.architecture),
        "pretrain_plan": {
            "dataset_name": plan.dataset_name,
            "plans_name": plan.plans_name,
            "original_median_spacing_after_transp": plan.raw.get("original_median_spacing_after_transp", []),
            "image_reader_writer": plan.image_reader_writer,
            "transpose_forward": list(configuration.transpose_forward),
            "transpose_backward": list(configuration.transpose_backward),
            "experiment_planner_used": plan.raw.get("experiment_planner_used", ""),
            "configurations": {configuration.name: _upstream_configuration(plan, configuration)},
        },
        "pretrain_num_input_channels": configuration.num_input_channels,
        "recommended_downstream_patchsize": list(configuration.patch_size),
        "key_to_encoder": encoder.stages_key,
        "key_to_stem": encoder.stem_key,
        "keys_to_in_proj": list(encoder.in_proj_keys),
        "key_to_lpe": encoder.position_key,
    }


def resenc_l() -> dict[str, Any]:
    """What upstream means by `ResEncL`, as nnU-Net's `architecture` block."""
    strides = ((1, 1, 1), *((2, 2, 2),) * 5)
    topology = Topology(patch_size=(160,) * 3, strides=strides, kernel_sizes=((3, 3, 3),) * 6, divisor=(32,) * 3)
    return resenc_architecture(topology, base_features=32, max_features=320, blocks=(1, 3, 4, 6, 6, 6))


def _architecture_plans(architecture: Mapping[str, Any]) -> dict[str, Any]:
    name = "ResEncL" if architecture == resenc_l() else primus_name(architecture)
    if name is not None:
        return {"arch_class_name": name, "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": architecture["network_class_name"],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
    }


def _upstream_configuration(plan: Plan, configuration: Configuration) -> dict[str, Any]:
    rule = plan.raw.get("nnssl_planning", {}).get("spacing_rule", "")
    return {
        "data_identifier": configuration.data_identifier,
        "preprocessor_name": configuration.raw["preprocessor_name"],
        "spacing_style": rule if isinstance(rule, str) else "fixed",
        "normalization_schemes": list(configuration.normalization_schemes),
        "use_mask_for_norm": list(configuration.use_mask_for_norm),
        "resampling_fn_data": configuration.resampling_fn_data,
        "resampling_fn_data_kwargs": configuration.resampling_fn_data_kwargs,
        "resampling_fn_mask": configuration.resampling_fn_seg,
        "resampling_fn_mask_kwargs": configuration.resampling_fn_seg_kwargs,
        "spacing": list(configuration.spacing),
        "patch_size": list(configuration.patch_size),
    }


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all; what stood there before stays until the new file is on the disk.

    Tensors are copied to the CPU, those that share memory once: a network in which several names mean one weight takes
    the size of its weights.

    Raises:
        ValueError: If something in it is neither a builtin nor a tensor, so that it would not load again.
        OSError: If the disk is full, for which torch has a RuntimeError that does not say so.
    """
    copies: dict[Any, torch.Tensor] = {}
    plain = _plain(checkpoint, "checkpoint", copies)
    try:
        with atomic_path(path) as temporary:
            torch.save(plain, temporary)
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free > sum(tensor.nbytes for tensor in copies.values()):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, of ours or of upstream's, onto the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged, or is no checkpoint of this kind.
    """
    checkpoint = _read(path)
    if "network_weights" not in checkpoint:
        raise ValueError(f"{path} holds no network_weights: it is not a pretraining checkpoint")
    return checkpoint


def load_resume(path: Path) -> dict[str, Any]:
    """Reads what a run goes on from, of a checkpoint or of a state that holds nothing else.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged, or only the weights are in it.
    """
    checkpoint = _read(path)
    if "resume" not in checkpoint:
        raise ValueError(f"{path} is of a finished run: there is nothing in it to go on from")
    return checkpoint["resume"]


_GARBAGE = (LookupError, ValueError, TypeError, AttributeError)
"""What torch raises where bytes of any other file happen to be its instructions."""
_FOREIGN = "it is none, or holds Python objects beside tensors and builtins, which might run code"
"""Torch's own words tell the reader to load such a file without that protection."""


def _reason(error: Exception) -> str:
    if isinstance(error, (pickle.UnpicklingError, *_GARBAGE)):
        return _FOREIGN
    return (error.strerror if isinstance(error, OSError) else None) or "it is damaged or cut short"


def _read(path: Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}. Make one with: nnssl_train DATASET CONFIG -tr TRAINER")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (*_GARBAGE, RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {_reason(error)}. Use another checkpoint_*.pth "
            "beside it, or a fresh copy"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds no network_weights: it is not a pretraining checkpoint")
    return checkpoint


def _plain(value: Any, where: str, copies: dict[Any, torch.Tensor]) -> Any:
    """Builtins and CPU tensors only; what is the same memory under several names is copied once."""
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, Mapping):
        entries = ((_plain(key, where, copies), item) for key, item in value.items())
        return {key: _plain(item, f"{where}[{key!r}]", copies) for key, item in entries}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{index}]", copies) for index, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"{where} is of type {type(value).__name__}; a checkpoint holds builtins and tensors only")
