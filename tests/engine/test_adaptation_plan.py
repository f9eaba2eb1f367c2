"""What a checkpoint says about itself, to the key as upstream's fine-tuning tools read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.trainers.mae import MAETrainer

KEYS = {
    "architecture_plans": {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"},
    "pretrain_plan": {
        "dataset_name",
        "plans_name",
        "original_median_spacing_after_transp",
        "image_reader_writer",
        "transpose_forward",
        "transpose_backward",
        "experiment_planner_used",
        "configurations",
    },
    "pretrain_num_input_channels": int,
    "recommended_downstream_patchsize": list,
    "key_to_encoder": str,
    "key_to_stem": str,
    "keys_to_in_proj": list,
    "key_to_lpe": (str, type(None)),
}
"""Upstream's adaptation plan: sets of keys, or types of values."""
CONFIGURATION_KEYS = {
    "data_identifier",
    "preprocessor_name",
    "spacing_style",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_mask",
    "resampling_fn_mask_kwargs",
    "spacing",
    "patch_size",
}


@pytest.mark.parametrize(("backbone", "fixture"), [("cnn", "tiny_plan"), ("vit", "tiny_vit_plan")])
def test_the_adaptation_plan_has_upstreams_keys_and_no_others(
    request: pytest.FixtureRequest, tmp_path: Path, backbone: str, fixture: str
) -> None:
    plan, trainer = request.getfixturevalue(fixture)(), MAETrainer.configured([], backbone)
    task = trainer.build_task(plan.configuration("3d_fullres"), num_cases=4)
    save_checkpoint(tmp_path / "checkpoint_final.pth", build_checkpoint(task, trainer, plan, content_hashes=[]))
    saved = torch.load(tmp_path / "checkpoint_final.pth", weights_only=True)
    assert {"network_weights", "citations", "nnssl_adaptation_plan"} <= set(saved)
    found = saved["nnssl_adaptation_plan"]
    assert set(found) == set(KEYS)
    for key, expected in KEYS.items():
        if isinstance(expected, set):
            assert set(found[key]) == expected, key
        else:
            assert isinstance(found[key], expected), key
    (configuration,) = found["pretrain_plan"]["configurations"].values()  # only the one used
    assert set(configuration) == CONFIGURATION_KEYS
    prefixes = [found["key_to_encoder"], found["key_to_stem"]]
    assert all(any(key.startswith(f"{prefix}.") for key in saved["network_weights"]) for prefix in prefixes)
    assert all(f"{key}.weight" in saved["network_weights"] for key in found["keys_to_in_proj"])
    assert (found["key_to_lpe"] in saved["network_weights"]) is (backbone == "vit")


def test_an_encoder_is_loaded_under_its_prefix_by_both_names(tiny_plan) -> None:
    """Upstream strips the prefix and loads strictly into stem and stages: every alias must be there."""
    plan, trainer = tiny_plan(), MAETrainer.configured([])
    task = trainer.build_task(plan.configuration("3d_fullres"), num_cases=4)
    content = build_checkpoint(task, trainer, plan, content_hashes=[])
    network, found = task.export_network(), content["nnssl_adaptation_plan"]
    for prefix in (found["key_to_encoder"], found["key_to_stem"]):
        part = {k.removeprefix(f"{prefix}."): v for k, v in content["network_weights"].items() if k.startswith(prefix)}
        network.get_submodule(prefix).load_state_dict(part, strict=True)
        assert any(".conv." in key or key.startswith("conv.") for key in part)
        assert any("all_modules." in key for key in part)
    assert any(key.startswith("decoder.encoder.") for key in content["network_weights"])
