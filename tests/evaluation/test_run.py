import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl_ext.core.executor import InlineExecutor
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.dataset.integrity import content_hash
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split
from nnssl_ext.evaluation import analysis
from nnssl_ext.evaluation.folds import sizes_from_fractions
from nnssl_ext.evaluation.preparation import EvaluationSettings, prepare
from nnssl_ext.evaluation.records import MEAN_CLASS, load_evaluation
from nnssl_ext.evaluation.run import evaluate
from nnssl_ext.finetuning.config import PLANS_KEY
from nnssl_ext.finetuning.sources import source_hashes, write_sources
from nnssl_ext.finetuning.weights import FRESH_KEY, weights_file_hash
from nnssl_ext.imageio import read_segmentation, write_image, write_segmentation
from tests.evaluation import fakes

SETTINGS = EvaluationSettings(dataset=4, plans=("ptPlans__mae", "ptPlans__scratch"))
FULL = replace(SETTINGS, num_train=(3, "all"), seeds=(0, 1))


@pytest.fixture
def world(roots: Path) -> SimpleNamespace:
    return fakes.make_world(roots)


class Recorder:
    """Trains by pretending, and remembers what it was asked to train."""

    def __init__(self, fail: str = "") -> None:
        self.keys: list[tuple[str, int]] = []
        self.fail = fail

    def __call__(self, task) -> None:
        self.keys.append((task.plans_name, task.fold))
        if self.fail and self.fail in task.plans_name:
            raise ValueError("no memory left")
        fakes.pretend_to_train(task)


def run(settings: EvaluationSettings = SETTINGS, trainer=fakes.pretend_to_train):
    return evaluate(settings, InlineExecutor(), device="cpu", command="nnssl_evaluate -d 4", trainer=trainer)


def test_from_plans_to_evaluation_json(world: SimpleNamespace) -> None:
    evaluation, folder = run(FULL)
    assert folder == world.results / "evaluation" / "mae__scratch__3d_fullres"
    assert evaluation.reference.name == "ptPlans__scratch"
    assert len(evaluation.runs) == 2 * 2 * 2 * 3  # arms, sizes, seeds, folds
    assert len(evaluation.cases) == 2 * 2 * 2 * len(fakes.CASES)
    row = evaluation.comparison("ptPlans__mae", 3, "dice")
    assert row.num_pairs == len(fakes.CASES)
    assert row.difference > 0.05
    assert row.interval.low > 0
    assert row.p_value == pytest.approx(2 / 2 ** len(fakes.CASES))
    assert row.p_holm == pytest.approx(2 * row.p_value)  # two sizes, one arm
    inner = evaluation.comparison("ptPlans__mae", 3, "dice", "inner")
    assert inner.p_value < inner.p_holm <= 4 * inner.p_value  # two sizes, two classes, one arm
    assert evaluation.verdicts[0].outcome == "helped"
    summary = evaluation.summary("ptPlans__scratch", "all", "dice")
    assert set(summary.fold_means) == {0, 1, 2}
    assert set(summary.seed_means) == {0, 1}
    assert load_evaluation(folder) == evaluation


def test_a_second_start_trains_nothing_and_finds_the_same(world: SimpleNamespace) -> None:
    first, _ = run()
    recorder = Recorder()
    second, _ = run(trainer=recorder)
    assert recorder.keys == []
    assert replace(second, created="") == replace(first, created="")


def test_only_what_is_missing_is_trained(world: SimpleNamespace) -> None:
    run(SETTINGS)
    recorder = Recorder()
    run(replace(SETTINGS, num_train=(3, "all")), trainer=recorder)
    assert sorted(recorder.keys) == [
        (f"ptPlans__{arm}__n3__s0", fold) for arm in ("mae", "scratch") for fold in range(3)
    ]


def test_a_failing_run_does_not_stop_the_others_and_is_named(world: SimpleNamespace) -> None:
    recorder = Recorder(fail="mae__n3__s1")
    with pytest.raises(
        ValueError, match=r"3 of 24 trainings failed, the first is ptPlans__mae__n3__s1__fold_0: .*no memory"
    ):
        run(FULL, trainer=recorder)
    assert len(recorder.keys) == 24
    again = Recorder()
    run(FULL, trainer=again)
    assert again.keys == [("ptPlans__mae__n3__s1", fold) for fold in range(3)]


def test_arms_share_subsets_which_are_nested_and_differ_between_seeds(world: SimpleNamespace) -> None:
    prepared = prepare(replace(FULL, num_train=(2, 4, "all")), InlineExecutor())
    chosen = {(r.arm.label, r.num_train, r.seed, r.fold): r for r in prepared.runs}
    for seed in (0, 1):
        for fold in range(3):
            small, middle, full = (chosen["mae", size, seed, fold] for size in (2, 4, "all"))
            assert len(small.train_cases) == 2
            assert set(small.train_cases) < set(middle.train_cases) < set(full.train_cases)
            assert small.val_cases == full.val_cases == fakes.splits()[fold].val
            assert small.train_cases == chosen["scratch", 2, seed, fold].train_cases
    draws = {seed: [chosen["mae", 2, seed, fold].train_cases for fold in range(3)] for seed in (0, 1)}
    assert draws[0] != draws[1]


def test_plans_of_a_variant_hold_its_ids_and_seed(world: SimpleNamespace) -> None:
    evaluation, _ = run(FULL)
    variant = read_json(world.mae.with_name("ptPlans__mae__n3__s1.json"))
    assert variant["plans_name"] == "ptPlans__mae__n3__s1"
    assert variant[PLANS_KEY]["seed"] == 1
    record = next(r for r in evaluation.runs if (r.plans_name, r.fold) == ("ptPlans__mae__n3__s1", 2))
    assert tuple(variant[PLANS_KEY]["splits"][2]["train"]) == record.train_cases
    assert len(record.train_cases) == 3
    names = {r.plans_name for r in evaluation.runs if r.num_train == "all" and r.seed == 0}
    assert names == {"ptPlans__mae", "ptPlans__scratch"}  # what was trained on the arm's own plans counts


def test_a_pretrained_on_validation_case_is_refused(world: SimpleNamespace) -> None:
    case = fakes.splits()[1].val[0]
    leaked = (content_hash(fakes.image_of(world.root, case)[0]),)
    fakes.make_plans(world.root, "ptPlans__mae", pretrained_weights="w.pth", pretraining_content_hashes=leaked)
    recorder = Recorder()
    with pytest.raises(
        ValueError, match=f"1 validation cases were in the pretraining set of ptPlans__mae, such as {case}"
    ):
        run(trainer=recorder)
    assert recorder.keys == []


def test_a_pretrained_on_training_case_is_refused_too(world: SimpleNamespace) -> None:
    split = fakes.splits()[0]
    leaked = (content_hash(fakes.image_of(world.root, split.train[0])[0]),)
    fakes.make_plans(world.root, "ptPlans__mae", pretrained_weights="w.pth", pretraining_content_hashes=leaked)
    with pytest.raises(ValueError, match="1 training cases were in the pretraining set"):
        run(replace(SETTINGS, folds=(0,)))


def test_a_fold_that_trains_on_a_copy_of_what_it_validates_on_is_refused(world: SimpleNamespace) -> None:
    """Planted fault: images compared with those of the pretraining alone."""
    split = fakes.splits()[1]
    images = world.root / "raw" / fakes.DATASET / "imagesTr"
    copied = (images / f"{split.train[0]}_0000.nii.gz").read_bytes()
    (images / f"{split.val[0]}_0000.nii.gz").write_bytes(copied)
    recorder = Recorder()
    with pytest.raises(ValueError, match=rf"fold \d validates on {split.val[0]} and trains on {split.train[0]}, which"):
        run(replace(SETTINGS, folds=(1,)), trainer=recorder)
    assert recorder.keys == []


def test_hashes_are_kept_until_an_image_changes(world: SimpleNamespace) -> None:
    prepare(SETTINGS, InlineExecutor())
    cache = world.root / "preprocessed" / fakes.DATASET / "nnssl_content_hashes.json"
    kept = read_json(cache)
    assert kept["ball_03"]["hashes"] == [content_hash(fakes.image_of(world.root, "ball_03")[0])]
    image = world.root / "raw" / fakes.DATASET / "imagesTr" / "ball_03_0000.nii.gz"
    write_image(fakes.image_of(world.root, "ball_03")[0] + 1, fakes.GEOMETRY, image)
    prepare(SETTINGS, InlineExecutor())
    assert read_json(cache)["ball_03"]["hashes"] == [content_hash(fakes.image_of(world.root, "ball_03")[0])]
    assert read_json(cache)["ball_03"]["hashes"] != kept["ball_03"]["hashes"]


def test_a_checkpoint_without_hashes_gives_a_warning(world: SimpleNamespace) -> None:
    """Catches a report on a leak that nobody looked for, and a second seed whose checkpoint is not asked."""
    make_seeded(world.root)
    assert prepare(replace(FULL, plans=SEEDED), InlineExecutor()).arms[0].images_known
    fakes.make_plans(world.root, "ptPlans__mae__p1", pretrained_weights="w.pth", seed=1)
    evaluation, _ = run(replace(FULL, plans=SEEDED, num_train=("all",), folds=(0,)))
    assert any("does not say which images it was pretrained on" in warning for warning in evaluation.warnings)
    assert any("The plans ptPlans__mae__p1 do not tell their weights" in warning for warning in evaluation.warnings)
    assert not evaluation.arm("ptPlans__mae").images_known


def test_patients_on_both_sides_of_a_fold_are_said_openly(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches folds by case that the report calls honest."""
    split = fakes.splits()[1]
    patients = {case: case for case in fakes.CASES} | {split.train[0]: "Ann", split.val[0]: "Ann"}
    both = [n for n, s in enumerate(fakes.splits()) if (split.train[0] in s.val) != (split.val[0] in s.val)]
    monkeypatch.setattr(Manifest, "subjects", lambda _: patients)
    (warning,) = (text for text in prepare(SETTINGS, InlineExecutor()).warnings if "patients" in text)
    assert warning.startswith(f"Folds {', '.join(map(str, both))} train and validate on images of the same 1 patients")
    assert "such as Ann:" in warning


def test_cases_that_were_not_planned_are_found_out(world: SimpleNamespace) -> None:
    run(SETTINGS)
    fold = world.results / "SSLFinetuneTrainer__ptPlans__mae__3d_fullres" / "fold_1" / "validation"
    summary = read_json(fold / "summary.json")
    summary["metric_per_case"][0]["prediction_file"] = str(fold / "stranger.nii.gz")
    write_json(fold / "summary.json", summary)
    with pytest.raises(ValueError, match=r"did not validate the cases of its fold: summary.json lists .*stranger"):
        run(SETTINGS)


def test_a_missing_prediction_is_found_out(world: SimpleNamespace) -> None:
    run(SETTINGS)
    lost = fakes.splits()[1].val[0]
    fold = world.results / "SSLFinetuneTrainer__ptPlans__scratch__3d_fullres" / "fold_1" / "validation"
    (fold / f"{lost}.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"there are predictions for 2 cases instead of 3 .missing: {lost}"):
        run(SETTINGS)


def test_a_prediction_that_lies_elsewhere_is_found_out(world: SimpleNamespace) -> None:
    """Arrays of equal shape would be scored as if nothing were wrong."""
    run(SETTINGS)
    case = fakes.splits()[1].val[0]
    path = world.results / "SSLFinetuneTrainer__ptPlans__scratch__3d_fullres" / "fold_1" / "validation"
    labels, geometry = read_segmentation(path / f"{case}.nii.gz")
    write_segmentation(labels, replace(geometry, origin=(0.0, 0.0, 5.0)), path / f"{case}.nii.gz")
    with pytest.raises(ValueError, match=rf"{case}.nii.gz lies elsewhere than .*origin"):
        run(SETTINGS)


def test_results_of_other_settings_are_refused(world: SimpleNamespace) -> None:
    run()
    for name in ("mae", "scratch"):
        path = world.root / "preprocessed" / fakes.DATASET / f"ptPlans__{name}.json"
        plans = read_json(path)
        plans[PLANS_KEY]["lr"] = 0.5
        write_json(path, plans)
    with pytest.raises(
        ValueError, match=r"trained with other settings than ptPlans__mae\S* has now .they differ in \S+lr"
    ):
        run()


def write_weights(world: SimpleNamespace, value: float, *, plan: bool = True) -> None:
    """One pretrained tensor and a fresh one; `plan` writes its hash into the plans too."""
    path = world.mae.with_suffix(".pth")
    weights = {"stem": torch.full((2,), value), "head": torch.rand(2)}
    torch.save({"network_weights": weights, FRESH_KEY: ["head"]}, path)
    if plan:
        plans = read_json(world.mae)
        plans[PLANS_KEY]["weights_hash"] = weights_file_hash(path)
        write_json(world.mae, plans)


def test_results_of_other_weights_are_not_counted_as_results_of_these(world: SimpleNamespace) -> None:
    """Catches a start that is known by the name of its file alone."""
    write_weights(world, 1.0)
    evaluation, _ = run()
    assert not any("by content" in warning for warning in evaluation.warnings)
    write_weights(world, 1.0)  # planned again: the same weights in another file
    again = Recorder()
    run(trainer=again)
    assert again.keys == []
    write_weights(world, 2.0, plan=False)
    with pytest.raises(ValueError, match=r"ptPlans__mae.pth holds other weights than those that ptPlans__mae was plan"):
        run()
    write_weights(world, 2.0)
    with pytest.raises(ValueError, match=r"than ptPlans__mae has now .they differ in nnssl_finetuning.weights_hash"):
        run()


def test_images_and_labels_that_have_changed_are_refused(world: SimpleNamespace) -> None:
    """Catches folds that are trained on old labels, and old folds beside new ones, all scored against new labels."""
    preprocessed = world.mae.parent
    manifest, case = Manifest.load(world.root / "raw" / fakes.DATASET), fakes.splits()[0].train[0]
    labels = world.root / "raw" / fakes.DATASET / "labelsTr"
    hashes = source_hashes(manifest, fakes.CASES, InlineExecutor(), preprocessed)
    write_sources(preprocessed / fakes.CASES_FOLDER, {**hashes, case: ("old", "old")})
    with pytest.raises(ValueError, match=rf"1 cases, such as {case}, have another .* than when \S+prepared was made"):
        run()
    write_sources(preprocessed / fakes.CASES_FOLDER, hashes)
    run()
    (labels / f"{case}.nii.gz").write_bytes((labels / f"{fakes.CASES[-1]}.nii.gz").read_bytes() + b" ")
    with pytest.raises(ValueError, match=rf"1 cases, such as {case}, .* than when \S+fold_\d was trained. Delete that"):
        run()


def test_a_setting_that_the_results_do_not_name_has_its_default(world: SimpleNamespace) -> None:
    run(SETTINGS)
    used = world.results / "SSLFinetuneTrainer__ptPlans__mae__3d_fullres" / "plans.json"
    plans = read_json(used)
    del plans[PLANS_KEY]["layer_decay"]
    write_json(used, plans)
    recorder = Recorder()
    run(SETTINGS, trainer=recorder)
    assert recorder.keys == []


def test_scores_are_made_again_when_a_prediction_or_the_metrics_change(world: SimpleNamespace) -> None:
    """Catches kept scores of a former convention beside scores of this one."""
    before, _ = run(SETTINGS)
    case = fakes.splits()[0].val[0]
    fold = world.results / "SSLFinetuneTrainer__ptPlans__scratch__3d_fullres" / "fold_0" / "validation"
    (fold / f"{case}.nii.gz").write_bytes(
        (world.root / "raw" / fakes.DATASET / "labelsTr" / f"{case}.nii.gz").read_bytes()
    )
    after, folder = run(SETTINGS)
    scores = [next(c for c in e.cases if (c.arm, c.case) == ("ptPlans__scratch", case)) for e in (before, after)]
    assert scores[0].classes["inner"].dice < 1
    assert scores[1].classes["inner"].dice == 1
    for cache in (folder / "scores").iterdir():  # as if kept by a version that counts otherwise
        kept = read_json(cache)
        kept["stamp"]["metrics"] -= 1
        for classes in kept["scores"].values():
            classes["inner"]["dice"] = 0.0
        write_json(cache, kept)
    again, _ = run(SETTINGS)
    assert again.cases == after.cases
    assert again.absent == {"inner": 0, "outer": 0}


def test_plain_nnunet_joins_at_all_cases_without_a_seed(world: SimpleNamespace) -> None:
    """Catches 1000 epochs with mirroring that stand beside 20 without, and nobody says so."""
    fakes.make_plans(world.root, "nnUNetPlans", plain=True)
    evaluation, _ = run(replace(FULL, plans=("ptPlans__mae", "ptPlans__scratch", "nnUNetPlans")))
    plain = [r for r in evaluation.runs if r.arm == "nnUNetPlans"]
    assert {(r.num_train, r.seed) for r in plain} == {("all", None)}
    assert Path(plain[0].folder).parent.name == "nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert evaluation.arm("nnUNetPlans").role == "plain"
    (warning,) = (text for text in evaluation.warnings if text.startswith("nnUNetPlans and scratch differ in "))
    assert "training (nnUNetTrainer's own, by default 1000 epochs of 250 steps, beside 20 epochs of 5 steps)" in warning
    assert "mirroring in validation" in warning
    asked = replace(SETTINGS, plans=("ptPlans__mae", "nnUNetPlans"), reference="nnUNetPlans")
    assert any("mae and nnUNetPlans differ" in text for text in prepare(asked, InlineExecutor()).warnings)
    assert evaluation.comparison("nnUNetPlans", "all", "dice").num_pairs == len(fakes.CASES)
    assert evaluation.comparison("nnUNetPlans", 3, "dice") is None
    stored = json.loads((world.root / "preprocessed" / fakes.DATASET / "splits_final.json").read_text())
    assert [tuple(fold["val"]) for fold in stored] == [split.val for split in fakes.splits()]


def test_plain_nnunet_with_other_folds_is_refused(world: SimpleNamespace) -> None:
    fakes.make_plans(world.root, "nnUNetPlans", plain=True)
    other = [{"train": list(s.train), "val": list(s.val)} for s in reversed(fakes.splits())]
    write_json(world.root / "preprocessed" / fakes.DATASET / "splits_final.json", other)
    with pytest.raises(ValueError, match="plain nnU-Net would use other folds"):
        run(replace(SETTINGS, plans=("ptPlans__scratch", "nnUNetPlans")))


def test_fractions_count_from_the_smallest_fold(world: SimpleNamespace) -> None:
    prepared = prepare(replace(SETTINGS, fractions=(0.3, 1.0)), InlineExecutor())
    assert prepared.num_train == (2, "all")  # .3 of 6, rounded up
    hundred = Split(train=tuple(f"case_{n}" for n in range(100)), val=())
    assert sizes_from_fractions([0.07], [hundred]) == [7]  # catches the noise of .07 * 100 being rounded up


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans": ("ptPlans__mae", "ptPlans__nowhere")}, r"no plans 'ptPlans__nowhere' .*there: .*ptPlans__scratch"),
        ({"plans": ("ptPlans__mae",)}, "two or more different plans"),
        ({"configuration": "2d"}, "no configuration '2d'. Valid: 3d_fullres"),
        ({"folds": (0, 7)}, "fold 7 is not planned; the plans have folds 0 to 2"),
        ({"num_train": (6,)}, "the smallest of these folds has 6 training cases. Give 1 to 5, or all"),
        ({"reference": "ptPlans__other"}, "--reference 'ptPlans__other' is not among the arms"),
        ({"fractions": (1.5,)}, "fraction 1.5 is not allowed"),
        ({"fractions": (0.01, 0.02)}, "0.01 and 0.02 both come to 1 of"),
        ({"dataset": 7}, "no dataset 7"),
    ],
)
def test_refuses_before_training(world: SimpleNamespace, change: dict, message: str) -> None:
    recorder = Recorder()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(replace(SETTINGS, **change), trainer=recorder)
    assert recorder.keys == []


@pytest.mark.parametrize("change", [{"seeds": (0, 0)}, {"num_train": ()}, {"seeds": (-1,)}, {"tolerance_mm": -1.0}])
def test_settings_that_make_no_sense(change: dict) -> None:
    with pytest.raises(ValueError):
        replace(SETTINGS, **change)


def test_unequal_lengths_of_training_are_refused(world: SimpleNamespace) -> None:
    fakes.make_plans(world.root, "ptPlans__scratch", num_epochs=fakes.NUM_EPOCHS // 2)
    with pytest.raises(ValueError, match="num_epochs is 20 in ptPlans__mae and 10 in ptPlans__scratch"):
        run()


def test_unequal_recipes_are_said_openly(world: SimpleNamespace) -> None:
    equal = prepare(SETTINGS, InlineExecutor()).warnings
    assert not any("differ" in warning for warning in equal)
    fakes.make_plans(world.root, "ptPlans__scratch", schedule="warmup", lr=0.5, save_every=3)
    (warning,) = set(prepare(SETTINGS, InlineExecutor()).warnings) - set(equal)
    assert "mae and scratch differ in lr (" in warning
    assert "not 0.5), schedule (poly, not warmup) besides the pretraining" in warning


def test_arms_planned_on_different_folds_are_refused(world: SimpleNamespace) -> None:
    fakes.make_plans(world.root, "ptPlans__scratch", splits=fakes.splits(num_folds=4))
    with pytest.raises(ValueError, match="planned with different folds"):
        run()


def test_two_scratch_arms_need_a_reference(world: SimpleNamespace) -> None:
    fakes.make_plans(world.root, "ptPlans__scratch2")
    settings = replace(SETTINGS, plans=("ptPlans__scratch", "ptPlans__scratch2"))
    with pytest.raises(ValueError, match=r"2 of the arms .* start from scratch"):
        run(settings)
    evaluation, _ = run(replace(settings, reference="scratch2"))
    assert evaluation.reference.name == "ptPlans__scratch2"


def test_an_arm_of_another_network_is_compared_with_its_own_from_scratch(world: SimpleNamespace) -> None:
    """Catches a transformer whose gain is read off a U-Net."""
    vit = {"architecture": {"network_class_name": "Primus"}}
    fakes.make_plans(world.root, "ptPlans__scratch-vit", **vit)
    fakes.make_plans(world.root, "ptPlans__mae-vit", pretrained_weights="x.pth", **vit)
    names = ("scratch", "scratch-vit", "mae", "mae-vit")
    settings = replace(SETTINGS, plans=tuple(f"ptPlans__{name}" for name in names), reference="scratch")
    evaluation, _ = run(settings)
    bases = {arm.label: evaluation.baseline(arm.name).label for arm in evaluation.arms if arm.role != "reference"}
    assert bases == {"scratch-vit": "scratch", "mae": "scratch", "mae-vit": "scratch-vit"}
    tables = analysis.tabulate(evaluation.cases, "dice", MEAN_CLASS)
    gain = tables["ptPlans__mae-vit", "all"].values - tables["ptPlans__scratch-vit", "all"].values
    assert evaluation.comparison("ptPlans__mae-vit", "all", "dice").difference == pytest.approx(gain.mean())
    verdicts = {verdict.arm: verdict.headline.split()[0] for verdict in evaluation.verdicts}
    assert verdicts["ptPlans__mae-vit"] == verdicts["ptPlans__mae"] == "This"
    assert verdicts["ptPlans__scratch-vit"] == "scratch-vit"
    (differ,) = (warning for warning in evaluation.warnings if "differ in" in warning)
    assert differ.startswith("scratch-vit and scratch differ in architecture ")
    alone = prepare(replace(settings, plans=("ptPlans__scratch", "ptPlans__mae-vit")), InlineExecutor())
    assert alone.baselines["ptPlans__mae-vit"].name == "ptPlans__scratch"


def test_a_subset_of_folds_is_said_openly(world: SimpleNamespace) -> None:
    evaluation, _ = run(replace(SETTINGS, folds=(1,)))
    assert any("Only 1 of 3 folds" in warning for warning in evaluation.warnings)
    assert evaluation.summary("ptPlans__mae", "all", "dice", MEAN_CLASS).num_cases == len(fakes.splits()[1].val)


SEEDED = ("ptPlans__mae__p{seed}", "ptPlans__scratch")


def make_seeded(root: Path) -> None:
    """Plans of one arm with weights of its own for each of two seeds."""
    for seed in (0, 1):
        fakes.make_plans(
            root,
            f"ptPlans__mae__p{seed}",
            pretrained_weights=f"ptPlans__mae__p{seed}.pth",
            pretraining_content_hashes=("f" * 64,),
            seed=seed,
        )


def test_an_arm_may_have_a_pretraining_for_every_seed(world: SimpleNamespace) -> None:
    make_seeded(world.root)
    settings = replace(FULL, plans=SEEDED, labels=("MAE", "scratch"))
    evaluation, _ = run(settings)
    assert [(arm.name, arm.label, arm.pretrained_per_seed) for arm in evaluation.arms] == [
        ("ptPlans__scratch", "scratch", False),
        ("ptPlans__mae", "MAE", True),
    ]
    names = {(r.num_train, r.seed): r.plans_name for r in evaluation.runs if r.arm == "ptPlans__mae"}
    assert names == {
        (3, 0): "ptPlans__mae__p0__n3__s0",
        (3, 1): "ptPlans__mae__p1__n3__s1",
        ("all", 0): "ptPlans__mae__p0",
        ("all", 1): "ptPlans__mae__p1",
    }
    variant = read_json(world.mae.with_name("ptPlans__mae__p1__n3__s1.json"))
    assert variant[PLANS_KEY]["pretrained_weights"] == "ptPlans__mae__p1.pth"


def test_seeds_that_share_a_pretraining_over_folds_are_the_unit_of_luck(world: SimpleNamespace) -> None:
    """Fails where a fold counts as an independent draw although its seed's pretraining served all folds."""
    make_seeded(world.root)
    evaluation, _ = run(replace(FULL, plans=SEEDED, num_train=(3,)))
    row = evaluation.comparison("ptPlans__mae", 3, "dice")
    tables = analysis.tabulate(evaluation.cases, "dice", MEAN_CLASS)
    differences = tables["ptPlans__mae", 3].values - tables["ptPlans__scratch", 3].values
    means = differences.mean(axis=1)
    half = 12.706 * means.std(ddof=1) / np.sqrt(2)  # Student's t for one degree of freedom
    assert row.undecidable_below == pytest.approx(half, rel=1e-3)


def test_a_leak_of_any_seed_is_found(world: SimpleNamespace) -> None:
    make_seeded(world.root)
    seen = content_hash(fakes.image_of(world.root, fakes.splits()[0].val[0])[0])
    fakes.make_plans(
        world.root, "ptPlans__mae__p1", pretrained_weights="x.pth", pretraining_content_hashes=(seen,), seed=1
    )
    with pytest.raises(ValueError, match=r"1 validation cases were in the pretraining set of ptPlans__mae__p1"):
        run(replace(FULL, plans=SEEDED))


def test_labels_and_names_differ_in_number(world: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="1 labels do not name 2 arms"):
        run(replace(SETTINGS, labels=("MAE",)))
