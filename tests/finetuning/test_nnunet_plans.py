import json
import shutil
from pathlib import Path

import pytest
import torch

from nnssl_ext.cli import plan_finetuning as command
from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.records import file_hash, read_json, write_json
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split
from nnssl_ext.finetuning.config import PLANS_KEY, read_config
from nnssl_ext.finetuning.nnunet_dataset import preprocess
from nnssl_ext.finetuning.nnunet_plans import FinetuningPlan, derive_plans, parse_settings, plan_finetuning
from nnssl_ext.finetuning.weights import weights_file_hash

from .conftest import DATASET, NUM_CASES, SHAPE, checkpoint, write_fingerprint, write_raw


def nnunet_network(plan: FinetuningPlan) -> torch.nn.Module:
    """The network that nnU-Net's own trainer builds from the plans."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(str(plan.plans_path))
    labels = manager.get_label_manager(read_json(plan.plans_path.parent / "dataset.json"))
    configuration = manager.get_configuration(plan.configuration)
    channels = len(configuration.normalization_schemes)
    return nnUNetTrainer.build_network_architecture(manager, configuration, channels, labels.num_segmentation_heads)


def test_nnunet_builds_the_network_and_loads_the_weights(labelled_dataset: Path, checkpoint_file: Path) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plan = plan_finetuning(7, checkpoint_file, "mae")
    assert plan.plans_path == labelled_dataset / "ptPlans__mae.json"
    assert plan.weights_path == labelled_dataset / "ptPlans__mae.pth"
    network = nnunet_network(plan)
    load_pretrained_weights(network, str(plan.weights_path), verbose=False)
    source = torch.load(checkpoint_file)["network_weights"]
    for key, value in network.state_dict().items():
        if key.startswith("encoder."):
            assert torch.equal(value, source[key]), key
    assert network(torch.zeros(1, 1, 16, 16, 16))[0].shape == (1, 3, 16, 16, 16)


def test_the_plans_hold_the_recipe_the_folds_and_the_provenance(labelled_dataset: Path, checkpoint_file: Path) -> None:
    content = torch.load(checkpoint_file)
    torch.save({**content, "nnssl_content_hashes": ["aa", "bb"]}, checkpoint_file)
    plan = plan_finetuning(DATASET, checkpoint_file, "mae", seed=3)
    plans = read_json(plan.plans_path)
    config = read_config(plans)
    assert plans["plans_name"] == "ptPlans__mae"
    assert (config.lr, config.schedule, config.seed) == (1e-3, "warmup", 3)
    assert config.pretrained_weights == "ptPlans__mae.pth"
    assert config.pretraining_content_hashes == ("aa", "bb")
    assert [
        Split(tuple(f["train"]), tuple(f["val"])) for f in read_json(labelled_dataset / "splits_final.json")
    ] == list(config.splits)
    assert {case for split in config.splits for case in split.val} == {f"ball_{i}" for i in range(NUM_CASES)}
    assert plans["pretrain_info"]["checkpoint_name"] == "checkpoint.pth"
    assert str(checkpoint_file.parent) not in plan.plans_path.read_text()


def test_the_baseline_differs_in_weights_and_recipe_only(labelled_dataset: Path, checkpoint_file: Path) -> None:
    pretrained = plan_finetuning(7, checkpoint_file, "mae", num_epochs=20)
    scratch = plan_finetuning(7, checkpoint_file, "scratch", num_epochs=20, from_scratch=True)
    assert scratch.weights_path is None
    assert not (labelled_dataset / "ptPlans__scratch.pth").exists()
    ours, theirs = read_json(pretrained.plans_path), read_json(scratch.plans_path)
    assert {key for key in ours if ours[key] != theirs[key]} == {"plans_name", PLANS_KEY, "pretrain_info"}
    settings, baseline = ours[PLANS_KEY], theirs[PLANS_KEY]
    changed = {key for key in settings if settings[key] != baseline[key]}
    assert changed == {"pretrained_weights", "weights_hash", "transfer", "lr", "schedule"}
    assert settings["weights_hash"] == weights_file_hash(pretrained.weights_path)
    assert settings["transfer"] == "encoder"
    assert ours["pretrain_info"]["checkpoint_hash"] == file_hash(checkpoint_file)
    assert (baseline["lr"], baseline["schedule"]) == (1e-2, "poly")


def test_a_sham_is_taken_only_when_asked_for(labelled_dataset: Path, checkpoint_file: Path) -> None:
    content = torch.load(checkpoint_file)
    torch.save({**content, "nnssl_pretraining": {"recipe": {"sham": True}}}, checkpoint_file)
    with pytest.raises(ValueError, match=r"checkpoint\.pth is of a sham run.*--allow_sham"):
        plan_finetuning(7, checkpoint_file, "mae")
    assert not (labelled_dataset / "ptPlans__mae.json").exists()
    assert plan_finetuning(7, checkpoint_file, "mae", allow_sham=True).weights_path is not None


def test_the_report_names_its_command_and_every_key(labelled_dataset: Path, checkpoint_file: Path) -> None:
    words = ["nnssl_plan_finetuning", "-d", "7"]
    report = read_json(plan_finetuning(7, checkpoint_file, "mae", command=words).report_path)
    assert report["command"] == words
    named = {name for row in report["keys"] for name in (row["key"], *row["aliases"])}
    assert named == set(torch.load(checkpoint_file)["network_weights"])
    assert sum(report["tensors"].values()) == len(report["keys"])
    assert report["tensors"]["loaded"] > 0
    assert report["tensors"]["adapted"] == 0


def test_other_channels_and_patch_sizes(roots: Path, checkpoint_file: Path) -> None:
    write_raw(roots / "raw", channels=3)
    write_fingerprint(roots / "preprocessed", channels=3)
    plan = plan_finetuning(7, checkpoint_file, "mae", patch_size=(12, 20, 16), batch_size=4)
    settings = read_json(plan.plans_path)["configurations"]["3d_fullres"]
    assert (settings["patch_size"], settings["batch_size"]) == ([12, 20, 16], 4)
    assert len(settings["normalization_schemes"]) == 3
    assert plan.report["tensors"]["adapted"] == 1
    assert nnunet_network(plan)(torch.zeros(1, 3, 12, 20, 16))[0].shape == (1, 3, 12, 20, 16)


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ((16, 16, 18), r"must be divisible by \(4, 4, 4\) for this network: try -patch_size 16 16 20"),
        ((4, 4, 4), "leaves one voxel at the deepest stage"),
        ((16, 16), "does not fit a network of 3 dimensions"),
    ],
)
def test_patches_that_do_not_fit_are_refused(
    labelled_dataset: Path, checkpoint_file: Path, patch: tuple[int, ...], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        plan_finetuning(7, checkpoint_file, "mae", patch_size=patch)
    assert not (labelled_dataset / "ptPlans__mae.json").exists()


def test_a_patch_far_larger_than_the_images_is_pointed_out(
    labelled_dataset: Path, checkpoint_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan_finetuning(7, checkpoint_file, "mae", patch_size=(64, 64, 64))
    assert "Consider -patch_size 24 20 20" in caplog.text


def test_two_stages_are_refused_since_nnunet_would_train_on_nan(labelled_dataset: Path, tmp_path: Path) -> None:
    content = checkpoint()
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]["strides"] = [[1] * 3, [2] * 3]
    torch.save(content, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="2 stages; nnU-Net's deep supervision needs 3"):
        plan_finetuning(7, tmp_path / "two.pth", "mae")


@pytest.mark.parametrize("name", ["", "a b", "../x", "ptPlans__a.b"])
def test_names_that_are_no_plain_words_are_refused(labelled_dataset: Path, checkpoint_file: Path, name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        plan_finetuning(7, checkpoint_file, name)


def test_an_unlabelled_dataset_is_refused(raw_dataset: Path, checkpoint_file: Path) -> None:
    for file in (raw_dataset / "labelsTr").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="ball_0 has no label"):
        plan_finetuning(7, checkpoint_file, "mae")


def test_a_variant_has_its_own_name_folds_and_seed(labelled_dataset: Path, checkpoint_file: Path) -> None:
    base = plan_finetuning(7, checkpoint_file, "mae", num_epochs=20).plans_path
    folds = [Split(("ball_0",), ("ball_1", "ball_2"))]
    path = derive_plans(base, "ptPlans__mae__n1__s4", folds, 4, iterations_per_epoch=7)
    before, after = read_json(base), read_json(path)
    config = read_config(after)
    assert (path.name, after["plans_name"]) == ("ptPlans__mae__n1__s4.json", "ptPlans__mae__n1__s4")
    assert (config.splits, config.seed, config.iterations_per_epoch) == (tuple(folds), 4, 7)
    assert (config.num_epochs, config.pretrained_weights) == (20, "ptPlans__mae.pth")
    assert {key for key in before if before[key] != after[key]} == {"plans_name", PLANS_KEY}
    with pytest.raises(ValueError, match="name other than that of its base"):
        derive_plans(base, base.stem, folds, 4)


def test_plain_nnunet_plans_can_be_varied_too(tmp_path: Path) -> None:
    write_json(tmp_path / "nnUNetPlans.json", {"plans_name": "nnUNetPlans", "configurations": {}})
    path = derive_plans(tmp_path / "nnUNetPlans.json", "plain__s1", [Split(("a",), ("b",))], 1, lr=1e-2)
    assert read_config(read_json(path)).seed == 1


def test_settings_are_checked_by_name_and_value() -> None:
    assert parse_settings(["lr=2e-3", "schedule=sawtooth"]) == {"lr": 2e-3, "schedule": "sawtooth"}
    with pytest.raises(ValueError, match="no field 'rate'"):
        parse_settings(["rate=1"])


@pytest.mark.parametrize("name", ["splits", "weights_hash", "pretraining_content_hashes"])
def test_what_follows_from_elsewhere_is_not_set_by_hand(name: str) -> None:
    """Planted fault: without its content hashes a checkpoint's own images passed as unseen."""
    with pytest.raises(ValueError, match=f"--set {name}=... is not possible: it follows from -"):
        parse_settings(["lr=1e-3", f"{name}=[]"])
    with pytest.raises(ValueError, match="schedule: "):
        parse_settings(["schedule=cosine"])


def test_preprocessing_is_nnunets_own_and_resumes(labelled_dataset: Path, checkpoint_file: Path) -> None:
    """Catches a case that is kept although its label has changed."""
    import blosc2
    import numpy as np
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plan = plan_finetuning(7, checkpoint_file, "mae")
    with make_executor(0) as executor:
        folder = preprocess(plan.plans_path, plan.configuration, executor)
    assert sorted(path.suffix for path in folder.iterdir()) == [".b2nd"] * 2 * NUM_CASES + [".pkl"] * NUM_CASES
    raw = labelled_dataset.parents[1] / "raw" / DATASET
    manager = PlansManager(str(plan.plans_path))
    data, seg, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(raw / "imagesTr" / "ball_2_0000.nii.gz")],
        str(raw / "labelsTr" / "ball_2.nii.gz"),
        manager,
        manager.get_configuration("3d_fullres"),
        read_json(raw / "dataset.json"),
    )
    assert data.shape == (1, round(SHAPE[0] * 1.5), *SHAPE[1:])
    assert np.array_equal(blosc2.open(str(folder / "ball_2.b2nd"))[:], data)
    assert np.array_equal(blosc2.open(str(folder / "ball_2_seg.b2nd"))[:], seg)
    kept = (folder / "ball_1.b2nd").stat().st_mtime_ns
    (folder / "ball_2.pkl").unlink()
    shutil.copyfile(raw / "labelsTr" / "ball_4.nii.gz", raw / "labelsTr" / "ball_3.nii.gz")
    with make_executor(0) as executor:
        preprocess(plan.plans_path, plan.configuration, executor)
    assert (folder / "ball_2.pkl").is_file()
    labels = [blosc2.open(str(folder / f"{case}_seg.b2nd"))[:] for case in ("ball_3", "ball_4")]
    assert np.array_equal(*labels)  # the new label
    assert (folder / "ball_1.b2nd").stat().st_mtime_ns == kept


def test_a_case_that_cannot_be_preprocessed_is_named(labelled_dataset: Path, checkpoint_file: Path) -> None:
    plan = plan_finetuning(7, checkpoint_file, "mae")
    broken = labelled_dataset.parents[1] / "raw" / DATASET / "imagesTr" / "ball_3_0000.nii.gz"
    broken.write_bytes(b"no image")
    with make_executor(0) as executor, pytest.raises(ValueError, match=r"1 of 6 cases .* ball_3: "):
        preprocess(plan.plans_path, plan.configuration, executor)


def test_the_command_plans_preprocesses_and_says_what_comes_next(
    labelled_dataset: Path, checkpoint_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-d", "7", "-pc", str(checkpoint_file), "-n", "mae", "-np", "0", "--set", "num_epochs=3"]
    command.main([*given, "-m", "fixed", "-os", "2", "2", "2", "-transfer", "encoder_decoder"])
    text = capsys.readouterr().out
    weights = labelled_dataset / "ptPlans__mae.pth"
    assert f"nnUNetv2_train {DATASET} 3d_fullres 0 -p ptPlans__mae -pretrained_weights {weights}" in text
    assert "slice by slice" not in text
    lines = [line.strip() for line in text.splitlines()]
    commands = [number for number, line in enumerate(lines) if line.startswith("nnUNetv2_")]
    assert len(commands) == 2
    assert lines.index('eval "$(nnssl_env)"') < commands[0]
    plans = read_json(labelled_dataset / "ptPlans__mae.json")
    assert plans[PLANS_KEY]["num_epochs"] == 3
    settings = plans["configurations"]["3d_fullres"]
    assert settings["spacing"] == [2.0, 2.0, 2.0]
    assert (labelled_dataset / settings["data_identifier"] / "ball_0.b2nd").is_file()


def test_a_two_dimensional_network_on_volumes_says_so(
    labelled_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(checkpoint(channels=1, dims=2), tmp_path / "flat.pth")
    command.main(["-d", "7", "-pc", str(tmp_path / "flat.pth"), "-n", "flat", "--no_preprocess"])
    assert "a volume is fine-tuned and predicted slice by slice" in capsys.readouterr().out


def test_the_command_turns_mistakes_into_one_line(
    labelled_dataset: Path, checkpoint_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["-d", "7", "-pc", str(checkpoint_file), "-n", "mae", "-m", "isotropic"])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("error: mode 'isotropic' is not known")


def test_the_command_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        command.main(["--settings"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert "layer_decay (float, default 1.0)" in text
    assert "Factor on the learning rate per stage" in text


def test_folds_may_come_from_a_file(labelled_dataset: Path, checkpoint_file: Path, tmp_path: Path) -> None:
    folds = [{"train": ["ball_0", "ball_1"], "val": ["ball_2"]}]
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    given = ["-d", "7", "-pc", str(checkpoint_file), "-n", "mae", "--no_preprocess"]
    command.main([*given, "--splits", str(tmp_path / "folds.json")])
    assert read_json(labelled_dataset / "ptPlans__mae.json")[PLANS_KEY]["splits"] == folds


def test_folds_with_unknown_cases_are_refused(labelled_dataset: Path, checkpoint_file: Path) -> None:
    with pytest.raises(ValueError, match="1 cases that Dataset007_Balls does not have, such as cube_1"):
        plan_finetuning(7, checkpoint_file, "mae", splits=[Split(("ball_0",), ("cube_1",))])


def test_patients_on_both_sides_of_a_fold_are_pointed_out(
    labelled_dataset: Path, checkpoint_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manifest, "subjects", lambda _: {f"ball_{i}": f"patient_{i // 2}" for i in range(NUM_CASES)})
    plan_finetuning(7, checkpoint_file, "mae", splits=[Split(("ball_0", "ball_2"), ("ball_1",))])
    assert "fold 0 trains and validates on images of the same 1 patients, such as patient_0" in caplog.text


@pytest.mark.slow
def test_nnunets_own_fingerprint_and_plans_are_made_where_missing(raw_dataset: Path, checkpoint_file: Path) -> None:
    plan = plan_finetuning(7, checkpoint_file, "mae", mode="default_nnunet")
    folder = plan.plans_path.parent
    own = read_json(folder / "nnUNetPlans.json")["configurations"]["3d_fullres"]
    settings = read_json(plan.plans_path)["configurations"]["3d_fullres"]
    for key in ("spacing", "normalization_schemes", "data_identifier", "resampling_fn_data_kwargs"):
        assert settings[key] == own[key]
    assert settings["architecture"] != own["architecture"]
    fingerprint = read_json(folder / "dataset_fingerprint.json")
    assert fingerprint["spacings"] == [[1.5, 1.0, 1.0]] * NUM_CASES
