"""Primus as nnU-Net's plans describe it: token sizes, the architecture block, counting parameters and values.

Primus (Wald et al. 2025, arXiv:2503.01835) is a plain vision transformer on non-overlapping cubes of voxels, its
tokens, with learned and 3-axis rotary positions. The library has it for volumes; here it is one for pictures, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log2, prod
from typing import Any

from nnssl_ext.planners.architecture import Shape, Size, Topology

PRIMUS_CLASS = "nnssl_ext.models.primus.SegmentationPrimus"
TOKEN_EDGE = 8
"""Edge of a token along the axes of finest spacing, in voxels."""
DROP_PATH_RATE = 0.2
LAYER_SCALE = 0.1
MLP_RATIO = 8 / 3
DECODERS = ("primus", "unetr", "mlp")
"""How tokens become voxels: by Primus' transposed convolutions, UNETR's pyramid, SegFormer's all-MLP decoder."""
MIN_STRIDES = 3
"""With two nnU-Net's deep supervision has no weight left and its loss is NaN."""
HEAD_DIVISOR = {2: 4, 3: 6}
"""What the width of a head is divisible by: rotary positions take pairs of values, equally many of each axis."""


@dataclass(frozen=True, kw_only=True)
class PrimusSize:
    """Depth and width of a preset."""

    depth: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads of a block."""
    head_width: dict[int, int]
    """Width of a head, by the number of dimensions; the tokens are as wide as all heads together."""


PRIMUS_SIZES = {
    "XS": PrimusSize(depth=6, num_heads=8, head_width={2: 24, 3: 24}),
    "S": PrimusSize(depth=12, num_heads=6, head_width={2: 64, 3: 66}),
    "B": PrimusSize(depth=12, num_heads=12, head_width={2: 64, 3: 66}),
    "M": PrimusSize(depth=16, num_heads=12, head_width={2: 72, 3: 72}),
    "L": PrimusSize(depth=24, num_heads=16, head_width={2: 64, 3: 66}),
}
"""S to L are those of the paper. For pictures a head of 66 has no rotary table and becomes one of 64. XS is ours."""


def token_size(spacing: Sequence[float]) -> tuple[int, ...]:
    """The token for a spacing: about equally long in mm along all axes, in powers of two.

    Args:
        spacing: mm per axis.

    Returns:
        Voxels per axis, between 1 and `TOKEN_EDGE`.
    """
    finest = min(spacing)
    return tuple(max(1, TOKEN_EDGE // 2 ** floor(log2(step / finest))) for step in spacing)


def token_topology(spacing: Sequence[float], patch_size: Sequence[int]) -> Topology:
    """A patch of whole tokens.

    Its strides are those that `primus_architecture` writes. They stand for no layers: nnU-Net's trainer reads scales of
    deep supervision from them and needs three, and their product is the token.

    Args:
        spacing: mm per axis.
        patch_size: Voxels per axis; the result's patch is padded up to whole tokens.
    """
    token = token_size(spacing)
    return Topology(
        patch_size=tuple(-(-int(size) // edge) * edge for size, edge in zip(patch_size, token, strict=True)),
        strides=token_strides(token),
        kernel_sizes=(),
        divisor=token,
    )


def token_strides(token: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Three strides whose product is the token; nnU-Net's trainer needs them, the network has no such layers."""
    half = tuple(min(2, edge) for edge in token)
    return (1,) * len(token), half, tuple(edge // step for edge, step in zip(token, half, strict=True))


def pyramid_strides(token: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Strides of a pyramid from voxels to tokens: each halves the axes along which most is left to halve.

    Near full resolution an axis of coarser spacing, whose tokens are shorter, is thus left as it is.

    Returns:
        Three or more, the first all ones; their product is the token.
    """
    left, steps = tuple(token), [(1,) * len(token)]
    while max(left) > 1:
        steps.append(tuple(2 if edge == max(left) else 1 for edge in left))
        left = tuple(edge // step for edge, step in zip(left, steps[-1], strict=True))
    return tuple(steps) if len(steps) >= MIN_STRIDES else token_strides(token)


def check_decoder(decoder: str) -> None:
    """Refuses an unknown decoder.

    Raises:
        ValueError: Lists the known ones.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder {decoder!r} is not known; valid: {', '.join(DECODERS)}")


def with_decoder(architecture: Mapping[str, Any], decoder: str) -> dict[str, Any]:
    """The same transformer with another decoder.

    Args:
        architecture: nnU-Net's `architecture` block of a Primus.
        decoder: One of `DECODERS`.

    Raises:
        ValueError: If it is not known, or the architecture is no transformer.
    """
    check_decoder(decoder)
    if not is_transformer(architecture):
        raise ValueError(
            f"decoder {decoder!r} belongs to transformers, and the pretrained network is a U-Net with one of its own. "
            "Leave out -decoder"
        )
    token = architecture["arch_kwargs"]["patch_embed_size"]
    strides = pyramid_strides(token) if decoder == "unetr" else token_strides(token)
    own = {"decoder": decoder, "strides": [list(stride) for stride in strides]}
    return {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], **own}}


def primus_architecture(size: PrimusSize, patch_size: Sequence[int], token: Sequence[int]) -> dict[str, Any]:
    """nnU-Net's `architecture` block of a Primus.

    Args:
        size: Of the transformer.
        patch_size: Voxels per axis, divisible by the token.
        token: Voxels of a token per axis.
    """
    return {
        "network_class_name": PRIMUS_CLASS,
        "arch_kwargs": {
            "input_shape": list(patch_size),
            "patch_embed_size": list(token),
            "embed_dim": size.num_heads * size.head_width[len(token)],
            "eva_depth": size.depth,
            "eva_numheads": size.num_heads,
            "num_register_tokens": 0,
            "drop_path_rate": DROP_PATH_RATE,
            "init_values": LAYER_SCALE,
            "scale_attn_inner": True,
            "strides": [list(stride) for stride in token_strides(token)],
        },
        "_kw_requires_import": [],
    }


def is_transformer(architecture: Mapping[str, Any]) -> bool:
    """Whether an `architecture` block describes a Primus."""
    return architecture["network_class_name"] == PRIMUS_CLASS


def token_grid(architecture: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens per axis of a Primus."""
    arch = architecture["arch_kwargs"]
    return tuple(size // edge for size, edge in zip(arch["input_shape"], arch["patch_embed_size"], strict=True))


def with_patch_size(architecture: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """The same network for another patch: a transformer's block names the patch, a U-Net's does not."""
    if not is_transformer(architecture):
        return dict(architecture)
    return {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], "input_shape": list(patch_size)}}


def primus_name(architecture: Mapping[str, Any]) -> str | None:
    """The library's name for the network, such as `PrimusM`; None where the block describes none of its networks."""
    if not is_transformer(architecture):
        return None
    patch_size = architecture["arch_kwargs"]["input_shape"]
    for name in ("S", "B", "M", "L"):
        if len(patch_size) == 3 and architecture == named_primus(name, patch_size):
            return f"Primus{name}"
    return None


def named_primus(name: str, patch_size: Shape) -> dict[str, Any]:
    """The library's network of one of the names S, B, M and L, on volumes, with tokens of 8³ voxels."""
    return primus_architecture(PRIMUS_SIZES[name], patch_size, (TOKEN_EDGE,) * 3)


def measure_primus(architecture: Mapping[str, Any], patch_size: Shape, num_channels: int, num_outputs: int) -> Size:
    """Counts parameters and kept values of a Primus without building it.

    The decoder is that of a masked autoencoder (`models/token_decoder.py`) of two blocks on half of the heads, which
    sees all tokens. Values are counted per block as autograd keeps them under autocast, those in fp32 as two.

    Args:
        architecture: nnU-Net's `architecture` block.
        patch_size: Voxels per axis.
        num_channels: Input channels.
        num_outputs: Output channels.
    """
    arch = architecture["arch_kwargs"]
    width, depth, voxels = arch["embed_dim"], arch["eva_depth"], prod(arch["patch_embed_size"])
    tokens = prod(patch_size) // voxels
    registers = arch["num_register_tokens"]
    narrow = width // arch["eva_numheads"] * max(1, arch["eva_numheads"] // 2)
    encoder = voxels * num_channels * width + width + (tokens + registers) * width + 2 * width
    decoder = width * narrow + 2 * narrow + tokens * narrow + 2 * narrow + (narrow + 1) * voxels * num_outputs
    return Size(
        encoder_parameters=encoder + depth * _block_parameters(width) + registers * width,
        decoder_parameters=decoder + DECODER_DEPTH * _block_parameters(narrow),
        encoder_values=depth * _block_values(width) * (tokens + registers) + 2 * tokens * width,
        decoder_values=DECODER_DEPTH * _block_values(narrow) * tokens + 2 * tokens * narrow,
        largest_map=tokens * max(2 * int(MLP_RATIO * width), voxels * num_outputs),
    )


DECODER_DEPTH = 2
"""Blocks of a masked autoencoder's decoder."""


def _block_parameters(width: int) -> int:
    hidden = int(MLP_RATIO * width)
    attention = 4 * width * width + 3 * width + 2 * width  # the keys have no bias; a norm before the projection
    mlp = 3 * width * hidden + 2 * hidden + width + 2 * hidden  # gate and value, projection, a norm between them
    return attention + mlp + 4 * width + 2 * width  # two norms, two scales


def _block_values(width: int) -> int:
    """Values of one token that a block keeps for the gradient, in units of half precision."""
    return 17 * width + 7 * int(MLP_RATIO * width)
