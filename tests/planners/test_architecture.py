import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl_ext.planners.architecture import measure_unet, resenc_architecture
from nnssl_ext.planners.rules import StepCost, estimate_memory, topology


def build(architecture, num_channels=1, num_outputs=1):
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        num_channels,
        num_outputs,
        allow_init=False,
        deep_supervision=False,
    )


def resenc(patch_size, spacing=None, base_features=8, blocks=(1, 2, 2)):
    shape = topology(spacing or [1.0] * len(patch_size), patch_size)
    return resenc_architecture(shape, base_features=base_features, max_features=320, blocks=blocks)


@pytest.fixture(scope="module")
def resenc_l():
    return resenc((160, 160, 160), base_features=32, blocks=(1, 3, 4, 6, 6, 6))


def test_resenc_l_is_upstreams(resenc_l):
    arch = resenc_l["arch_kwargs"]
    assert arch["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert arch["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    assert arch["kernel_sizes"] == [[3, 3, 3]] * 6
    with torch.device("meta"):
        network = build(resenc_l)
    state = network.state_dict()
    assert len(state) == 956
    assert sum(key.startswith("encoder.") for key in state) == 448
    assert sum(key.startswith("decoder.encoder.") for key in state) == 448
    assert sum(parameter.numel() for parameter in network.parameters()) == 102_348_965


def test_memory_of_resenc_l_is_the_published_one(resenc_l):
    """ResEnc L, MAE, bf16, H200, 192³, batch 2: 18.3 GiB measured."""
    assert estimate_memory(resenc_l, (192, 192, 192), 2, StepCost()) == pytest.approx(18.3, rel=0.05)


@pytest.mark.parametrize(
    ("patch_size", "spacing", "channels", "outputs"),
    [
        ((32, 32, 32), (1.0, 1.0, 1.0), 1, 1),
        ((12, 48, 40), (4.0, 1.0, 1.0), 2, 3),
        ((64, 48), (1.0, 1.0), 3, 3),
    ],
)
def test_sizes_are_those_of_the_built_network(patch_size, spacing, channels, outputs):
    architecture = resenc(patch_size, spacing)
    network = build(architecture, channels, outputs)
    size = measure_unet(architecture, patch_size, channels, outputs)
    of_encoder = sum(parameter.numel() for parameter in network.encoder.parameters())
    assert size.encoder_parameters == of_encoder
    assert size.decoder_parameters == sum(parameter.numel() for parameter in network.parameters()) - of_encoder
    image = torch.zeros(1, channels, *patch_size)
    kept = kept_for_gradient(network, image) - image.numel()
    assert size.encoder_values + size.decoder_values == pytest.approx(kept, rel=0.01)
    kept_by_encoder = kept_for_gradient(network.encoder, image) - image.numel()
    assert size.encoder_values == pytest.approx(kept_by_encoder, rel=0.01)


def kept_for_gradient(module, image):
    """Values that autograd keeps for the backward pass, parameters aside: each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(image)
    del output
    return sum(values for values, _ in kept.values())


def test_memory_counts_views_copies_and_decoder(resenc_l):
    patch = (64, 64, 64)
    one = estimate_memory(resenc_l, patch, 2, StepCost())
    size = measure_unet(resenc_l, patch, 1, 1)
    kept = size.encoder_values + size.decoder_values
    two_views = estimate_memory(resenc_l, patch, 2, StepCost(views=2))
    assert two_views - one == pytest.approx(2 * kept * 2 / 2**30)
    teacher = estimate_memory(resenc_l, patch, 2, StepCost(copies=2))
    assert teacher - one == pytest.approx(102_348_965 * 4 / 2**30)
    encoder_only = estimate_memory(resenc_l, patch, 2, StepCost(decoder=False))
    assert one - encoder_only == pytest.approx((2 * size.decoder_values * 2 + size.decoder_parameters * 16) / 2**30)
    assert estimate_memory(resenc_l, patch, 2, StepCost(), bytes_per_value=4) > one


def test_step_cost_refuses_nonsense():
    with pytest.raises(ValueError, match="views=0 must be above 0"):
        StepCost(views=0)
    with pytest.raises(ValueError, match="copies=0 must be 1 or more"):
        StepCost(copies=0)


def test_unknown_architecture_is_refused(resenc_l):
    with pytest.raises(ValueError, match=r"size of some\.Net is not known"):
        estimate_memory({**resenc_l, "network_class_name": "some.Net"}, (64, 64, 64), 2, StepCost())
