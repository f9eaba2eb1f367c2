"""The transformer: the stock network's numbers, tokens left out with their rotary rows, other sizes, and its export."""

from dataclasses import replace
from math import prod

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl_ext.models.primus import (
    PrimusEncoder,
    SegmentationPrimus,
    build_primus,
    export_primus,
    resample_positions,
    rotary_table,
)
from tests.tasks import disturb

TOKENS = {2: (4, 4), 3: (2, 4, 4)}
ARGUMENTS = {"embed_dim": 24, "eva_depth": 2, "eva_numheads": 2, "init_values": 0.1, "scale_attn_inner": True}


@pytest.fixture
def configuration(patch_size, tiny_vit_plan):
    plan = tiny_vit_plan(patch_size, channels=2)
    return plan.configuration(plan.configuration_names[0])


def image(patch_size, channels: int = 2) -> torch.Tensor:
    return torch.randn(2, channels, *patch_size, generator=torch.Generator().manual_seed(0))


def make_encoder(patch_size=(8, 16, 12), registers: int = 0) -> PrimusEncoder:
    encoder = PrimusEncoder(2, patch_size, TOKENS[len(patch_size)], num_register_tokens=registers, **ARGUMENTS).eval()
    disturb(encoder)
    return encoder


@pytest.mark.parametrize(
    ("patch_size", "token"), [((16, 24, 8), (2, 4, 4)), ((16, 32, 24), (8, 8, 8)), ((4, 16, 16), (1, 8, 8))]
)
@pytest.mark.parametrize("registers", [0, 3])
def test_exported_weights_compute_in_the_stock_network_what_they_do_in_ours(
    tiny_vit_plan, patch_size, token, registers
):
    shapes = {"input_shape": patch_size, "patch_embed_size": token, "num_register_tokens": registers}
    strides = [[1, 1, 1], [1, 1, 1], list(token)]
    configuration = tiny_vit_plan(patch_size, channels=2).configuration("3d_fullres")
    architecture = {**configuration.architecture, "arch_kwargs": {**ARGUMENTS, **shapes, "strides": strides}}
    configuration = replace(configuration, architecture=architecture)
    encoder = build_primus(configuration).eval()
    disturb(encoder)
    weights = export_primus(configuration, encoder).state_dict()
    stock = Primus(input_channels=2, num_classes=2, **shapes, **ARGUMENTS).eval()
    renamed = {name.replace("decoder.seg_layers.0", "up_projection"): value for name, value in weights.items()}
    loaded = stock.load_state_dict(renamed, strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["mask_token"], [])
    x = image(patch_size)
    expected = stock(x)
    assert torch.equal(export_primus(configuration, encoder)(x), expected)
    assert torch.equal(stock.up_projection(encoder.token_map(x)), expected)


@pytest.mark.parametrize("registers", [0, 3])
def test_dropping_nothing_is_the_whole_forward_pass(registers):
    encoder = make_encoder(registers=registers)
    x = image((8, 16, 12))
    everything = torch.arange(prod(encoder.grid)).expand(2, -1)
    assert torch.equal(encoder.tokens(x, everything), encoder.tokens(x))


@pytest.mark.parametrize("registers", [0, 3])
def test_order_of_kept_tokens_does_not_matter(registers):
    """Position and rotary row follow the token: shuffled tokens come out the same, shuffled."""
    encoder = make_encoder(registers=registers)
    x, order = image((8, 16, 12)), torch.randperm(48, generator=torch.Generator().manual_seed(2))
    kept = torch.stack([torch.arange(0, 48, 3), torch.arange(1, 48, 3)])
    mixed = order[order < kept.shape[1]]
    torch.testing.assert_close(encoder.tokens(x, kept[:, mixed]), encoder.tokens(x, kept)[:, mixed])


def test_rotary_rows_are_those_of_the_kept_tokens():
    """Every block gets, for each kept token, the row of that token's place in the library's table."""
    encoder = make_encoder()
    seen = []
    encoder.eva.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["rope"]), with_kwargs=True
    )
    kept = torch.tensor([[0, 7, 30], [3, 5, 47]])
    encoder.tokens(image((8, 16, 12)), kept)
    table = encoder.eva.rope.get_embed()
    assert len({tuple(row.tolist()) for row in table}) == 48  # places differ, so a wrong row would show
    for sample, places in enumerate(kept.tolist()):
        for slot, place in enumerate(places):
            assert torch.equal(seen[0][sample, 0, slot], table[place])


def test_tokens_left_out_have_no_influence():
    encoder = make_encoder()
    kept = torch.tensor([[0, 7, 30], [3, 5, 47]])
    x = image((8, 16, 12))
    index = torch.arange(48).view(1, 1, *encoder.grid)
    for axis, edge in enumerate(encoder.token_size, start=2):
        index = index.repeat_interleave(edge, axis)
    visible = torch.stack([torch.isin(index[0], places) for places in kept])
    spoilt = torch.where(visible, x, float("nan"))
    assert torch.equal(encoder.tokens(spoilt, kept), encoder.tokens(x, kept))


def test_empty_places_have_no_influence():
    encoder = make_encoder()
    x = image((8, 16, 12))
    few = encoder.tokens(x[:1], torch.tensor([[2, 9]]))
    padded = encoder.tokens(x, torch.tensor([[2, 9, -1, -1], [1, 2, 3, 4]]))
    torch.testing.assert_close(padded[:1, :2], few)
    assert torch.isfinite(encoder.tokens(x, torch.full((2, 3), -1))).all()


def test_no_device_is_waited_for():
    """A value of a meta tensor cannot be read, as reading one from a GPU would stop the training.

    Catches asking whether any place is empty before the blocks are run.
    """
    encoder = make_encoder(registers=1).to("meta")
    assert encoder.tokens(image((8, 16, 12)).to("meta"), torch.tensor([[2, -1], [1, 2]]).to("meta")).shape == (2, 2, 24)


def test_tokens_lie_at_their_places():
    """The map's position (i, j, k) holds the token of the box of voxels at (i, j, k), on a patch that is no cube."""
    encoder = make_encoder()
    encoder.eva.blocks = torch.nn.ModuleList()  # each token alone
    x = image((8, 16, 12))
    before = encoder.token_map(x)
    for place in ((0, 0, 0), (3, 1, 2), (1, 3, 0)):
        changed = x.clone()
        box = (..., *(slice(p * edge, (p + 1) * edge) for p, edge in zip(place, encoder.token_size, strict=True)))
        changed[box] += torch.randn(changed[box].shape)
        moved = (encoder.token_map(changed) != before).any(1)
        assert moved.nonzero()[:, 1:].unique(dim=0).tolist() == [list(place)]


def test_contract_of_encoders(configuration):
    encoder = build_primus(configuration).eval()
    (features,) = encoder.feature_maps(image(configuration.patch_size))
    token = TOKENS[configuration.dims]
    assert (encoder.channels, encoder.strides) == ((24,), (token,))
    grid = tuple(size // edge for size, edge in zip(configuration.patch_size, token, strict=True))
    assert features.shape == (2, 24, *grid)
    assert torch.allclose(encoder.pooled(image(configuration.patch_size)), features.flatten(2).mean(2))
    network = export_primus(configuration, encoder)
    state = network.state_dict()
    assert network.get_submodule(encoder.stem_key) is network.down_projection
    assert network.get_submodule(encoder.stages_key) is network.eva
    (in_proj,) = encoder.in_proj_keys
    assert state[f"{in_proj}.weight"].shape[1] == 2
    assert state[encoder.position_key].shape == (1, prod(grid), 24)


def test_export_shares_memory_and_leaves_training_and_the_generator_alone(configuration):
    encoder = build_primus(configuration).train()
    torch.manual_seed(5)
    first = export_primus(configuration, encoder)
    drawn = torch.rand(1)
    second = export_primus(configuration, encoder)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert encoder.eva.blocks[1].drop_path1.training
    trained = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert trained <= {parameter.data_ptr() for parameter in first.parameters()}
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    encoder.eval()
    x = image(configuration.patch_size)
    assert torch.equal(first.token_map(x), encoder.token_map(x))


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_nnunet_builds_it_and_switches_deep_supervision(configuration, deep_supervision):
    architecture = configuration.architecture
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], [], 2, 5, deep_supervision=deep_supervision
    )
    x = image(configuration.patch_size)
    for on in (deep_supervision, not deep_supervision):
        network.decoder.deep_supervision = on
        output = network(x)
        assert isinstance(output, list) is on
        assert (output[0] if on else output).shape == (2, 5, *configuration.patch_size)
    own = ("down_projection.", "eva.")
    assert all(".seg_layers." in name for name in network.state_dict() if not name.startswith(own))


def test_an_image_of_another_size_keeps_distances(configuration):
    """Positions count tokens on every grid, so a grid's rows begin a larger one's."""
    encoder = build_primus(configuration).eval()
    larger = tuple(2 * size for size in configuration.patch_size)
    assert encoder.token_map(image(larger)).shape[2:] == tuple(2 * size for size in encoder.grid)
    table = rotary_table(encoder.eva.rope, encoder.grid, [2 * size for size in encoder.grid])
    corner = table.view(*(2 * size for size in encoder.grid), -1)[tuple(slice(size) for size in encoder.grid)]
    assert torch.equal(corner.flatten(0, -2), encoder.eva.rope.get_embed())


def test_positions_are_interpolated_along_every_axis():
    """A ramp along one axis stays a ramp along it, on grids that are no cubes; registers are kept."""
    source, target = (2, 4, 3), (4, 4, 6)
    ramps = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in source), indexing="ij"), -1)
    registers = torch.full((1, 2, 3), 7.0)
    embedding = torch.cat([registers, ramps.view(1, -1, 3)], 1)
    resized = resample_positions(embedding, source, target)
    assert torch.equal(resized[:, :2], registers)
    grid = resized[0, 2:].view(*target, 3)
    for axis, (old, new) in enumerate(zip(source, target, strict=True)):
        expected = ((torch.arange(new) + 0.5) * old / new).clamp(0.5, old - 0.5)
        column = grid[..., axis].movedim(axis, -1)
        torch.testing.assert_close(column, expected.expand_as(column))
    assert resample_positions(embedding, source, source) is embedding
    with pytest.raises(ValueError, match=r"26 tokens does not fill a grid of \(3, 3, 3\)"):
        resample_positions(embedding, (3, 3, 3), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": (9, 16, 12)}, r"\(9, 16, 12\) is not divisible .* Set patch_size to \(10, 16, 12\)"),
        ({"patch_embed_size": (2, 6, 4)}, r"token of \(2, 6, 4\) voxels is not possible"),
        ({"patch_embed_size": (1, 1, 1)}, r"token of \(1, 1, 1\) voxels is not possible"),
        ({"embed_dim": 20}, "embed_dim=20 over 2 heads is not possible: each head's width must be divisible by 6"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    arguments = {"input_shape": (8, 16, 12), "patch_embed_size": (2, 4, 4), **ARGUMENTS, **change}
    with pytest.raises(ValueError, match=message):
        PrimusEncoder(1, **arguments)


def test_strides_that_nnunet_cannot_use_are_refused():
    shapes = {"input_shape": (8, 16), "patch_embed_size": (4, 4)}
    for strides in ([[1, 1], [4, 4]], [[1, 1], [2, 2], [4, 4]]):
        with pytest.raises(ValueError, match=r"three or more whose product is the token \(4, 4\)"):
            SegmentationPrimus(1, 2, strides=strides, **shapes, **ARGUMENTS)


def test_a_patch_edited_in_one_place_only_is_refused(configuration):
    edited = replace(configuration, patch_size=tuple(2 * size for size in configuration.patch_size))
    with pytest.raises(ValueError, match=r"differs from the transformer's input_shape"):
        build_primus(edited)
