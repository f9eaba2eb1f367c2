import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.records import read_json
from nnssl_ext.dataset.splits import Split
from nnssl_ext.finetuning.config import FinetuningConfig
from nnssl_ext.finetuning.nnunet_dataset import preprocess
from nnssl_ext.finetuning.nnunet_plans import derive_plans, plan_finetuning
from nnssl_ext.finetuning.nnunet_trainers import SSLFinetuneTrainer
from nnssl_ext.finetuning.run import FoldResult, _build, fold_result, run_fold
from nnssl_ext.finetuning.schedules import rate_factor
from nnssl_ext.finetuning.sources import read_sources

from .conftest import DATASET, NUM_CASES, SHAPE, checkpoint, write_fingerprint, write_raw

SHORT = {"num_epochs": 4, "iterations_per_epoch": 3, "val_iterations_per_epoch": 2, "save_every": 1}
VAL_CASE = "ball_3"
"""A validation case of fold 0."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans of a tiny run and preprocessed data; roots in the folders beside it."""
    root = tmp_path_factory.mktemp("roots")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            (root / kind).mkdir()
            patch.setenv(f"nnUNet_{kind}", str(root / kind))
        write_raw(root / "raw")
        write_fingerprint(root / "preprocessed")
        torch.save(checkpoint(), root / "checkpoint.pth")
        plan = plan_finetuning(7, root / "checkpoint.pth", "base", **SHORT)
        with make_executor(0) as executor:
            preprocess(plan.plans_path, plan.configuration, executor)
    return plan.plans_path


@pytest.fixture(scope="module")
def trained(planned: Path) -> FoldResult:
    """Fold 0 of the base plans, trained and validated once."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{kind}", str(planned.parents[2] / kind))
        return train(variant(planned, "once", validate_every=2))


@pytest.fixture
def base(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those plans, with results in a folder of the test's own."""
    root = planned.parents[2]
    for kind in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(root / kind))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return planned


def variant(base: Path, name: str, seed: int = 0, **settings: Any) -> str:
    splits = read_json(base)["nnssl_finetuning"]["splits"]
    folds = [Split(tuple(fold["train"]), tuple(fold["val"])) for fold in splits]
    return derive_plans(base, name, folds, seed, **settings).stem


def train(plans_name: str, fold: int | str = 0) -> FoldResult:
    return run_fold(7, plans_name, "3d_fullres", fold, device="cpu", num_threads=1)


def build(plans_name: str, fold: int | str = 0) -> SSLFinetuneTrainer:
    trainer = _build(7, plans_name, "3d_fullres", fold, torch.device("cpu"), "SSLFinetuneTrainer")
    trainer.initialize()
    return trainer


def metrics(result: FoldResult) -> list[dict]:
    """The curves without what the clock decides."""
    rows = [json.loads(line) for line in (result.folder / "finetuning_metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(result: FoldResult) -> dict[str, torch.Tensor]:
    return torch.load(result.checkpoint, weights_only=False)["network_weights"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_fold_is_trained_and_its_validation_cases_are_scored(trained: FoldResult, base: Path) -> None:
    result = trained
    assert result.complete
    assert result.folder.parts[-3:] == (DATASET, "SSLFinetuneTrainer__once__3d_fullres", "fold_0")
    split = read_json(base)["nnssl_finetuning"]["splits"][0]
    summary = read_json(result.summary)
    scored = {Path(row["reference_file"]).name.removesuffix(".nii.gz") for row in summary["metric_per_case"]}
    assert scored == set(split["val"])
    reference = sitk.ReadImage(str(base.parents[2] / "raw" / DATASET / "labelsTr" / f"{split['val'][0]}.nii.gz"))
    predicted = sitk.ReadImage(str(result.summary.parent / f"{split['val'][0]}.nii.gz"))
    assert predicted.GetSize() == reference.GetSize()
    assert predicted.GetSpacing() == reference.GetSpacing()
    rows = metrics(result)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [("validation_dice" in row) for row in rows] == [False, True, False, False]
    assert len(rows[0]["pseudo_dice_per_class"]) == 2


def test_the_summary_holds_the_dice_of_whole_volumes(trained: FoldResult) -> None:
    rows = read_json(trained.summary)["metric_per_case"]
    (row,) = [row for row in rows if row["prediction_file"].endswith(f"{VAL_CASE}.nii.gz")]
    reference, predicted = (
        sitk.GetArrayFromImage(sitk.ReadImage(row[f"{k}_file"])) for k in ("reference", "prediction")
    )
    for label in ("1", "2"):
        a, b = reference == int(label), predicted == int(label)
        assert row["metrics"][label]["Dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_complete_fold_is_not_trained_again(trained: FoldResult, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = trained
    monkeypatch.setenv("nnUNet_results", str(result.folder.parents[2]))
    before = result.checkpoint.stat().st_mtime_ns, result.summary.stat().st_mtime_ns
    assert train("once") == fold_result(DATASET, "once", "3d_fullres", 0) == result
    assert (result.checkpoint.stat().st_mtime_ns, result.summary.stat().st_mtime_ns) == before


def test_a_killed_run_goes_on_to_the_same_numbers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(variant(base, "undisturbed"))
    name = variant(base, "killed")
    with monkeypatch.context() as patch:

        def killed(self: SSLFinetuneTrainer) -> None:
            if self.current_epoch == 2:
                raise KeyboardInterrupt
            SSLFinetuneTrainer.__mro__[1].on_epoch_start(self)

        patch.setattr(SSLFinetuneTrainer, "on_epoch_start", killed)
        with pytest.raises(KeyboardInterrupt):
            train(name)
    resumed = train(name)
    assert metrics(resumed) == metrics(whole)
    assert same(weights(resumed), weights(whole))
    assert not (resumed.folder / "checkpoint_latest.pth").exists()


def test_another_seed_is_another_run(base: Path, trained: FoldResult) -> None:
    other = train(variant(base, "seed", 6, num_epochs=1))
    assert metrics(other)[0]["train_loss"] != metrics(trained)[0]["train_loss"]
    assert metrics(other)[0]["val_loss"] != metrics(trained)[0]["val_loss"]


@pytest.mark.slow
def test_augmentation_workers_change_nothing(base: Path, trained: FoldResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    result = train(variant(base, "workers", validate_every=2))
    assert metrics(result) == metrics(trained)
    assert same(weights(result), weights(trained))


def test_a_two_dimensional_network_trains_on_slices(base: Path, tmp_path: Path) -> None:
    torch.save(checkpoint(channels=1, dims=2), tmp_path / "flat.pth")
    settings = {**SHORT, "num_epochs": 1}
    plan = plan_finetuning(7, tmp_path / "flat.pth", "flat", batch_size=3, **settings)
    assert plan.configuration == "2d"
    with make_executor(0) as executor:
        preprocess(plan.plans_path, "2d", executor)
    result = run_fold(7, plan.plans_name, "2d", 0, device="cpu", num_threads=1)
    predicted = sitk.ReadImage(str(result.summary.parent / f"{VAL_CASE}.nii.gz"))
    assert predicted.GetSize() == SHAPE[::-1]


def test_a_killed_validation_is_made_up_for_under_the_same_settings_only(base: Path) -> None:
    name = variant(base, "unvalidated", num_epochs=1)
    result = train(name)
    before = result.summary.read_text()
    result.summary.unlink()
    assert set(read_sources(result.folder)) == {f"ball_{number}" for number in range(NUM_CASES)}
    checkpoint_time = result.checkpoint.stat().st_mtime_ns
    assert train(name).summary.read_text() == before
    assert result.checkpoint.stat().st_mtime_ns == checkpoint_time
    result.summary.unlink()
    variant(base, name, num_epochs=1, lr=0.5)
    with pytest.raises(ValueError, match=r"trained with other settings than unvalidated has now .they differ in lr"):
        train(name)
    variant(base, name, num_epochs=1, weights_hash="0" * 64)
    with pytest.raises(ValueError, match=r"base.pth holds other weights than those that ptPlans__base was planned"):
        train(name)


def test_pretrained_encoder_and_seeded_decoder_at_the_start(base: Path) -> None:
    first, second = (build(variant(base, f"start{seed}", seed)).network.state_dict() for seed in (1, 2))
    source = torch.load(base.parents[2] / "checkpoint.pth")["network_weights"]
    for key in source:
        if key.startswith("encoder."):
            assert torch.equal(first[key], source[key]), key
    decoder = "decoder.transpconvs.0.weight"
    assert not torch.equal(first[decoder], second[decoder])
    assert torch.equal(first[decoder], build(variant(base, "start1b", 1)).network.state_dict()[decoder])


def test_without_weights_the_network_is_nnunets_fresh_one(base: Path) -> None:
    start = build(variant(base, "fresh", pretrained_weights=None)).network.state_dict()
    source = torch.load(base.parents[2] / "checkpoint.pth")["network_weights"]
    assert not torch.equal(start["encoder.stem.convs.0.conv.weight"], source["encoder.stem.convs.0.conv.weight"])


def test_missing_weights_stop_the_run(base: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pretrained weights at .*gone\.pth"):
        build(variant(base, "gone", pretrained_weights="gone.pth"))


def step(trainer: SSLFinetuneTrainer, number: int) -> tuple[bool, bool]:
    """Takes one optimiser step; returns whether encoder and decoder changed."""
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.step = number
    trainer.network.train()
    shape = (2, 1, 16, 16, 16)
    target = [torch.randint(0, 3, (2, 1, n, n, n)) for n in (16, 8)]
    trainer.train_step({"data": torch.randn(shape), "target": target})
    after = trainer.network.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    encoder = any(key.startswith("encoder.") for key in changed)
    return encoder, any(key.startswith("decoder.") and "encoder" not in key for key in changed)


def test_a_frozen_encoder_does_not_move_and_wakes_up(base: Path) -> None:
    trainer = build(variant(base, "frozen", frozen_encoder_epochs=2.0))
    assert step(trainer, 0) == (False, True)
    assert step(trainer, 5) == (False, True)
    assert step(trainer, 6) == (True, True)


def test_rates_follow_the_schedule_and_the_depth(base: Path) -> None:
    trainer = build(variant(base, "decay", layer_decay=0.5, lr=0.2, weight_decay=1e-4))
    trainer.step = 4
    assert trainer._prepare_step() == pytest.approx(0.2 * rate_factor(trainer.config, 4))
    rates = sorted({round(g["lr"] / (0.2 * rate_factor(trainer.config, 4)), 6) for g in trainer.optimizer.param_groups})
    assert rates == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(trainer.network.parameters()))
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {1e-4}


def test_bf16_steps_differ_from_fp32_by_rounding_only(base: Path) -> None:
    trainers = [build(variant(base, f"precision_{p}", precision=p)) for p in ("default", "fp32", "bf16")]
    batch = next(trainers[0].get_dataloaders()[0])
    losses = [float(trainer.train_step(batch)["loss"]) for trainer in trainers]
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=0.02)


def test_a_fold_that_the_plans_lack_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="fold 5 is not in the plans: they list 0 to 4"):
        train(variant(base, "folds"), 5)


def test_fold_all_trains_and_validates_on_every_case(base: Path) -> None:
    trainer = build(variant(base, "all"), "all")
    assert trainer.do_split() == ([f"ball_{i}" for i in range(6)],) * 2


def test_missing_plans_list_what_is_there(base: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no plans ptPlans__none .*there: .*ptPlans__base"):
        train("ptPlans__none")
    with pytest.raises(ValueError, match="no configuration '2d', only: 3d_fullres"):
        run_fold(7, "ptPlans__base", "2d", 0, device="cpu")


def test_nnunets_predictor_reads_the_checkpoint_as_the_stock_trainers(
    trained: FoldResult, planned: Path, tmp_path: Path
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    result = trained
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(result.folder.parent), (0,))
    assert predictor.trainer_name == "nnUNetTrainer"
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    image = planned.parents[2] / "raw" / DATASET / "imagesTr" / f"{VAL_CASE}_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], [str(tmp_path / "out")], save_probabilities=False)
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(result.summary.parent / f"{VAL_CASE}.nii.gz")))
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii.gz")))
    assert ours.any()
    assert np.array_equal(ours, theirs)


def test_mirrored_validation_is_asked_for_in_the_plans(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(variant(base, "mirror", validation_mirroring=True))
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    calls = []
    monkeypatch.setattr(trainer.network, "forward", counting(trainer.network.forward, calls))
    trainer.validate("mirrored")
    mirrored = len(calls)
    calls.clear()
    trainer.config = FinetuningConfig(splits=trainer.config.splits)
    trainer.validate("plain")
    assert mirrored == 8 * len(calls) > 0


def counting(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return counted
