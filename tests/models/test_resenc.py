"""The U-Net backbone: its contract, what it refuses, and that export is the stock network with the trained weights."""

from dataclasses import replace

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl_ext.engine.checkpoint import resenc_l
from nnssl_ext.models.resenc import UNetEncoder, build_network, build_unet, export_unet
from tests.tasks import disturb


@pytest.fixture
def configuration(patch_size, tiny_plan):
    plan = tiny_plan(patch_size, channels=2)
    return plan.configuration(plan.configuration_names[0])


def image(configuration) -> torch.Tensor:
    return torch.randn(2, 2, *configuration.patch_size, generator=torch.Generator().manual_seed(0))


def test_feature_maps_have_the_declared_channels_and_strides(configuration):
    encoder, _ = build_unet(configuration, 2)
    maps = encoder.feature_maps(image(configuration))
    assert [features.shape[1] for features in maps] == list(encoder.channels) == [4, 8, 16]
    for features, stride in zip(maps, encoder.strides, strict=True):
        sizes = zip(configuration.patch_size, stride, strict=True)
        assert tuple(features.shape[2:]) == tuple(size // step for size, step in sizes)
    pooled = encoder.pooled(image(configuration))
    assert torch.allclose(pooled, maps[-1].flatten(2).mean(2))


def test_keys_lie_in_the_exported_network(configuration):
    encoder, decoder = build_unet(configuration, 2)
    network = export_unet(configuration, encoder, decoder)
    assert network.get_submodule(encoder.stem_key) is network.encoder.stem
    assert network.get_submodule(encoder.stages_key) is network.encoder.stages
    weights = [network.get_submodule(key).weight for key in encoder.in_proj_keys]
    assert len(weights) == 2
    assert all(weight is weights[0] and weight.shape[1] == 2 for weight in weights)


@pytest.mark.parametrize("with_decoder", [True, False])
def test_export_computes_the_same_and_shares_memory(configuration, with_decoder):
    encoder, decoder = build_unet(configuration, 2)
    disturb(decoder)  # holds the encoder
    network = export_unet(configuration, encoder, decoder if with_decoder else None)
    x = image(configuration)
    for exported, trained in zip(network.encoder(x), encoder(x), strict=True):
        assert torch.equal(exported, trained)
    assert torch.equal(network(x), decoder(encoder(x))) is with_decoder
    trained = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert trained <= {parameter.data_ptr() for parameter in network.parameters()}


def test_fresh_parts_are_the_same_every_time_and_leave_the_generator_alone(configuration):
    encoder, _ = build_unet(configuration, 2)
    torch.manual_seed(5)
    first = export_unet(configuration, encoder)
    drawn = torch.rand(1)
    second = export_unet(configuration, encoder)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_built_network_is_the_stock_one(configuration):
    architecture = configuration.architecture
    stock = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 2, 5
    )
    ours = build_network(configuration, 5)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert ours.decoder.deep_supervision is False


def test_plain_unets_have_their_stem_in_the_first_stage(configuration):
    kwargs = dict(configuration.architecture["arch_kwargs"])
    kwargs["n_conv_per_stage"] = kwargs.pop("n_blocks_per_stage")
    plain = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    configuration = replace(
        configuration, architecture={**configuration.architecture, "network_class_name": plain, "arch_kwargs": kwargs}
    )
    encoder, decoder = build_unet(configuration, 2)
    network = export_unet(configuration, encoder, decoder)
    assert encoder.stem_key == "encoder.stages.0"
    assert network.get_submodule(encoder.in_proj_keys[0]).weight.shape[1] == 2
    assert torch.equal(network(image(configuration)), decoder(encoder(image(configuration))))


def test_a_patch_that_cannot_be_halved_is_refused_with_one_that_can(configuration):
    with pytest.raises(ValueError, match=r"not divisible by the network's strides \(4, 4.*Set patch_size to \(20, "):
        build_unet(replace(configuration, patch_size=(18, *configuration.patch_size[1:])), 2)


def test_other_networks_are_refused(configuration):
    architecture = {**configuration.architecture, "network_class_name": "some.where.Primus"}
    with pytest.raises(ValueError, match=r"not on some\.where\.Primus"):
        build_unet(replace(configuration, architecture=architecture), 2)


def test_resenc_l_is_upstreams(tiny_plan):
    configuration = tiny_plan((160, 160, 160)).configuration("3d_fullres")
    with torch.device("meta"):
        network = build_network(replace(configuration, architecture=resenc_l()), 1)
    keys = list(network.state_dict())
    assert len(keys) == 956
    assert sum(key.startswith("encoder.") for key in keys) == 448
    assert sum(key.startswith("decoder.encoder.") for key in keys) == 448
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(102.35e6, rel=1e-4)
    assert UNetEncoder(network).strides[-1] == (32, 32, 32)
