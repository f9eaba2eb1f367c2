import json
import re
from math import prod
from pathlib import Path

import pytest
import torch
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.cli.plan_experiment import parser
from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.fingerprint.record import CaseFingerprint, Fingerprint, IntensityStatistics
from nnssl_ext.planners.plan import Plan
from nnssl_ext.planners.planner import PLANNERS, PlanningOptions, plan_experiment, save_plan
from nnssl_ext.planners.rules import FULL_PRECISION_BYTES, USABLE_SHARE, StepCost

STATISTICS = IntensityStatistics(
    mean=60.0, median=55.0, std=40.0, min=-100.0, max=900.0, percentile_99_5=300.0, percentile_00_5=-80.0
)
PRESETS = ["nnsslPlannerResEncXS", "nnsslPlannerResEncM", "nnsslPlannerResEncL", "nnsslPlannerResEncXL"]


def fingerprint_of(shapes, spacing=(1.0, 1.0, 1.0), cropped=1.0, channels=1):
    cases = {
        f"case{number}": CaseFingerprint(
            shape=tuple(shape),
            shape_after_crop=tuple(shape),
            spacing=spacing,
            foreground_fraction=0.5,
            content_hashes=(f"{number}",) * channels,
            intensities=(STATISTICS,) * channels,
        )
        for number, shape in enumerate(shapes)
    }
    return Fingerprint(
        dataset_name="Dataset001_Test",
        foreground_rule="all",
        cases=cases,
        foreground_intensity_properties_per_channel={str(channel): STATISTICS for channel in range(channels)},
        median_relative_size_after_cropping=cropped,
    )


def manifest_of(channel_names=("MRI",), file_ending=".nii.gz", folder=Path("/nowhere")):
    cases = (Case(case_id="case0", images=(folder / f"case0_0000{file_ending}",)),)
    return Manifest("Dataset001_Test", folder, tuple(channel_names), file_ending, {"background": 0}, cases)


def plan_for(planner="nnsslPlanner", *, shapes=((300, 300, 300),) * 100, channels=("MRI",), cropped=1.0, **rest):
    spacing = rest.pop("of_data", (1.0, 1.0, 1.0))
    fingerprint = fingerprint_of(shapes, spacing, cropped, len(channels))
    return plan_experiment(fingerprint, manifest_of(channels), planner, PlanningOptions(**rest))


def test_resenc_l_is_upstreams():
    configuration = plan_for("nnsslPlannerResEncL", memory_target=24).configuration("3d_fullres")
    arch = configuration.architecture["arch_kwargs"]
    assert configuration.patch_size == (160, 160, 160)
    assert configuration.spacing == (1.0, 1.0, 1.0)
    assert arch["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert arch["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    assert arch["n_conv_per_stage_decoder"] == [1, 1, 1, 1, 1]


def test_presets_grow():
    plans = [plan_for(name).configuration("3d_fullres") for name in PRESETS]
    assert [plan.patch_size[0] for plan in plans] == [64, 128, 160, 192]
    assert [plan.architecture["arch_kwargs"]["features_per_stage"][0] for plan in plans] == [8, 32, 32, 32]


@pytest.mark.parametrize("name", ["nnsslPlanner", *PRESETS])
def test_hippocampus_sized_images_are_covered(name):
    configuration = plan_for(name, shapes=[(35, 50, 35)] * 60, memory_target=8).configuration("3d_fullres")
    assert configuration.patch_size == (40, 56, 40)
    assert configuration.batch_size == 2  # a batch covers at most a twentieth of 60 small cases
    assert configuration.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))


@pytest.mark.parametrize(
    ("shapes", "of_data", "channels", "configuration"),
    [
        ([(35, 50, 35)] * 4, (1.0, 1.0, 1.0), ("MRI",), "3d_fullres"),
        ([(16, 120, 130)] * 4, (5.0, 0.8, 0.8), ("T1", "T2"), "3d_fullres"),
        ([(120, 16, 130)] * 4, (0.8, 5.0, 0.8), ("CT",), "3d_fullres"),
        ([(9, 9, 9)] * 4, (1.0, 1.0, 1.0), ("MRI",), "3d_fullres"),
        ([(1, 96, 72)] * 4, (999.0, 1.0, 1.0), ("R", "G", "B"), "2d"),
    ],
)
@pytest.mark.parametrize("rule", ["iso", "median", "noresample"])
def test_nnunet_reads_the_plans_and_builds_the_network(tmp_path, shapes, of_data, channels, configuration, rule):
    plan = plan_for("nnsslPlannerResEncXS", shapes=shapes, of_data=of_data, channels=channels, spacing=rule)
    plan.save(tmp_path / "nnsslPlans.json")
    manager = PlansManager(str(tmp_path / "nnsslPlans.json"))
    theirs = manager.get_configuration(configuration)
    network = get_network_from_plans(
        theirs.network_arch_class_name,
        theirs.network_arch_init_kwargs,
        theirs.network_arch_init_kwargs_req_import,
        len(channels),
        2,
        deep_supervision=True,
    )
    with torch.no_grad():
        outputs = network(torch.zeros(1, len(channels), *theirs.patch_size))
    assert outputs[0].shape == (1, 2, *theirs.patch_size)
    assert len(outputs) >= 2
    assert manager.image_reader_writer_class.__name__ == "SimpleITKIO"
    assert theirs.preprocessor_class.__name__ == "DefaultPreprocessor"
    assert (theirs.resampling_fn_data.func is no_resampling_hack) == (rule == "noresample")
    assert callable(theirs.resampling_fn_seg)
    assert callable(theirs.resampling_fn_probabilities)
    assert theirs.batch_dice is (configuration == "2d")
    assert manager.foreground_intensity_properties_per_channel["0"]["percentile_00_5"] == -80.0
    manager.get_label_manager({"labels": {"background": 0}})


def test_coarsest_axis_comes_first():
    plan = plan_for(shapes=[(120, 16, 130)] * 4, of_data=(0.8, 5.0, 0.7), spacing="median")
    assert plan.raw["transpose_forward"] == [1, 0, 2]
    assert plan.raw["transpose_backward"] == [1, 0, 2]
    assert plan.raw["original_median_spacing_after_transp"] == [5.0, 0.8, 0.7]
    assert plan.raw["original_median_shape_after_transp"] == [16, 120, 130]
    configuration = plan.configuration("3d_fullres")
    assert configuration.spacing == (5.0, 0.8, 0.7)
    assert configuration.patch_size[0] == 16
    assert configuration.strides[1] == (1, 2, 2)


def test_single_slices_keep_their_axis_first_however_thin_they_are():
    plan = plan_for(shapes=[(1, 96, 72)] * 4, of_data=(0.2, 1.0, 1.0))
    assert plan.raw["transpose_forward"] == [0, 1, 2]
    assert plan.configuration("2d").spacing == (1.0, 1.0)
    assert plan.configuration("2d").patch_size[0] == 96


def test_iso_resamples_anisotropic_data_to_cubes():
    configuration = plan_for(shapes=[(20, 160, 160)] * 4, of_data=(8.0, 1.0, 1.0)).configuration("3d_fullres")
    assert configuration.spacing == (2.0, 2.0, 2.0)
    assert configuration.raw["median_image_size_in_voxels"] == [80.0, 80.0, 80.0]
    assert configuration.patch_size == (80, 80, 80)


def test_explicit_spacing_and_unknown_rule():
    configuration = plan_for(spacing=(1.5, 2.0, 1.5)).configuration("3d_fullres")
    assert sorted(configuration.spacing) == [1.5, 1.5, 2.0]
    with pytest.raises(ValueError, match="'isotropic' is not known"):
        plan_for(spacing="isotropic")


@pytest.mark.parametrize("name", ["nnsslPlanner", *PRESETS])
@pytest.mark.parametrize("shape", [(300, 300, 300), (60, 320, 320), (35, 50, 35)])
@pytest.mark.parametrize("cost", [StepCost(), StepCost(views=2.5, copies=2, decoder=False)])
def test_more_memory_never_gives_fewer_voxels(name, shape, cost):
    chosen = []
    for target in (4, 8, 11, 16, 24, 40, 80, 141):
        plan = plan_for(name, shapes=[shape] * 200, memory_target=target, cost=cost)
        configuration = plan.configuration("3d_fullres")
        chosen.append(prod(configuration.patch_size) * configuration.batch_size)
        assert plan.raw["nnssl_planning"]["estimated_memory_gb"] <= USABLE_SHARE * target + 0.01
    assert chosen == sorted(chosen)


def test_a_dearer_step_gets_fewer_voxels():
    cheap = plan_for("nnsslPlannerResEncL", memory_target=24).configuration("3d_fullres")
    dear = plan_for("nnsslPlannerResEncL", memory_target=24, cost=StepCost(views=4, copies=2))
    single = plan_for("nnsslPlannerResEncL", memory_target=24, bytes_per_value=FULL_PRECISION_BYTES)
    for plan in (dear, single):
        configuration = plan.configuration("3d_fullres")
        assert prod(configuration.patch_size) * configuration.batch_size < prod(cheap.patch_size) * cheap.batch_size


def test_batch_fills_the_memory_of_a_large_dataset():
    small, large = (
        plan_for("nnsslPlannerResEncL", memory_target=target).configuration("3d_fullres") for target in (16, 80)
    )
    assert small.patch_size == large.patch_size == (160, 160, 160)
    assert small.batch_size == 2
    assert large.batch_size > 8


def test_default_memory_is_the_presets():
    assert plan_for("nnsslPlannerResEncL").raw["nnssl_planning"]["memory_target_gb"] == 24.0
    assert plan_for("nnsslPlanner").raw["nnssl_planning"]["memory_target_gb"] == 8.0


def test_normalization_goes_by_channel_name():
    schemes = plan_for(channels=("CT", "T1w", "noNorm")).configuration("3d_fullres").normalization_schemes
    assert schemes == ("CTNormalization", "ZScoreNormalization", "NoNormalization")
    chosen = plan_for(channels=("CT", "T1w"), normalization="percentile").configuration("3d_fullres")
    assert chosen.normalization_schemes == ("PercentileNormalization",) * 2


def test_statistics_are_taken_inside_the_mask_where_cropping_removed_much():
    assert plan_for(channels=("T1", "CT"), cropped=0.5).configuration("3d_fullres").use_mask_for_norm == (True, False)
    assert plan_for(channels=("T1", "CT"), cropped=0.8).configuration("3d_fullres").use_mask_for_norm == (False, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_target": 0.0}, "memory target of 0 GB"),
        ({"memory_target": -1.0}, "memory target of -1 GB"),
        ({"normalization": "minmax"}, "'minmax' is not known"),
        ({"plans_name": "my/plans"}, "'my/plans'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlanningOptions(**options)


def test_too_little_memory_is_refused():
    with pytest.raises(ValueError, match=r"0\.4 GB is too small.*-gpu_memory_target"):
        plan_for("nnsslPlannerResEncL", memory_target=0.4)


def test_unknown_planner_and_empty_dataset_are_refused():
    with pytest.raises(ValueError, match="Did you mean nnsslPlannerResEncL"):
        plan_for("nnsslPlannerResEnL")
    with pytest.raises(ValueError, match="no readable case"):
        plan_for(shapes=[])
    transformers = [f"nnsslPlannerPrimus{size}" for size in ("XS", "S", "M", "L")]
    assert PLANNERS.names() == sorted(["nnsslPlanner", *PRESETS, *transformers])


def test_the_commands_help_names_every_family_of_planners():
    """Fault: the transformers were left out."""
    words = " ".join(parser().format_help().split())
    for name in PLANNERS.names():
        family, size = re.fullmatch(r"(nnsslPlanner(?:ResEnc|Primus)?)(\w*)", name).groups()
        assert re.search(rf"{family}\b" if not size else rf"{family}(XS|[^()]*\b{size}\b)", words), name


def test_saved_beside_dataset_json_with_the_users_configurations_kept(tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "preprocessed"
    raw.mkdir()
    description = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "licence": "CC-BY"}
    (raw / "dataset.json").write_text(json.dumps(description))
    path = save_plan(plan_for("nnsslPlannerResEncL"), manifest_of(folder=raw), folder)
    assert path == folder / "nnsslPlans.json"
    assert json.loads((folder / "dataset.json").read_text()) == description
    edited = Plan.load(path)
    edited.raw["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    edited.save(path)
    former = folder / "nnsslPlans.json.old"
    save_plan(plan_for("nnsslPlannerResEncL"), manifest_of(folder=raw), folder)
    assert not former.exists()
    save_plan(plan_for("nnsslPlannerResEncXS"), manifest_of(folder=raw), folder)
    assert Plan.load(former).raw == edited.raw
    again = Plan.load(path)
    assert again.configuration_names == ("mine", "3d_fullres")
    assert again.configuration("mine").patch_size == (64, 64, 64)
    assert again.configuration("mine").batch_size == 7


def test_dataset_json_is_made_where_the_collection_has_none(tmp_path):
    save_plan(plan_for(), manifest_of(folder=tmp_path / "raw"), tmp_path / "preprocessed")
    made = json.loads((tmp_path / "preprocessed" / "dataset.json").read_text())
    assert made["channel_names"] == {"0": "MRI"}
    assert made["labels"] == {"background": 0}
