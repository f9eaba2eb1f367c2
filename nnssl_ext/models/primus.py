"""The transformer backbone: Primus (Wald et al. 2025, arXiv:2503.01835), built of the library's own parts.

A patch is cut into tokens (z slowest, x fastest), each is projected, gets a learned position, and runs through blocks
whose attention rotates by position along every axis. Weights and their names are those of
`dynamic_network_architectures.Primus`, up to the decoder. Three things differ, none of them in the numbers:

- tokens can be left out before the first block, with their rotary rows (the library's own dropping fails with the
  released timm);
- an image of another size than the planned patch is taken, with interpolated positions;
- pictures are taken besides volumes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import ceil, log2, prod
from typing import Any

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn
from torch.nn import functional

from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.resenc import EXPORT_SEED, build_network, check_divisible
from nnssl_ext.models.segmentation_decoders import HE_SLOPE, INTERPOLATION, MLPDecoder, PyramidDecoder
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.primus import HEAD_DIVISOR, check_decoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # timm declares interfaces in a way that torch has deprecated
    from dynamic_network_architectures.building_blocks.eva import Eva
    from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode, PatchEmbed
    from timm.layers import RotaryEmbeddingCat, build_rotary_pos_embed

REGISTER_STD = 1e-6
"""Initial spread of register tokens, the library's."""


class PrimusBackbone(nn.Module):
    """Stem, positions and blocks: what encoder and segmentation network have in common.

    Args:
        input_channels: Channels of the images.
        input_shape: Voxels per axis of the planned patch, 2 or 3 entries.
        patch_embed_size: Voxels per axis of a token, powers of two.
        embed_dim: Width of a token.
        eva_depth: Blocks.
        eva_numheads: Attention heads.
        num_register_tokens: Learned tokens without a place, which go through all blocks and are left out at the end.
        drop_path_rate: Share of the blocks skipped in training at the last block, rising from 0 at the first.
        init_values: Initial scale of what a block adds, or None.
        scale_attn_inner: Whether attention normalises its output before the projection.
        evamae_rotary: Whether tokens are rotated as upstream's EvaMAE did on this one patch; see `evamae_rows`.

    Raises:
        ValueError: Where the patch is not whole tokens, or a width does not fit.
    """

    def __init__(
        self,
        input_channels: int,
        input_shape: Sequence[int],
        patch_embed_size: Sequence[int],
        embed_dim: int,
        eva_depth: int,
        eva_numheads: int,
        num_register_tokens: int = 0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        scale_attn_inner: bool = False,
        evamae_rotary: bool = False,
    ) -> None:
        super().__init__()
        _check(input_shape, patch_embed_size, embed_dim, eva_numheads)
        self.token_size = tuple(patch_embed_size)
        self.num_heads, self.head_width = eva_numheads, embed_dim // eva_numheads
        self.grid = tuple(size // edge for size, edge in zip(input_shape, patch_embed_size, strict=True))
        self.down_projection = PatchEmbed(self.token_size, input_channels, embed_dim)
        self.down_projection.apply(InitWeights_He(HE_SLOPE))
        self.eva = Eva(
            embed_dim=embed_dim,
            depth=eva_depth,
            num_heads=eva_numheads,
            ref_feat_shape=self.grid,
            num_reg_tokens=num_register_tokens,
            drop_path_rate=drop_path_rate,
            init_values=init_values,
            scale_attn_inner=scale_attn_inner,
        )
        if evamae_rotary:
            self.eva.rope.pos_embed = evamae_rows(self.eva.rope.get_embed(), self.grid)
        registers = torch.randn(1, num_register_tokens, embed_dim) * REGISTER_STD if num_register_tokens else None
        self.register_tokens = None if registers is None else nn.Parameter(registers)

    def tokens(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes an image, or some of its tokens as if there were no others.

        Args:
            x: Images (B, C, *size), each edge divisible by the token's.
            kept: Which tokens to encode (B, n), int64; -1 marks an empty place, which no token attends to. None: all.

        Returns:
            (B, n, D), in the order of `kept`, without registers; what stands at an empty place has no meaning.
        """
        (tokens, rope), filled = self._embed(x), None
        if kept is not None:
            tokens, rope, filled = pick(tokens, kept), rope[kept.clamp(min=0)], kept >= 0
        return self.attend(tokens, rope, filled)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of an image with their positions (B, n, D), and the rotary row of each."""
        embedded = self.down_projection(x)
        grid = embedded.shape[2:]
        tokens = embedded.flatten(2).transpose(1, 2) + self.positions(grid)
        return tokens, rotary_table(self.eva.rope, self.grid, grid)

    def positions(self, grid: Sequence[int]) -> torch.Tensor:
        """The learned positions of a grid's tokens, (1, tokens, D)."""
        return resample_positions(self.eva.pos_embed, self.grid, grid)[:, self.eva.num_prefix_tokens :]

    def attend(self, tokens: torch.Tensor, rope: torch.Tensor, filled: torch.Tensor | None = None) -> torch.Tensor:
        """Runs embedded tokens through the blocks, beside the registers.

        Args:
            tokens: (B, n, D), positions added.
            rope: The rotary row of each, (n, width) or (B, n, width).
            filled: (B, n), False at empty places, which no token attends to. None: there are none.

        Returns:
            (B, n, D), without registers.
        """
        return self._hidden(tokens, rope, filled)[-1]

    def _hidden(
        self, tokens: torch.Tensor, rope: torch.Tensor, filled: torch.Tensor | None = None, after: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """As `attend`, with the tokens behind each of the blocks `after` (counted from 1, rising) before the result."""
        prefix = self.eva.num_prefix_tokens
        mask = None if filled is None else attended(filled, prefix)
        if self.register_tokens is not None:
            registers = (self.register_tokens + self.eva.pos_embed[:, :prefix]).expand(len(tokens), -1, -1)
            tokens = torch.cat([registers, tokens], dim=1)
        rope = rope[:, None] if rope.ndim == tokens.ndim else rope
        passed = []
        for number, block in enumerate(self.eva.blocks, start=1):
            tokens = block(tokens, rope=rope, attn_mask=mask)
            passed += [tokens[:, prefix:]] * after.count(number)
        return [*passed, self.eva.norm(tokens)[:, prefix:]]

    def token_map(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens at their places.

        Args:
            x: Images (B, C, *size).

        Returns:
            (B, D, *size / token).
        """
        return self.token_maps(x, 1)[0]

    def token_maps(self, x: torch.Tensor, number: int) -> list[torch.Tensor]:
        """All tokens at their places, after blocks that divide the transformer into equal parts.

        Args:
            x: Images (B, C, *size).
            number: How many maps, 1 or more. A transformer of fewer blocks gives some of them twice.

        Returns:
            (B, D, *size / token) each; the last one is that of `token_map`, the others are not normalised.
        """
        grid = [size // edge for size, edge in zip(x.shape[2:], self.token_size, strict=True)]
        after = [ceil(len(self.eva.blocks) * part / number) for part in range(1, number)]
        return [tokens.transpose(1, 2).unflatten(2, grid) for tokens in self._hidden(*self._embed(x), after=after)]


class PrimusEncoder(PrimusBackbone, Encoder):
    """Primus behind the contract of encoders: one feature map, the tokens at their places."""

    kind = "vit"
    stem_key = "down_projection"
    stages_key = "eva"
    in_proj_keys = ("down_projection.proj",)
    position_key = "eva.pos_embed"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of `PrimusBackbone`."""
        super().__init__(*args, **kwargs)
        self.channels = (self.eva.embed_dim,)
        self.strides = (self.token_size,)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See `Encoder.feature_maps`; the only map has a position per token."""
        return [self.token_map(x)]

    def hand_over(self, network: Any) -> None:
        """See `Encoder.hand_over`."""
        network.down_projection.load_state_dict(self.down_projection.state_dict(), assign=True)
        network.eva.load_state_dict(self.eva.state_dict(), assign=True)
        network.eva.rope = self.eva.rope  # a constant table that no state dict holds
        if self.register_tokens is not None:
            network.register_tokens = nn.Parameter(self.register_tokens.detach())


class SegmentationPrimus(PrimusBackbone):
    """The whole network, as nnU-Net's stock trainer builds, trains, loads and predicts with it.

    With two of the three decoders nnU-Net's deep supervision gets the one output there is, in a list: with three
    strides its weights are 1 and 0.

    Args:
        input_channels: Channels of the images.
        num_classes: Output channels.
        decoder: One of `planners.primus.DECODERS`.
        deep_supervision: Whether the output comes in a list.
        strides: Three or more, whose product is the token. nnU-Net's trainer reads the scales of deep supervision from
            them, and they are those of the pyramid.
        arguments: Those of `PrimusBackbone`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        decoder: str = "primus",
        deep_supervision: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(input_channels, **arguments)
        check_decoder(decoder)
        product = tuple(prod(axis) for axis in zip(*strides, strict=True))
        if len(strides) < 3 or product != self.token_size:
            raise ValueError(
                f"strides {list(strides)} must be three or more whose product is the token {self.token_size}, for "
                "nnU-Net's trainer reads deep supervision from them. nnssl_plan_experiment writes them"
            )
        width = self.eva.embed_dim
        self.decoder: TokenToVoxels | PyramidDecoder | MLPDecoder
        if decoder == "unetr":
            self.decoder = PyramidDecoder(input_channels, width, num_classes, strides, deep_supervision)
        elif decoder == "mlp":
            self.decoder = MLPDecoder(width, num_classes, self.token_size, deep_supervision)
        else:
            self.decoder = TokenToVoxels(self.token_size, width, num_classes, deep_supervision)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, num_classes, *size) of images (B, C, *size); in a list under deep supervision."""
        return self.decoder(x, self.token_maps(x, self.decoder.num_maps))


class TokenToVoxels(nn.Module):
    """Primus' decoder: transposed convolutions from tokens back to voxels.

    Its widths follow the number of classes, so none of its layers fits another task. It therefore lies in `seg_layers`
    as a whole, the name under which nnU-Net expects layers that it need not find in pretrained weights.

    Args:
        token_size: Voxels per axis of a token.
        embed_dim: Width of a token.
        num_classes: Output channels.
        deep_supervision: Whether the output comes in a list.
    """

    num_maps = 1

    def __init__(self, token_size: tuple[int, ...], embed_dim: int, num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.flat = len(token_size) == 2
        decode = PatchDecode((1, *token_size) if self.flat else token_size, embed_dim, num_classes)
        self.seg_layers = nn.ModuleList([decode])
        self.apply(InitWeights_He(HE_SLOPE))

    def forward(self, image: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, num_classes, *size) from the one map of tokens (B, embed_dim, *grid); the image is not used."""
        (features,), (decode,) = maps, self.seg_layers
        output = decode(features.unsqueeze(2)).squeeze(2) if self.flat else decode(features)
        return [output] if self.deep_supervision else output


def _check(patch_size: Sequence[int], token: Sequence[int], width: int, num_heads: int) -> None:
    dims = len(token)
    if dims not in HEAD_DIVISOR or any(log2(edge) % 1 for edge in token) or max(token) == 1:
        raise ValueError(f"a token of {tuple(token)} voxels is not possible: 2 or 3 powers of two, not all 1")
    check_divisible(tuple(patch_size), tuple(token))
    if width % num_heads or width // num_heads % HEAD_DIVISOR[dims]:
        raise ValueError(
            f"embed_dim={width} over {num_heads} heads is not possible: each head's width must be divisible by "
            f"{HEAD_DIVISOR[dims]}, for rotary positions along {dims} axes"
        )


def pick(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The values (B or 1, tokens, D) of the kept tokens (B, n): (B, n, D); those of an empty place have no meaning."""
    index = kept.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1])
    return values.expand(len(kept), -1, -1).gather(1, index)


def attended(filled: torch.Tensor, num_registers: int = 0) -> torch.Tensor:
    """Which places attention looks at; whether all of them are is not asked, for a GPU would have to be waited for.

    The first place always counts, since attention to nothing is not a number.

    Args:
        filled: (B, n), False at empty places.
        num_registers: Tokens before them, which always count.

    Returns:
        (B, 1, 1, registers + n), bool.
    """
    first = torch.arange(filled.shape[1], device=filled.device) == 0
    return functional.pad(filled | first, (num_registers, 0), value=True)[:, None, None]


def resample_positions(embedding: torch.Tensor, source: Sequence[int], target: Sequence[int]) -> torch.Tensor:
    """A learned position embedding for another grid of tokens, interpolated linearly along every axis.

    Args:
        embedding: (1, registers + tokens, D), tokens with the last axis fastest.
        source: Tokens per axis that it was learned for.
        target: Tokens per axis that it is wanted for.

    Returns:
        (1, registers + wanted tokens, D).

    Raises:
        ValueError: If it holds fewer tokens than `source` says.
    """
    num_registers = embedding.shape[1] - prod(source)
    if num_registers < 0:
        raise ValueError(f"a position embedding of {embedding.shape[1]} tokens does not fill a grid of {tuple(source)}")
    if tuple(source) == tuple(target):
        return embedding
    registers, places = embedding.split([num_registers, prod(source)], dim=1)
    image = places.transpose(1, 2).unflatten(2, tuple(source))
    resized = functional.interpolate(image, size=tuple(target), mode=INTERPOLATION[len(source)])
    return torch.cat([registers, resized.flatten(2).transpose(1, 2)], dim=1)


def rotary_table(rope: RotaryEmbeddingCat, own: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    """The rotary rows of a grid's tokens; positions count tokens, so that a distance means the same on every grid.

    Args:
        rope: The library's table.
        own: The grid that it was made for.
        grid: The grid that is wanted.

    Returns:
        (tokens, 2 x head width): sines, then cosines.
    """
    table = rope.get_embed()
    if tuple(own) == tuple(grid):
        return table
    halves = build_rotary_pos_embed(
        list(grid), dim=rope.dim, temperature=rope.temperature, in_pixels=rope.in_pixels, device=table.device
    )
    return torch.cat(halves, -1).to(table.dtype)


def evamae_rows(table: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The rotary rows that upstream's EvaMAE gave the tokens of a grid (I, J, K).

    It counts tokens with the second axis slowest, and takes their rows from a table made for the first: (i, j, k) gets
    row (j I + i) K + k.

    Args:
        table: (tokens, width), with the first axis slowest.
        grid: Tokens per axis, three of them.

    Returns:
        (tokens, width), tokens with the first axis slowest.
    """
    first, second, third = grid
    return table.unflatten(0, (second, first, third)).transpose(0, 1).flatten(0, 2)


def build_primus(configuration: Configuration) -> PrimusEncoder:
    """The plan's transformer without a decoder.

    Raises:
        ValueError: Where the architecture names another patch than the configuration, or cannot be built.
    """
    arguments = {k: v for k, v in configuration.architecture["arch_kwargs"].items() if k != "strides"}
    _check_patch(configuration)
    return PrimusEncoder(configuration.num_input_channels, **arguments)


def _check_patch(configuration: Configuration) -> None:
    planned = tuple(configuration.architecture["arch_kwargs"]["input_shape"])
    if planned != configuration.patch_size:
        raise ValueError(
            f"patch_size {configuration.patch_size} differs from the transformer's input_shape {planned}. Set both to "
            "the same in the plans, or plan anew with: nnssl_plan_experiment -d DATASET"
        )


def export_primus(configuration: Configuration, encoder: PrimusEncoder) -> nn.Module:
    """The plan's whole network in the library's key names, with as many outputs as input channels.

    Args:
        configuration: What the encoder was built from.
        encoder: The trained encoder; the network shares its memory. The decoder is fresh, the same every time.

    Returns:
        The network in eval mode, on the encoder's device.
    """
    channels = configuration.num_input_channels
    with torch.device("meta"):
        network = build_network(configuration, channels)
    encoder.hand_over(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(EXPORT_SEED)
        network.decoder = TokenToVoxels(encoder.token_size, encoder.channels[-1], channels, deep_supervision=False)
    network.to(next(encoder.parameters()).device)
    network.eval()
    return network
