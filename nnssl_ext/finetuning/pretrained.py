"""Pretrained checkpoints as fine-tuning reads them: weights, and upstream's adaptation plan as a typed record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.engine.checkpoint import load_checkpoint, resenc_l
from nnssl_ext.planners.architecture import KEYS_TO_IMPORT
from nnssl_ext.planners.primus import PRIMUS_CLASS, is_transformer, named_primus, token_grid

NO_RESAMPLING = "noresample"
"""Spacing style of plans, ours and upstream's, that leave every case at its own spacing."""
_CLASS_PATHS = {
    name: f"dynamic_network_architectures.architectures.unet.{name}"
    for name in ("ResidualEncoderUNet", "PlainConvUNet")
}
_PRIMUS_NAMES = ("PrimusS", "PrimusB", "PrimusM", "PrimusL")
_SET_BY_NNUNET = ("input_channels", "num_classes", "output_channels", "deep_supervision")
_DDP_PREFIX, _COMPILE_PREFIX = "module.", "_orig_mod."


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained network and how its images were preprocessed."""

    name: str
    """File name of the checkpoint."""
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    """State dict in nnU-Net's key names, on the CPU."""
    architecture: dict[str, Any]
    """nnU-Net's `architecture` block of the network."""
    plans: dict[str, Any]
    """The pretraining's plans: upstream's `pretrain_plan`, with what else our own plans hold."""
    configuration: dict[str, Any]
    """The configuration of those plans that was used."""
    num_channels: int
    """Input channels of the pretrained stem."""
    patch_size: tuple[int, ...]
    """Patch size recommended for fine-tuning."""
    encoder_key: str
    """Prefix of the encoder's stages."""
    stem_key: str
    """Prefix of the stem."""
    in_proj_keys: tuple[str, ...]
    """Modules whose weight depends on the number of input channels, by all their names."""
    position_key: str | None = None
    """The learned position embedding of a transformer."""
    position_grid: tuple[int, ...] = ()
    """Tokens per axis that the position embedding was learned for."""
    trains_decoder: bool | None = None
    """Whether the pretraining trained the decoder; None where the checkpoint does not say."""
    sham: bool = False
    """Whether it is of a control run, trained on destroyed targets."""
    citations: tuple[Any, ...] = ()
    """What to cite when these weights are used."""
    content_hashes: tuple[str, ...] = ()
    """Content hashes of the pretraining images, where the checkpoint has them."""

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Voxel size in mm (after transposing), or None when the pretraining did not resample."""
        spacing = self.configuration.get("spacing")
        if self.configuration.get("spacing_style") == NO_RESAMPLING or not isinstance(spacing, list | tuple):
            return None
        return tuple(float(value) for value in spacing)


def read_pretrained(path: Path) -> Pretrained:
    """Reads a checkpoint of this project or of upstream's, whole or released.

    Args:
        path: A `.pth` file with `network_weights` and `nnssl_adaptation_plan`.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, holds code, lacks a part, or its network is not supported.
    """
    checkpoint = load_checkpoint(path)
    if "nnssl_adaptation_plan" not in checkpoint:
        raise ValueError(
            f"{path} has no nnssl_adaptation_plan, only {', '.join(map(str, checkpoint))}: it does not say how its "
            "network is built. Checkpoints of nnssl_train and of upstream's nnssl have one"
        )
    try:
        return _pretrained(path, checkpoint, checkpoint["nnssl_adaptation_plan"])
    except KeyError as error:
        raise ValueError(f"{path}: its adaptation plan has no {error}; docs/checkpoint.md lists all keys") from error


def _pretrained(path: Path, checkpoint: Mapping[str, Any], plan: Mapping[str, Any]) -> Pretrained:
    plans = {**checkpoint.get("nnssl_plans", {}), **plan["pretrain_plan"]}
    if len(plans["configurations"]) != 1:
        raise ValueError(
            f"{path}: one configuration is expected in its plans, there are {list(plans['configurations'])}"
        )
    (configuration,) = plans["configurations"].values()
    patch_size = plan["recommended_downstream_patchsize"]
    ours = "nnssl_pretraining" in checkpoint
    pretraining = checkpoint.get("nnssl_pretraining", {})
    architecture = _architecture(plan["architecture_plans"], patch_size, ours, path)
    return Pretrained(
        name=Path(path).name,
        weights=_plain_keys(checkpoint["network_weights"]),
        architecture=architecture,
        plans=plans,
        configuration=configuration,
        num_channels=int(plan["pretrain_num_input_channels"]),
        patch_size=tuple(int(size) for size in patch_size),
        encoder_key=plan["key_to_encoder"],
        stem_key=plan["key_to_stem"],
        in_proj_keys=tuple(plan["keys_to_in_proj"]),
        position_key=plan["key_to_lpe"],
        position_grid=token_grid(architecture) if is_transformer(architecture) else (),
        trains_decoder=pretraining.get("trains_decoder"),
        sham=pretraining.get("recipe", {}).get("sham", False),
        citations=tuple(checkpoint.get("citations") or ()),
        content_hashes=tuple(checkpoint.get("nnssl_content_hashes") or ()),
    )


def _plain_keys(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the prefixes that DDP and torch.compile leave."""
    return {key.removeprefix(_DDP_PREFIX).removeprefix(_COMPILE_PREFIX): value for key, value in weights.items()}


def _architecture(plans: Mapping[str, Any], patch_size: Sequence[int], ours: bool, path: Path) -> dict[str, Any]:
    """nnU-Net's `architecture` block for upstream's `architecture_plans`.

    Transformers are read from checkpoints of this project alone: those of upstream's masked autoencoder count their
    tokens in another order than the network that fine-tunes them.
    """
    name, kwargs, imports = (plans[key] for key in ("arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"))
    if name == "ResEncL":
        return resenc_l()
    if ours and name in _PRIMUS_NAMES:
        return named_primus(name.removeprefix("Primus"), patch_size)
    if ours and name == PRIMUS_CLASS:
        return {"network_class_name": name, "arch_kwargs": dict(kwargs), "_kw_requires_import": []}
    short = str(name).rsplit(".", 1)[-1]
    if short not in _CLASS_PATHS:
        supported = ", ".join(("ResEncL", *_CLASS_PATHS)) + ", and Primus as nnssl_train saves it"
        raise ValueError(f"{path}: nnU-Net's trainer cannot fine-tune the network {name!r}. Supported: {supported}")
    if not kwargs:
        raise ValueError(f"{path}: {short} needs arch_kwargs in its adaptation plan")
    kept = {key: value for key, value in kwargs.items() if key not in _SET_BY_NNUNET}
    needed = [key for key in (imports or KEYS_TO_IMPORT) if key in kept]
    return {"network_class_name": _CLASS_PATHS[short], "arch_kwargs": kept, "_kw_requires_import": needed}
