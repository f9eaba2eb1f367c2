"""Decoders for fine-tuning a transformer: shapes and scales, what each may see, and what they take from which block."""

from itertools import accumulate
from math import prod

import pytest
import torch

from nnssl_ext.models.primus import SegmentationPrimus
from nnssl_ext.planners.primus import DECODERS, pyramid_strides, token_strides, with_decoder

ARGUMENTS = {"embed_dim": 24, "eva_depth": 4, "eva_numheads": 2, "init_values": 0.1, "scale_attn_inner": True}
CASES = [
    ((16, 16, 24), (8, 8, 8)),
    ((6, 16, 8), (2, 4, 4)),
    ((4, 16, 16), (1, 8, 8)),
    ((16, 24), (8, 8)),
    ((8, 6), (2, 2)),
]


def make(decoder: str, patch_size, token, deep_supervision: bool = True) -> SegmentationPrimus:
    torch.manual_seed(0)
    strides = pyramid_strides(token) if decoder == "unetr" else token_strides(token)
    return SegmentationPrimus(
        2,
        3,
        strides=strides,
        decoder=decoder,
        deep_supervision=deep_supervision,
        input_shape=patch_size,
        patch_embed_size=token,
        **ARGUMENTS,
    )


def image(patch_size) -> torch.Tensor:
    return torch.randn(2, 2, *patch_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("token", "strides"),
    [
        ((8, 8, 8), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
        ((2, 8, 8), ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))),
        ((1, 4, 4), ((1, 1, 1), (1, 2, 2), (1, 2, 2))),
        ((8, 2), ((1, 1), (2, 1), (2, 1), (2, 2))),
        ((2, 2), ((1, 1), (2, 2), (1, 1))),
    ],
)
def test_a_pyramid_halves_what_is_finest_first(token, strides):
    assert pyramid_strides(token) == strides
    assert tuple(prod(axis) for axis in zip(*strides, strict=True)) == token


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("patch_size", "token"), CASES)
def test_outputs_have_the_sizes_that_nnunets_loss_expects(decoder, patch_size, token):
    """nnU-Net's targets: the patch over the cumulative product of the strides, without the last one."""
    network = make(decoder, patch_size, token)
    outputs = network(image(patch_size))
    strides = pyramid_strides(token) if decoder == "unetr" else token_strides(token)
    scales = list(accumulate(strides, lambda a, b: tuple(x * y for x, y in zip(a, b, strict=True))))[:-1]
    sizes = [tuple(edge // step for edge, step in zip(patch_size, scale, strict=True)) for scale in scales]
    assert [tuple(output.shape) for output in outputs] == [
        (2, 3, *size) for size in (sizes if decoder == "unetr" else sizes[:1])
    ]
    network.decoder.deep_supervision = False
    assert torch.equal(network(image(patch_size)), outputs[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_weight_learns(decoder):
    network = make(decoder, (16, 16, 24), (8, 8, 8))
    sum(output.square().mean() for output in network(image((16, 16, 24)))).backward()
    idle = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert [name for name in idle if not name.endswith("bias")] == []  # a norm undoes the bias ahead of it


def test_number_of_classes_changes_nothing_but_the_heads():
    shapes = {"input_shape": (8, 8), "patch_embed_size": (4, 4), **ARGUMENTS}
    for decoder in DECODERS:
        few, many = (
            SegmentationPrimus(1, classes, strides=token_strides((4, 4)), decoder=decoder, **shapes).state_dict()
            for classes in (2, 40)
        )
        changed = {name for name in few if few[name].shape != many[name].shape}
        assert changed
        assert all(".seg_layers." in name for name in changed)


@pytest.mark.parametrize(("decoder", "blocks"), [("primus", []), ("unetr", [2, 3]), ("mlp", [1, 2, 3])])
def test_maps_come_from_evenly_spaced_blocks(decoder, blocks):
    """Of four blocks: the pyramid over tokens of 8 takes three maps, the all-MLP decoder four; the last is normed."""
    network = make(decoder, (16, 16, 24), (8, 8, 8)).eval()
    seen = {}
    for number, block in enumerate(network.eva.blocks, start=1):
        block.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output}))
    x = image((16, 16, 24))
    maps = network.token_maps(x, network.decoder.num_maps)
    assert torch.equal(maps[-1], network.token_map(x))
    for features, number in zip(maps[:-1], blocks, strict=True):
        assert torch.equal(features, seen[number].transpose(1, 2).unflatten(2, (2, 2, 3)))


def test_the_all_mlp_decoder_sees_no_neighbour_but_by_interpolation():
    """A changed token reaches its own voxels and one position of the finer grid around them."""
    decoder = make("mlp", (24, 24), (8, 8)).decoder.eval()
    maps = [torch.randn(1, 24, 3, 3) for _ in range(4)]
    before = decoder(torch.zeros(1, 2, 24, 24), maps)[0]
    for features in maps:
        features[:, :, 1, 1] += torch.randn(24)
    moved = (decoder(torch.zeros(1, 2, 24, 24), maps)[0] != before).any(1)[0].nonzero()
    assert (moved.min().item(), moved.max().item()) == (7, 16)


def test_the_pyramid_sees_the_image_itself():
    network = make("unetr", (16, 16), (4, 4), deep_supervision=False).eval()
    x = image((16, 16))
    maps = network.token_maps(x, network.decoder.num_maps)
    assert not torch.equal(network.decoder(x, maps), network.decoder(x + torch.randn(x.shape), maps))


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder 'unet' is not known; valid: primus, unetr, mlp"):
        make("unet", (8, 8), (4, 4))
    with pytest.raises(ValueError, match="belongs to transformers"):
        with_decoder({"network_class_name": "a.U", "arch_kwargs": {}}, "mlp")
