"""Learning rates that fall towards an encoder's first layers (Bao et al. 2022, BEiT, arXiv:2106.08254)."""

from __future__ import annotations

import re
from collections.abc import Iterable

_STAGE = re.compile(r"^encoder\.(?:module\.stages|eva\.blocks)\.(\d+)\.")


def rate_of_layer(name: str, names: Iterable[str], decay: float, stem: float) -> float:
    """Factor on the learning rate of a task's parameter: 1 outside of its encoder, less for each stage further down.

    Args:
        name: Of the parameter; those of the encoder begin with `encoder.`.
        names: Of all parameters.
        decay: Factor of a stage (on a transformer: a block) relative to the next deeper one.
        stem: Further factor on a transformer's patch embedding.
    """
    if not name.startswith("encoder."):
        return 1.0
    num_stages = 1 + max(int(found[1]) for found in map(_STAGE.match, names) if found)
    found = _STAGE.match(name)
    depth = int(found[1]) + 1 if found else num_stages * name.startswith("encoder.eva.norm.")
    return (stem if name.startswith("encoder.down_projection.") else 1.0) * decay ** (num_stages + 1 - depth)
