"""What depends on the kind of a plan's backbone.

Transformers bring in timm, which takes seconds to import, so nothing here or in a method's file imports
`nnssl_ext.models.primus` before a plan asks for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.resenc import export_unet
from nnssl_ext.planners.plan import Configuration

if TYPE_CHECKING:
    from nnssl_ext.models.primus import PrimusEncoder


def is_transformer(encoder: Encoder) -> TypeGuard[PrimusEncoder]:
    """Whether an encoder has tokens."""
    return encoder.kind == "vit"


def export_network(configuration: Configuration, encoder: Encoder, decoder: nn.Module | None = None) -> nn.Module:
    """The plan's whole network in nnU-Net's key names, as `PretextTask.export_network` wants it.

    Args:
        configuration: What the encoder was built from.
        encoder: The trained encoder; the network shares its memory.
        decoder: A U-Net's trained decoder; a fresh one where there is none, and for a transformer.
    """
    if is_transformer(encoder):
        from nnssl_ext.models.primus import export_primus

        return export_primus(configuration, encoder)
    return export_unet(configuration, encoder, decoder)
