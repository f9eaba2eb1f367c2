from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext.engine.checkpoint import resenc_l
from nnssl_ext.finetuning.pretrained import read_pretrained

from .conftest import architecture, checkpoint


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "file.pth"
    torch.save(content, path)
    return path


def test_a_released_checkpoint_of_upstreams_is_read(tmp_path: Path) -> None:
    content = checkpoint(channels=2)
    found = read_pretrained(saved(tmp_path, content))
    assert found.architecture == architecture()
    assert found.num_channels == 2
    assert found.patch_size == (16, 16, 16)
    assert found.spacing == (1.0, 1.0, 1.0)
    assert (found.encoder_key, found.stem_key) == ("encoder.stages", "encoder.stem")
    assert found.in_proj_keys[0] == "encoder.stem.convs.0.conv"
    assert found.citations == tuple(content["citations"])
    assert found.content_hashes == ()
    assert found.trains_decoder is None


def test_a_full_training_checkpoint_of_upstreams_is_read(tmp_path: Path) -> None:
    extra = {"optimizer_state": {}, "grad_scaler_state": None, "logging": {}, "_best_ema": 0.1, "current_epoch": 3}
    assert read_pretrained(saved(tmp_path, {**checkpoint(), **extra})).num_channels == 1


def test_resenc_l_needs_no_arguments(tmp_path: Path) -> None:
    content = checkpoint()
    content["nnssl_adaptation_plan"]["architecture_plans"] = {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
        "arch_kwargs_requiring_import": None,
    }
    assert read_pretrained(saved(tmp_path, content)).architecture == resenc_l()


def test_what_nnunet_sets_itself_is_left_out_of_the_architecture(tmp_path: Path) -> None:
    content = checkpoint()
    arch = content["nnssl_adaptation_plan"]["architecture_plans"]
    arch["arch_kwargs"] |= {"input_channels": 1, "num_classes": 1, "deep_supervision": False}
    assert read_pretrained(saved(tmp_path, content)).architecture == architecture()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compile_are_removed(tmp_path: Path, prefix: str) -> None:
    content = checkpoint()
    names = list(content["network_weights"])
    content["network_weights"] = {f"{prefix}{key}": value for key, value in content["network_weights"].items()}
    assert list(read_pretrained(saved(tmp_path, content)).weights) == names


@pytest.mark.parametrize("style", [{"spacing_style": "noresample"}, {"spacing": "noresample"}, {"spacing": None}])
def test_pretraining_without_resampling_has_no_spacing(tmp_path: Path, style: dict) -> None:
    assert read_pretrained(saved(tmp_path, checkpoint(**style))).spacing is None


def test_networks_that_nnunet_cannot_train_are_refused(tmp_path: Path) -> None:
    content = checkpoint()
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_class_name"] = "NoSkipResEncL"
    with pytest.raises(ValueError, match=r"cannot fine-tune the network 'NoSkipResEncL'. Supported: ResEncL, PrimusS"):
        read_pretrained(saved(tmp_path, content))


@pytest.mark.parametrize(
    "key", ["pretrain_plan", "key_to_encoder", "keys_to_in_proj", "recommended_downstream_patchsize"]
)
def test_a_missing_part_of_the_plan_is_named(tmp_path: Path, key: str) -> None:
    content = checkpoint()
    del content["nnssl_adaptation_plan"][key]
    with pytest.raises(ValueError, match=f"file.pth: its adaptation plan has no '{key}'"):
        read_pretrained(saved(tmp_path, content))


def test_a_plain_nnunet_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no nnssl_adaptation_plan, only network_weights, trainer_name"):
        read_pretrained(saved(tmp_path, {"network_weights": {}, "trainer_name": "nnUNetTrainer"}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_pretrained(tmp_path / "none.pth")
