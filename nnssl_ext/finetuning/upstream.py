"""Weights that upstream's nnssl pretrained, made to read like our own.

Three things differ. Contrastive methods keep the encoder one level down (`encoder.eva`, `online_encoder.stages`). Heads
of the pretraining are saved too. And the tokens are in another order: but for SimMIM, upstream pretrains its
transformers in a network of its own, EvaMAE, which counts tokens with the second axis slowest where Primus has the
first, while it takes positions row by row from tables made for the first. So token (i, j, k) of a grid (I, J, K) was
given row (j I + i) K + k of both the learned and the rotary positions. For the learned ones that is a permutation. For
the rotary ones, where I = J, it exchanges the first two axes, which the weights of queries and keys can take over: each
axis turns a third of a head's values. Where I and J differ the rows belong to no grid; they are kept as they were.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, Literal, get_args

import torch

from nnssl_ext.planners.primus import PRIMUS_CLASS, TOKEN_EDGE, token_strides

logger = logging.getLogger(__name__)
TokenOrder = Literal["evamae", "primus"]
"""Which axis of the grid is slowest in a transformer's sequence of tokens: the second, or the first."""
STEM, STAGES, REGISTERS = "down_projection", "eva", "register_tokens"
POSITION_KEY = f"{STAGES}.pos_embed"
PRIMUS_X = "PrimusX"
"""Upstream's name for a transformer whose sizes stand in its arguments."""
_PRIMUS_X_ARGUMENTS = {"encoder_eva_depth": "eva_depth", "encoder_eva_numheads": "eva_numheads"}
_KEPT_ARGUMENTS = ("embed_dim", "num_register_tokens", "drop_path_rate", "init_values", "scale_attn_inner")
_ROTATED = (".attn.q_proj.weight", ".attn.q_proj.bias", ".attn.k_proj.weight")
_PRIMUS_ORDERED = ("simmim", "maskedimagemodel")
"""In names of upstream's only method whose tokens are in Primus' order; letters alone."""
_EVAMAE_ORDERED = ("mae", "maskedauto", "contrastive", "simclr", "voco", "genesis", "volumefusion", "swinunetr")
"""In names of the methods that upstream pretrains in EvaMAE."""
_HALF_SPLIT = "dino"
"""In names of transformers that rotate otherwise; see `token_order`."""


def primus_x_architecture(arguments: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """nnU-Net's `architecture` block of upstream's transformer of free size.

    Args:
        arguments: Those of upstream's EvaMAE.
        patch_size: Voxels per axis.

    Raises:
        KeyError: If one is missing.
    """
    token = list(arguments.get("patch_embed_size", [TOKEN_EDGE] * len(patch_size)))
    sizes = {own: arguments[theirs] for theirs, own in _PRIMUS_X_ARGUMENTS.items()}
    return {
        "network_class_name": PRIMUS_CLASS,
        "arch_kwargs": {
            "input_shape": list(patch_size),
            "patch_embed_size": token,
            **sizes,
            **{key: arguments[key] for key in _KEPT_ARGUMENTS if key in arguments},
            "strides": [list(stride) for stride in token_strides(token)],
        },
        "_kw_requires_import": [],
    }


def new_names(names: Iterable[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """New names of modules and of what lies in them, by their old ones; what lies elsewhere keeps its name.

    Args:
        names: Old names.
        renamed: New names of modules, by their old ones.
    """
    result = {}
    for name in names:
        module = next((old for old in renamed if f"{name}.".startswith(f"{old}.")), None)
        result[name] = name if module is None else renamed[module] + name.removeprefix(module)
    return result


def token_order(
    checkpoint: Mapping[str, Any], names: Sequence[str], weights: Iterable[str], asked: str | None = None
) -> str:
    """The order of a foreign transformer's tokens, one of `TokenOrder`, as far as the checkpoint tells.

    Methods are known by name: of the trainer, a citation, the file or its place on the hub. A network with output
    layers of nnU-Net's was saved here, cut down to what upstream needs. What is not SimMIM's is EvaMAE's; where neither
    a name nor EvaMAE's decoder says so, a warning does.

    Args:
        checkpoint: The whole checkpoint.
        names: Of its file, and what else it is called.
        weights: The keys of its weights.
        asked: The user's word, which goes before what the checkpoint tells.

    Raises:
        ValueError: If it is named after DINO: such exports of upstream's rotate each half of a head's values against
            the other half, and Primus neighbours against one another.
    """
    keys = list(weights)
    if any(key.startswith("decoder.seg_layers.") for key in keys):
        return asked or "primus"
    citations = [entry for entry in checkpoint.get("citations") or () if isinstance(entry, Mapping)]
    methods = [entry.get("name", "") for entry in citations if "pretraining method" in str(entry.get("type")).lower()]
    stated = [re.sub("[^a-z]", "", str(name).lower()) for name in (checkpoint.get("trainer_name"), *methods, *names)]
    if _named(stated, (_HALF_SPLIT,)):
        raise ValueError(
            f"{names[0]} is named after DINO, whose transformers rotate positions half against half and not in pairs "
            "of neighbours as Primus does: fine-tuned as a Primus it would be another network. Use another checkpoint"
        )
    if asked or _named(stated, _PRIMUS_ORDERED):
        return asked or "primus"
    if not _named(stated, _EVAMAE_ORDERED) and not any(key.startswith("decoder.blocks.") for key in keys):
        logger.warning(
            "%s does not say which method trained it, or names one that is not known here; its tokens are taken to be "
            "in the order of upstream's masked autoencoder. If SimMIM trained it: --token_order primus",
            names[0],
        )
    return "evamae"


def _named(names: Iterable[str], words: Iterable[str]) -> bool:
    """Whether a word is part of a name."""
    return any(word in name for name in names for word in words)


def check_token_order(order: str) -> None:
    """Refuses an unknown order of tokens.

    Raises:
        ValueError: Lists the known ones.
    """
    if order not in get_args(TokenOrder):
        raise ValueError(f"token order {order!r} is not known; valid: {', '.join(get_args(TokenOrder))}")


def learned_grid(num_tokens: int, patch_sizes: Iterable[Sequence[int]], token: Sequence[int]) -> tuple[int, ...]:
    """The grid that a position embedding was learned for: of the first patch that has as many tokens.

    Args:
        num_tokens: Rows of the embedding, without registers.
        patch_sizes: Candidates; a contrastive method learns positions of its crops, not of the recommended patch.
        token: Voxels of a token per axis.

    Raises:
        ValueError: If none fits.
    """
    grids = [tuple(size // edge for size, edge in zip(patch, token, strict=True)) for patch in patch_sizes]
    for grid in grids:
        if prod(grid) == num_tokens:
            return grid
    raise ValueError(
        f"the position embedding has {num_tokens} tokens, which is none of the grids {sorted(set(grids))} that the "
        "checkpoint names. Add the pretraining's patch to its adaptation plan as pretrain_patch_size"
    )


def to_primus_order(
    weights: Mapping[str, torch.Tensor], grid: Sequence[int], num_heads: int
) -> tuple[dict[str, torch.Tensor], bool]:
    """The weights of an EvaMAE encoder as a Primus needs them to compute the same.

    Args:
        weights: State dict under Primus' names.
        grid: Tokens per axis that the positions were learned for, three of them.
        num_heads: Attention heads.

    Returns:
        The state dict, and whether its rotary rows are still EvaMAE's, since no exchange of axes gives them.
    """
    first, second, third = grid
    result = dict(weights)
    embedding = result[POSITION_KEY]
    registers, places = embedding.split([embedding.shape[1] - prod(grid), prod(grid)], dim=1)
    places = places.unflatten(1, (second, first, third)).transpose(1, 2).flatten(1, 3)
    result[POSITION_KEY] = torch.cat([registers, places], dim=1)
    if first != second:
        return result, True
    for key, value in weights.items():
        if key.startswith(f"{STAGES}.blocks.") and key.endswith(_ROTATED):
            thirds = value.unflatten(0, (num_heads, 3, -1))
            result[key] = thirds[:, [1, 0, 2]].flatten(0, 2)
    return result, False
