"""What a transformer's last block looks at."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat

from nnssl_ext.models.primus import PrimusEncoder


@torch.no_grad()
def last_attention(encoder: PrimusEncoder, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """How much the last block attends to each token, on average over those that ask.

    The registers ask where there are some, since nothing else has no place of its own; else all tokens do. Heads and
    samples are worked on one after another, since the weights of all tokens for all tokens are many.

    Args:
        encoder: The transformer, in eval mode.
        x: Images (B, C, *size).
        kept: (B, n), the tokens that it sees, -1 at empty places.

    Returns:
        (B, heads, n), float32, 0 at empty places. What each head gives to registers is left out of it; 1 would be the
        even share.
    """
    block = encoder.eva.blocks[-1]
    call: dict[str, Any] = {}

    def remember(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.update(kwargs, tokens=args[0])

    handle = block.attn.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        encoder.tokens(x, kept)
    finally:
        handle.remove()
    registers = encoder.eva.num_prefix_tokens
    asked, answers = (_heads(encoder, getattr(block.attn, name), call) for name in ("q_proj", "k_proj"))
    asked = asked[:, :, :registers] if registers else asked
    filled = kept >= 0
    shares = torch.zeros(*asked.shape[:2], kept.shape[1], device=x.device)
    for sample, real in enumerate(filled):
        looks = torch.nn.functional.pad(real, (registers, 0), value=True)
        for head in range(encoder.num_heads):
            scores = asked[sample, head] @ answers[sample, head].T * block.attn.scale
            weights = scores.masked_fill(~looks, -torch.inf).softmax(1)
            weights = weights if registers else weights[real]
            shares[sample, head] = weights.mean(0)[registers:] * real.sum()
    return shares


def _heads(encoder: PrimusEncoder, project: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """Queries or keys of all heads (B, heads, registers + n, width), those of tokens rotated by their positions."""
    registers = encoder.eva.num_prefix_tokens
    values = project(call["tokens"]).unflatten(2, (encoder.num_heads, -1)).transpose(1, 2)
    rotated = apply_rot_embed_cat(values[:, :, registers:], call["rope"])
    return torch.cat([values[:, :, :registers], rotated], 2).float()
