"""A transformer through fine-tuning: nnU-Net's own trainer takes it, its positions fit the patch, ours has a recipe."""

from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.records import read_json
from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.finetuning.config import read_config
from nnssl_ext.finetuning.layers import in_encoder, layer_scales
from nnssl_ext.finetuning.nnunet_dataset import preprocess
from nnssl_ext.finetuning.nnunet_plans import FinetuningPlan, plan_finetuning
from nnssl_ext.finetuning.nnunet_trainers import SSLFinetuneTrainer
from nnssl_ext.models.primus import resample_positions
from nnssl_ext.trainers.mae import MAETrainer

from .conftest import DATASET, SHAPE

PATCH = (16, 24, 8)
SHORT = {"num_epochs": 1, "iterations_per_epoch": 3, "val_iterations_per_epoch": 1}


@pytest.fixture
def pretrained(tiny_vit_plan, tmp_path: Path) -> Path:
    """A checkpoint of `MAETrainer` on a transformer."""
    plan, trainer = tiny_vit_plan(PATCH), MAETrainer.configured([], "vit")
    torch.manual_seed(0)
    task = trainer.build_task(plan.configuration("3d_fullres"), num_cases=4)
    path = tmp_path / "checkpoint_final.pth"
    save_checkpoint(path, build_checkpoint(task, trainer, plan, content_hashes=[]))
    return path


def nnunet_trainer(plan: FinetuningPlan, cls: type):
    plans = read_json(plan.plans_path)
    plans["continue_training"] = False
    dataset_json = read_json(plan.plans_path.parent / "dataset.json")
    return cls(plans, plan.configuration, 0, dataset_json, torch.device("cpu"))


def ready(plan: FinetuningPlan) -> FinetuningPlan:
    with make_executor(0) as executor:
        preprocess(plan.plans_path, plan.configuration, executor)
    return plan


@pytest.mark.parametrize("decoder", [None, "unetr", "mlp"])
def test_the_stock_trainer_fine_tunes_it_and_the_stock_predictor_takes_it(
    labelled_dataset: Path,
    pretrained: Path,
    monkeypatch: pytest.MonkeyPatch,
    roots: Path,
    tmp_path: Path,
    decoder: str | None,
) -> None:
    """Catches a network that trains and cannot be built again from its folder, or gives a window no single output."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plan = ready(plan_finetuning(DATASET, pretrained, "vit", decoder=decoder))
    trainer = nnunet_trainer(plan, nnUNetTrainer)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(plan.weights_path), verbose=False)
    source = torch.load(pretrained)["network_weights"]
    state = trainer.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.items() if in_encoder(name))
    trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
    assert torch.isfinite(torch.tensor(trainer.logger.get_value("train_losses", step=-1)))

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    images = [str(roots / "raw" / DATASET / "imagesTr" / "ball_0_0000.nii.gz")]  # four windows long
    predictor.predict_from_files_sequential([images], [str(tmp_path / "out")], save_probabilities=False)
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii.gz")))
    assert predicted.shape == SHAPE
    trainer.set_deep_supervision_enabled(False)
    window = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(predictor.network.eval()(window), trainer.network.eval()(window))


@pytest.mark.parametrize(
    ("decoder", "scales"),
    [("primus", [PATCH]), ("mlp", [PATCH]), ("unetr", [PATCH, (16, 12, 4)])],
)
def test_stock_deep_supervision_weighs_the_outputs_there_are(
    labelled_dataset: Path, pretrained: Path, decoder: str, scales: list[tuple[int, ...]]
) -> None:
    """Tokens are 2x4x4 voxels: the pyramid halves the two finer axes first. A lone output has the whole weight."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = nnunet_trainer(ready(plan_finetuning(DATASET, pretrained, "vit", decoder=decoder)), nnUNetTrainer)
    trainer.initialize()
    assert list(trainer.loss.weight_factors) == [1, 0]  # nnU-Net gives its lowest resolution none
    outputs = trainer.network(torch.zeros(1, 1, *PATCH))
    assert [tuple(output.shape[2:]) for output in outputs] == scales
    targets = [
        [f * size for f, size in zip(scale, PATCH, strict=True)] for scale in trainer._get_deep_supervision_scales()
    ]
    assert list(map(tuple, targets))[: len(scales)] == scales
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network.eval()(torch.zeros(1, 1, *PATCH)).shape == (1, 3, *PATCH)


@pytest.mark.parametrize("schedule", ["warmup", "sawtooth"])
def test_our_trainer_trains_it_by_a_transformers_recipe(
    labelled_dataset: Path, pretrained: Path, schedule: str
) -> None:
    lengths = {"decoder_warmup_epochs": 1 / 3, "decoder_decay_epochs": 0, "warmup_epochs": 1 / 3}
    settings = {"schedule": schedule, **SHORT, **(lengths if schedule == "sawtooth" else {})}
    plan = ready(plan_finetuning(DATASET, pretrained, "vit", **settings))
    config = read_config(read_json(plan.plans_path))
    assert (config.optimizer, config.lr, config.weight_decay, config.gradient_clip) == ("adamw", 1e-4, 5e-2, 1)
    trainer = nnunet_trainer(plan, SSLFinetuneTrainer)
    trainer.initialize()
    trainer.on_train_start()
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    moved = {name for name, value in trainer.network.named_parameters() if not torch.equal(value, before[name])}
    assert any(not in_encoder(name) for name in moved)
    assert any(map(in_encoder, moved)) is (schedule == "warmup")  # the sawtooth's first tooth rests the encoder


def test_from_scratch_it_learns_faster(labelled_dataset: Path, pretrained: Path) -> None:
    config = read_config(read_json(plan_finetuning(DATASET, pretrained, "scratch", from_scratch=True).plans_path))
    assert (config.optimizer, config.lr, config.schedule, config.pretrained_weights) == ("adamw", 3e-4, "warmup", None)


@pytest.mark.parametrize("patch_size", [(8, 16, 16), (24, 8, 16)], ids=["smaller", "as many tokens"])
def test_positions_are_interpolated_to_another_patch(
    labelled_dataset: Path, pretrained: Path, patch_size: tuple[int, ...]
) -> None:
    plan = plan_finetuning(DATASET, pretrained, "vit", patch_size=patch_size)
    (configuration,) = read_json(plan.plans_path)["configurations"].values()
    assert configuration["architecture"]["arch_kwargs"]["input_shape"] == list(patch_size)
    grid = (patch_size[0] // 2, patch_size[1] // 4, patch_size[2] // 4)
    source = torch.load(pretrained)["network_weights"]["eva.pos_embed"]
    written = torch.load(plan.weights_path)["network_weights"]["eva.pos_embed"]
    assert torch.equal(written, resample_positions(source, (8, 6, 2), grid))
    (row,) = [row for row in plan.report["keys"] if row["key"] == "eva.pos_embed"]
    assert (row["status"], row["note"]) == ("adapted", f"interpolated from (8, 6, 2) to {grid} tokens")


def test_every_key_is_accounted_for(labelled_dataset: Path, pretrained: Path) -> None:
    plan = plan_finetuning(DATASET, pretrained, "vit")
    status = {row["key"]: row["status"] for row in plan.report["keys"] if row["status"] != "left over"}
    for name in torch.load(plan.weights_path)["network_weights"]:
        assert status[name] == ("loaded" if in_encoder(name) else "fresh")
    assert plan.report["pretrain_info"]["key_to_lpe"] == "eva.pos_embed"


@pytest.mark.parametrize("decoder", ["unetr", "mlp"])
def test_what_another_decoder_needs_is_fresh_and_complete(
    labelled_dataset: Path, pretrained: Path, decoder: str
) -> None:
    """nnU-Net refuses a weights file that lacks anything but output layers."""
    plan = plan_finetuning(DATASET, pretrained, "vit", decoder=decoder)
    status = {row["key"]: row["status"] for row in plan.report["keys"] if row["status"] != "left over"}
    assert {key for key, found in status.items() if found == "loaded"} == set(filter(in_encoder, status))
    fresh = {key for key, found in status.items() if found == "fresh"}
    assert any(".seg_layers." in key for key in fresh)
    assert any(".seg_layers." not in key for key in fresh)
    left = {row["key"] for row in plan.report["keys"] if row["status"] == "left over"}
    assert all(key.startswith("decoder.seg_layers.") for key in left)


def test_a_decoder_is_no_choice_of_a_u_nets(labelled_dataset: Path, checkpoint_file: Path) -> None:
    with pytest.raises(ValueError, match="belongs to transformers, and the pretrained network is a U-Net"):
        plan_finetuning(DATASET, checkpoint_file, "cnn", decoder="unetr")


def test_a_transformers_decoder_is_never_transferred(labelled_dataset: Path, pretrained: Path) -> None:
    with pytest.raises(ValueError, match="did not train the decoder; use -transfer encoder"):
        plan_finetuning(DATASET, pretrained, "vit", transfer="encoder_decoder")


def test_a_patch_of_broken_tokens_is_refused(labelled_dataset: Path, pretrained: Path) -> None:
    with pytest.raises(ValueError, match=r"must be divisible by \(2, 4, 4\).* try -patch_size 8 16 16"):
        plan_finetuning(DATASET, pretrained, "vit", patch_size=(7, 15, 15))


def test_each_block_learns_more_slowly_than_the_next() -> None:
    names = ["down_projection.proj.weight", "eva.pos_embed", "eva.blocks.0.x", "eva.blocks.1.x", "eva.norm.bias"]
    scales = layer_scales([*names, "decoder.seg_layers.0.decode.0.weight"], 0.5)
    assert list(scales.values()) == pytest.approx([0.125, 0.125, 0.25, 0.5, 0.5, 1.0])


@pytest.mark.parametrize("decoder", ["primus", "unetr", "mlp"])
def test_pictures_are_fine_tuned_like_volumes(
    labelled_dataset: Path, tiny_vit_plan, tmp_path: Path, decoder: str
) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plan, trainer = tiny_vit_plan((24, 16)), MAETrainer.configured([], "vit")
    task = trainer.build_task(plan.configuration("2d"), num_cases=4)
    path = tmp_path / "flat.pth"
    save_checkpoint(path, build_checkpoint(task, trainer, plan, content_hashes=[]))
    planned = ready(plan_finetuning(DATASET, path, "flat", decoder=decoder, patch_size=(16, 20)))
    assert planned.configuration == "2d"
    stock = nnunet_trainer(planned, nnUNetTrainer)
    stock.initialize()
    load_pretrained_weights(stock.network, str(planned.weights_path), verbose=False)
    outputs = stock.network(torch.zeros(2, 1, 16, 20))
    assert [tuple(output.shape) for output in outputs] == [(2, 3, 16, 20), (2, 3, 8, 10)][: len(outputs)]
    assert len(outputs) == (2 if decoder == "unetr" else 1)
