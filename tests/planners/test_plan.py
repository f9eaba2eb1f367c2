import json
from copy import deepcopy

import pytest

from nnssl_ext.planners.plan import Plan


@pytest.fixture
def plan(tiny_plan):
    return tiny_plan()


def test_round_trip_keeps_every_key(plan, tmp_path):
    raw = deepcopy(plan.raw)
    raw["somebody_elses_key"] = {"kept": [1, 2]}
    raw["configurations"]["3d_fullres"]["another"] = 3
    Plan(raw).save(tmp_path / "plans.json")
    assert Plan.load(tmp_path / "plans.json").raw == raw


def test_configuration_is_typed(plan):
    configuration = plan.configuration("3d_fullres")
    assert configuration.patch_size == (16, 24, 8)
    assert configuration.dims == 3
    assert configuration.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    assert configuration.num_input_channels == 1
    assert configuration.spacing == (1.0, 1.0, 1.0)
    assert configuration.transpose_forward == (0, 1, 2)
    assert (plan.plans_name, plan.dataset_name) == ("nnsslPlans", "Dataset999_Tiny")


def test_hand_written_configuration_inherits_as_in_nnunet(plan):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw = deepcopy(plan.raw)
    raw["configurations"]["large"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    raw["configurations"]["larger"] = {"inherits_from": "large", "patch_size": [32, 32, 32]}
    configuration = Plan(raw).configuration("larger")
    assert (configuration.batch_size, configuration.patch_size) == (9, (32, 32, 32))
    assert configuration.data_identifier == "nnsslPlans_3d_fullres"
    theirs = PlansManager(raw).get_configuration("larger")
    assert theirs.configuration == {**configuration.raw, "inherits_from": "large"}
    assert raw["configurations"]["larger"] == {"inherits_from": "large", "patch_size": [32, 32, 32]}


def test_circular_inheritance_is_refused(plan):
    raw = deepcopy(plan.raw)
    raw["configurations"] = {"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}
    with pytest.raises(ValueError, match="a -> b -> a"):
        Plan(raw).configuration("a")


def test_unknown_configuration_lists_those_there(plan):
    with pytest.raises(ValueError, match=r"no configuration '2d'\. There: 3d_fullres"):
        plan.configuration("2d")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size", 16, "patch_size must be a list of whole numbers above 0, not 16"),
        ("patch_size", "16", "patch_size must be a list"),
        ("patch_size", [16, 16, 0], "patch_size must be a list"),
        ("patch_size", [16, 16], r"patch_size \[16, 16\] and spacing .* a number per axis"),
        ("spacing", [1, 1, None], "spacing must be a list of numbers above 0, in mm"),
        ("batch_size", "two", "batch_size must be a whole number, 1 or more, not 'two'"),
        ("features_per_stage", [8, 16], "features_per_stage of the network has 2 entries, for 3 stages"),
        ("strides", [[1, 1, 1], [2, 2], [2, 2, 2]], r"a stride of the network, \[2, 2\], has not a number"),
    ],
)
def test_what_an_edit_broke_is_named(plan, key, value, message):
    raw = deepcopy(plan.raw)
    changed = raw["configurations"]["3d_fullres"]
    (changed if key in changed else changed["architecture"]["arch_kwargs"])[key] = value
    with pytest.raises(ValueError, match=f"configuration '3d_fullres' of plans 'nnsslPlans': {message}"):
        Plan(raw).configuration("3d_fullres")


def test_missing_key_is_named(plan):
    raw = deepcopy(plan.raw)
    del raw["configurations"]["3d_fullres"]["spacing"]
    with pytest.raises(ValueError, match="'3d_fullres' of plans 'nnsslPlans' has no 'spacing'"):
        Plan(raw).configuration("3d_fullres")


def test_files_that_are_no_plans_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nnssl_plan_experiment"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"plans_name": "x"}))
    with pytest.raises(ValueError, match="dataset_name, image_reader_writer"):
        Plan.load(tmp_path / "other.json")


def test_nnunets_own_plans_are_read(tmp_path):
    """A plans file without any of our keys, as nnU-Net 2.8 writes them."""
    raw = {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 9,
                "patch_size": [40, 56, 40],
                "spacing": [1.0, 1.0, 1.0],
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
                "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                    "arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]},
                    "_kw_requires_import": [],
                },
            }
        },
    }
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(raw))
    assert Plan.load(tmp_path / "nnUNetPlans.json").configuration("3d_fullres").patch_size == (40, 56, 40)
