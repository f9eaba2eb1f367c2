"""Depth of a parameter in a network of nnU-Net's layout, for layer-wise learning-rate decay."""

from __future__ import annotations

import re
from collections.abc import Iterable

_STAGE = re.compile(r"^(?:encoder\.stages|eva\.blocks)\.(\d+)\.")
ENCODER_PREFIXES = ("encoder.", "down_projection.", "eva.", "register_tokens")
"""How the names of an encoder's parameters begin: nnU-Net's U-Nets have one module for it, Primus has three."""


def in_encoder(name: str) -> bool:
    """Whether a parameter of that name belongs to the encoder."""
    return name.startswith(ENCODER_PREFIXES)


def depth_of(name: str, num_stages: int) -> int:
    """Depth of a parameter: 0 for the stem, i + 1 for encoder stage i, `num_stages` + 1 behind the encoder.

    A transformer's stages are its blocks; its last norm goes with the last one.
    """
    stage = _STAGE.match(name)
    if stage:
        return int(stage.group(1)) + 1
    if name.startswith("eva.norm."):
        return num_stages
    return 0 if in_encoder(name) else num_stages + 1


def layer_scales(names: Iterable[str], layer_decay: float) -> dict[str, float]:
    """Factor on the learning rate per parameter name: 1 for the decoder, times `layer_decay` per stage below it.

    Bao et al. 2022 (BEiT, arXiv:2106.08254) decay per block; here a stage of the U-Net is the unit.
    """
    names = list(names)
    stages = [int(found.group(1)) for found in map(_STAGE.match, names) if found]
    num_stages = max(stages, default=-1) + 1
    return {name: layer_decay ** (num_stages + 1 - depth_of(name, num_stages)) for name in names}
