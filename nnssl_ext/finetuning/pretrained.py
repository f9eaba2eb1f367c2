"""Pretrained checkpoints as fine-tuning reads them: weights, and upstream's adaptation plan as a typed record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.records import read_json
from nnssl_ext.engine.checkpoint import load_checkpoint, resenc_l
from nnssl_ext.finetuning import upstream
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
PLAN_FILE = "adaptation_plan.json"
"""Lies beside weights in the format of safetensors, which hold nothing but tensors."""
_UNET_MODULES = ("encoder", "decoder")
_DDP_PREFIX, _COMPILE_PREFIX = "module.", "_orig_mod."


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained network and how its images were preprocessed."""

    name: str
    """File name of the checkpoint."""
    file_hash: str = ""
    """Of that file's bytes."""
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
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What the checkpoint holds beside `weights`, for its pretraining alone (heads, a mask token): shapes."""
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


def read_pretrained(path: Path, token_order: str | None = None, hub_name: str = "") -> Pretrained:
    """Reads a checkpoint of this project or of upstream's, whole or released.

    Args:
        path: A `.pth` file with `network_weights` and `nnssl_adaptation_plan`, or `.safetensors` beside `PLAN_FILE`.
        token_order: For a transformer of upstream's, one of `upstream.TokenOrder`; None: what the checkpoint says.
        hub_name: What it is called on the hub, which may tell the method where the file's name does not.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, holds code, lacks a part, or its network is not supported.
    """
    if token_order is not None:
        upstream.check_token_order(token_order)
    checkpoint = _load_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    if "nnssl_adaptation_plan" not in checkpoint:
        raise ValueError(
            f"{path} has no nnssl_adaptation_plan, only {', '.join(map(str, checkpoint))}: it does not say how its "
            "network is built. Checkpoints of nnssl_train and of upstream's nnssl have one"
        )
    plan = checkpoint["nnssl_adaptation_plan"]
    try:
        found = _pretrained(path, checkpoint, plan)
        if "nnssl_pretraining" in checkpoint:
            return found
        if is_transformer(found.architecture):
            order = upstream.token_order(checkpoint, (found.name, hub_name), found.weights, token_order)
            return _foreign_transformer(found, plan, order)
        return _foreign_unet(found)
    except KeyError as error:
        raise ValueError(f"{path}: its adaptation plan has no {error}; docs/checkpoint.md lists all keys") from error


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path} needs safetensors. Install it: pip install 'nnssl_ext[hub]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    plan = read_json(path.with_name(PLAN_FILE))
    try:
        return {"network_weights": load_file(path), "nnssl_adaptation_plan": plan}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}. Get a fresh copy") from error


def _pretrained(path: Path, checkpoint: Mapping[str, Any], plan: Mapping[str, Any]) -> Pretrained:
    plans = {**checkpoint.get("nnssl_plans", {}), **plan["pretrain_plan"]}
    if len(plans["configurations"]) != 1:
        raise ValueError(
            f"{path}: one configuration is expected in its plans, there are {list(plans['configurations'])}"
        )
    (configuration,) = plans["configurations"].values()
    patch_size = plan["recommended_downstream_patchsize"]
    pretraining = checkpoint.get("nnssl_pretraining", {})
    architecture = _architecture(plan["architecture_plans"], patch_size, path)
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


def _foreign_unet(found: Pretrained) -> Pretrained:
    """A U-Net of upstream's: its encoder may be called otherwise, and heads may lie beside it."""
    module, dot, _ = found.encoder_key.rpartition(".stages")
    renamed = {module: "encoder"} if dot and module != "encoder" else {}
    parts = (f"{module}.", *(f"{part}." for part in _UNET_MODULES if not renamed))
    return _renamed(found, renamed, parts)


def _foreign_transformer(found: Pretrained, plan: Mapping[str, Any], order: str) -> Pretrained:
    """A transformer of upstream's in our names, its tokens in our order. Its decoder never serves another task."""
    module, dot, _ = found.encoder_key.rpartition(".")
    registers = f"{module}{dot}{upstream.REGISTERS}"
    found = _renamed(
        found,
        {found.stem_key: upstream.STEM, found.encoder_key: upstream.STAGES, registers: upstream.REGISTERS},
        (f"{found.stem_key}.", f"{found.encoder_key}.", registers),
    )
    arguments = found.architecture["arch_kwargs"]
    if upstream.POSITION_KEY not in found.weights:
        raise ValueError(f"{found.name} holds no position embedding {plan['key_to_lpe']}: it is incomplete")
    num_tokens = found.weights[upstream.POSITION_KEY].shape[1] - arguments.get("num_register_tokens", 0)
    patches = [plan.get("pretrain_patch_size"), found.configuration.get("patch_size"), found.patch_size]
    grid = upstream.learned_grid(num_tokens, filter(None, patches), arguments["patch_embed_size"])
    weights, scattered = found.weights, False
    if order == "evamae":
        weights, scattered = upstream.to_primus_order(weights, grid, arguments["eva_numheads"])
    if scattered:
        arguments = {**arguments, "evamae_rotary": True}
    return replace(
        found,
        weights=weights,
        architecture={**found.architecture, "arch_kwargs": arguments},
        in_proj_keys=(f"{upstream.STEM}.proj",),
        position_key=upstream.POSITION_KEY,
        position_grid=grid,
        trains_decoder=False,
    )


def _renamed(found: Pretrained, renamed: Mapping[str, str], parts: tuple[str, ...]) -> Pretrained:
    """With modules under new names; what lies outside `parts` (prefixes of old names) is set aside."""
    kept = [key for key in found.weights if key.startswith(parts)]
    names = upstream.new_names([*kept, *found.in_proj_keys, found.encoder_key, found.stem_key], renamed)
    return replace(
        found,
        weights={names[key]: found.weights[key] for key in kept},
        unused={key: tuple(value.shape) for key, value in found.weights.items() if key not in set(kept)},
        encoder_key=names[found.encoder_key],
        stem_key=names[found.stem_key],
        in_proj_keys=tuple(names[key] for key in found.in_proj_keys),
    )


def _plain_keys(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the prefixes that DDP and torch.compile leave."""
    return {key.removeprefix(_DDP_PREFIX).removeprefix(_COMPILE_PREFIX): value for key, value in weights.items()}


def _architecture(plans: Mapping[str, Any], patch_size: Sequence[int], path: Path) -> dict[str, Any]:
    """nnU-Net's `architecture` block for upstream's `architecture_plans`."""
    name, kwargs, imports = (plans[key] for key in ("arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"))
    if name == "ResEncL":
        return resenc_l()
    if name in _PRIMUS_NAMES:
        return named_primus(name.removeprefix("Primus"), patch_size)
    if name == upstream.PRIMUS_X:
        return upstream.primus_x_architecture(kwargs or {}, patch_size)
    if name == PRIMUS_CLASS:
        return {"network_class_name": name, "arch_kwargs": dict(kwargs), "_kw_requires_import": []}
    short = str(name).rsplit(".", 1)[-1]
    if short not in _CLASS_PATHS:
        supported = ", ".join(("ResEncL", *_PRIMUS_NAMES, upstream.PRIMUS_X, *_CLASS_PATHS))
        raise ValueError(f"{path}: nnU-Net's trainer cannot fine-tune the network {name!r}. Supported: {supported}")
    if not kwargs:
        raise ValueError(f"{path}: {short} needs arch_kwargs in its adaptation plan")
    kept = {key: value for key, value in kwargs.items() if key not in _SET_BY_NNUNET}
    needed = [key for key in (imports or KEYS_TO_IMPORT) if key in kept]
    return {"network_class_name": _CLASS_PATHS[short], "arch_kwargs": kept, "_kw_requires_import": needed}
