"""Transformers in plans: tokens, patches of whole tokens, names that upstream knows, sizes of the built network."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.engine.checkpoint import adaptation_plan
from nnssl_ext.models.primus import PrimusEncoder, build_primus
from nnssl_ext.models.token_decoder import TokenDecoder
from nnssl_ext.planners.planner import PLANNERS, PlanningOptions
from nnssl_ext.planners.primus import PRIMUS_SIZES, measure_primus, named_primus, primus_architecture, token_size
from nnssl_ext.planners.rules import StepCost, estimate_memory, patch_candidates


@pytest.mark.parametrize(
    ("spacing", "token"),
    [((1, 1, 1), (8, 8, 8)), ((3, 1, 1), (4, 8, 8)), ((5, 1, 1), (2, 8, 8)), ((40, 1, 1), (1, 8, 8)), ((1, 1), (8, 8))],
)
def test_tokens_are_about_equally_long_along_all_axes(spacing, token):
    assert token_size(spacing) == token


@pytest.mark.parametrize("size", ["XS", "S", "M", "L"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 1.0)])
def test_presets_plan_patches_of_whole_tokens_that_can_be_built(tiny_vit_plan, size, spacing):
    planner = PLANNERS.get(f"nnsslPlannerPrimus{size}")(PlanningOptions())
    dims = len(spacing)
    for chosen in patch_candidates(spacing, (75, 131, 90)[-dims:], planner.max_edge[dims] ** dims, planner.topology):
        token = token_size(spacing)
        assert all(edge % step == 0 for edge, step in zip(chosen.patch_size, token, strict=True))
    plan = tiny_vit_plan(chosen.patch_size)
    configuration = replace(plan.configuration(plan.configuration_names[0]), architecture=planner.architecture(chosen))
    with torch.device("meta"):
        encoder = build_primus(configuration)
    assert encoder.token_size == token


@pytest.mark.parametrize(("size", "dims"), [("XS", 3), ("S", 3), ("M", 3), ("XS", 2), ("S", 2)])
def test_sizes_are_those_of_the_built_network(size, dims):
    patch = (64, 48, 32)[-dims:]
    architecture = primus_architecture(PRIMUS_SIZES[size], patch, (8,) * dims)
    arguments = {name: value for name, value in architecture["arch_kwargs"].items() if name != "strides"}
    with torch.device("meta"):
        encoder = PrimusEncoder(2, **arguments)
        decoder = TokenDecoder(encoder, 2, 2, encoder.num_heads // 2)
    measured = measure_primus(architecture, patch, 2, 2)
    assert measured.encoder_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert measured.decoder_parameters == sum(parameter.numel() for parameter in decoder.parameters())


def test_fewer_tokens_take_less_memory():
    architecture = named_primus("M", (160,) * 3)
    every = estimate_memory(architecture, (160,) * 3, 2, StepCost())
    assert estimate_memory(architecture, (160,) * 3, 2, StepCost(tokens=0.25)) < every
    with pytest.raises(ValueError, match=r"tokens=0 must lie in \(0, 1\]"):
        StepCost(tokens=0)


@pytest.mark.parametrize("name", ["S", "B", "M", "L"])
def test_the_adaptation_plan_names_what_upstream_knows(tiny_vit_plan, name):
    plan = tiny_vit_plan((32, 24, 16))
    configuration = replace(plan.configuration("3d_fullres"), architecture=named_primus(name, (32, 24, 16)))
    with torch.device("meta"):
        written = adaptation_plan(plan, configuration, build_primus(configuration))
    architecture = {"arch_class_name": f"Primus{name}", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    assert written["architecture_plans"] == architecture
    keys = {key: written[key] for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe")}
    assert list(keys.values()) == ["eva", "down_projection", ["down_projection.proj"], "eva.pos_embed"]


def test_other_networks_are_written_by_class_path(tiny_vit_plan):
    plan = tiny_vit_plan()
    configuration = plan.configuration("3d_fullres")
    written = adaptation_plan(plan, configuration, build_primus(configuration))["architecture_plans"]
    assert written["arch_class_name"] == "nnssl_ext.models.primus.SegmentationPrimus"
    assert written["arch_kwargs"] == configuration.architecture["arch_kwargs"]
