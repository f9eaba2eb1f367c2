"""Tiny networks as upstream pretrains them, rebuilt from what is known of them, and their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
from torch import nn

from .conftest import checkpoint

WIDTH, DEPTH, HEADS = 24, 2, 2


def disturb(module: nn.Module, seed: int = 0) -> None:
    """Large random weights, so that every position and every rotation shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


class UpstreamTransformer(nn.Module):
    """Upstream's EvaMAE (`evamae`) without dropping, or its SimMIM network (`primus`), up to the encoder's output.

    EvaMAE flattens the map (i, j, k) of its tokens with j slowest, and both hand positions to them by row.
    """

    def __init__(
        self, patch_size: Sequence[int], token: Sequence[int], order: str, decoder: bool = True, registers: int = 0
    ) -> None:
        super().__init__()
        self.order = order
        grid = tuple(size // edge for size, edge in zip(patch_size, token, strict=True))
        sizes: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS, "ref_feat_shape": grid}
        self.down_projection = PatchEmbed(tuple(token), 1, WIDTH)
        self.eva = Eva(depth=DEPTH, init_values=0.1, scale_attn_inner=True, num_reg_tokens=registers, **sizes)
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, WIDTH)) if registers else None
        if decoder:
            self.decoder = Eva(depth=1, **sizes)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        disturb(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, *grid), computed token after token in the network's own order."""
        embedded = self.down_projection(x)
        _, _, first, second, third = embedded.shape
        if self.order == "primus":
            encoded = self._encoded(embedded.flatten(2).transpose(1, 2))
            return encoded.transpose(1, 2).unflatten(2, (first, second, third))
        sequence = [embedded[:, :, i, j, k] for j in range(second) for i in range(first) for k in range(third)]
        encoded = self._encoded(torch.stack(sequence, dim=1))
        output = torch.empty_like(embedded)
        places = [(i, j, k) for j in range(second) for i in range(first) for k in range(third)]
        for row, (i, j, k) in enumerate(places):
            output[:, :, i, j, k] = encoded[:, row]
        return output

    def _encoded(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, n, D), with the registers before the tokens in between."""
        if self.register_tokens is None:
            return self.eva(tokens)[0]
        registers = self.register_tokens.expand(len(tokens), -1, -1)
        return self.eva(torch.cat([registers, tokens], dim=1))[0][:, registers.shape[1] :]


def transformer_checkpoint(
    network: nn.Module, patch_size: Sequence[int], token: Sequence[int] | None = None, prefix: str = ""
) -> dict[str, Any]:
    """As upstream saves it: as its `PrimusM`, or with a token of its own as the transformer of free size."""
    content = checkpoint(patch_size=list(patch_size))
    free = {"embed_dim": WIDTH, "patch_embed_size": tuple(token or ()), "input_channels": 1, "output_channels": 1}
    free |= {"encoder_eva_depth": DEPTH, "encoder_eva_numheads": HEADS, "decoder_eva_depth": 1, "patch_drop_rate": 0.8}
    free |= {"init_values": 0.1, "scale_attn_inner": True, "input_shape": tuple(patch_size), "attn_drop_rate": 0}
    if getattr(network, "register_tokens", None) is not None:
        free["num_register_tokens"] = network.register_tokens.shape[1]
    architecture = {
        "arch_class_name": "PrimusX" if token else "PrimusM",
        "arch_kwargs": free if token else None,
        "arch_kwargs_requiring_import": None,
    }
    plan = {
        **content["nnssl_adaptation_plan"],
        "architecture_plans": architecture,
        "recommended_downstream_patchsize": tuple(patch_size),
        "key_to_encoder": f"{prefix}eva",
        "key_to_stem": f"{prefix}down_projection",
        "keys_to_in_proj": (f"{prefix}down_projection.proj",),
        "key_to_lpe": f"{prefix}eva.pos_embed",
    }
    weights = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    if prefix:
        weights["projector.layer1.weight"] = torch.zeros(3, WIDTH)
    citations = [{"type": "Pretraining Method", "name": "Masked Auto Encoder"}]
    return {"network_weights": weights, "citations": citations, "nnssl_adaptation_plan": plan}
