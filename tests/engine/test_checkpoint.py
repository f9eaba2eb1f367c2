"""Checkpoints: what upstream and nnU-Net read, size on disk, damage, and that nothing private is inside."""

import collections
import errno
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl_ext.engine import checkpoint as module
from nnssl_ext.engine.checkpoint import (
    adaptation_plan,
    build_checkpoint,
    load_checkpoint,
    resenc_l,
    save_checkpoint,
)
from nnssl_ext.models.resenc import UNetEncoder, build_network
from nnssl_ext.trainers.mae import MAETrainer
from tests.engine.conftest import RELEASED_KEYS

HASHES = ["b" * 64, "a" * 64]


def make_task(plan, seed: int = 0):
    torch.manual_seed(seed)
    trainer = MAETrainer.configured(["block_size=4"])
    task = trainer.build_task(plan.configuration(plan.configuration_names[0]), num_cases=4)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task, trainer


def written(plan, path: Path, **kwargs):
    task, trainer = make_task(plan)
    save_checkpoint(path, build_checkpoint(task, trainer, plan, content_hashes=HASHES, **kwargs))
    return task, load_checkpoint(path)


def stock_network(plan, *, num_classes: int, deep_supervision: bool):
    configuration = plan.configuration(plan.configuration_names[0])
    architecture = configuration.architecture
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        configuration.num_input_channels,
        num_classes,
        deep_supervision=deep_supervision,
    )


@pytest.mark.parametrize("patch_size", [(16, 24, 8), (24, 16)], ids=["3d", "2d"])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_a_stock_network_loads_it_and_computes_the_same(tiny_plan, tmp_path, patch_size, deep_supervision):
    plan = tiny_plan(patch_size, channels=2)
    task, _ = written(plan, tmp_path / "checkpoint_final.pth")
    network = stock_network(plan, num_classes=2, deep_supervision=deep_supervision)
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    network.decoder.seg_layers.load_state_dict(task.decoder.seg_layers.state_dict())  # nnU-Net keeps its own heads
    x = torch.randn(2, 2, *patch_size)
    with torch.no_grad():
        output = network(x)
        assert torch.equal(output[0] if deep_supervision else output, task.decoder(task.encoder(x)))


def test_the_files_size_is_that_of_the_parameters(tiny_plan, tmp_path):
    wide = tiny_plan()
    arch = wide.raw["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arch["features_per_stage"] = [16, 32, 64]
    task, checkpoint = written(wide, tmp_path / "c.pth")
    num_bytes = sum(p.numel() * p.element_size() for p in task.parameters())
    assert sum(v.numel() * v.element_size() for v in checkpoint["network_weights"].values()) > 3 * num_bytes
    assert num_bytes < (tmp_path / "c.pth").stat().st_size < 1.15 * num_bytes


def test_weights_saved_for_export_and_for_resuming_are_stored_once(tiny_plan, tmp_path):
    wide = tiny_plan()
    wide.raw["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32, 64]
    task, trainer = make_task(wide)
    save_checkpoint(
        tmp_path / "c.pth",
        build_checkpoint(task, trainer, wide, content_hashes=[], resume={"task": task.state_dict(), "step": 7}),
    )
    num_bytes = sum(p.numel() * p.element_size() for p in task.parameters())
    assert (tmp_path / "c.pth").stat().st_size < 1.2 * num_bytes
    loaded = load_checkpoint(tmp_path / "c.pth")
    again, _ = make_task(wide, seed=1)
    again.load_state_dict(loaded["resume"]["task"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), task.parameters(), strict=True))
    assert set(loaded) == RELEASED_KEYS | {"resume"}


def test_aliases_are_complete_and_equal(tiny_plan, tmp_path):
    _, checkpoint = written(tiny_plan(), tmp_path / "c.pth")
    weights = checkpoint["network_weights"]
    assert set(weights) == set(stock_network(tiny_plan(), num_classes=1, deep_supervision=True).state_dict())
    for key, value in weights.items():
        if key.startswith("encoder."):
            assert torch.equal(weights[f"decoder.{key}"], value)
        if ".conv.weight" in key:
            assert torch.equal(weights[key.replace(".conv.", ".all_modules.0.")], value)


def test_adaptation_plan_follows_upstreams_schema(tiny_plan, tmp_path):
    plan = tiny_plan()
    _, checkpoint = written(plan, tmp_path / "c.pth")
    configuration = plan.raw["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]
    shared = (
        *("data_identifier", "preprocessor_name", "normalization_schemes", "use_mask_for_norm", "spacing"),
        *("patch_size", "resampling_fn_data", "resampling_fn_data_kwargs"),
    )
    assert checkpoint["nnssl_adaptation_plan"] == {
        "architecture_plans": {
            "arch_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {
            "dataset_name": "Dataset999_Tiny",
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "experiment_planner_used": "nnsslPlanner",
            "configurations": {
                "3d_fullres": {
                    **{key: configuration[key] for key in shared},
                    "spacing_style": "iso",
                    "resampling_fn_mask": configuration["resampling_fn_seg"],
                    "resampling_fn_mask_kwargs": configuration["resampling_fn_seg_kwargs"],
                }
            },
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [16, 24, 8],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def test_resenc_l_goes_by_upstreams_name(tiny_plan):
    plan = tiny_plan((160, 160, 160))
    configuration = replace(plan.configuration("3d_fullres"), architecture=resenc_l())
    with torch.device("meta"):
        encoder = UNetEncoder(build_network(configuration, 1))
    assert adaptation_plan(plan, configuration, encoder)["architecture_plans"] == {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
        "arch_kwargs_requiring_import": None,
    }


def test_only_the_used_configuration_is_written(tiny_plan, tmp_path):
    plan = tiny_plan()
    plan.raw["configurations"]["other"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    task, trainer = make_task(plan)
    configuration = plan.configuration("other")
    task = trainer.build_task(configuration, num_cases=4)
    checkpoint = build_checkpoint(task, trainer, plan, content_hashes=[])
    assert list(checkpoint["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]) == ["other"]
    assert list(checkpoint["nnssl_plans"]["configurations"]) == ["other"]
    assert checkpoint["nnssl_plans"]["configurations"]["other"]["patch_size"] == [16, 24, 8]
    assert type(plan)(checkpoint["nnssl_plans"]).configuration("other") == configuration


def test_it_says_how_it_was_made_and_what_to_cite(tiny_plan, tmp_path):
    _, checkpoint = written(tiny_plan(), tmp_path / "c.pth")
    assert set(checkpoint) == RELEASED_KEYS
    pretraining = checkpoint["nnssl_pretraining"]
    assert (pretraining["trainer"], pretraining["trains_decoder"], pretraining["num_cases"]) == ("MAETrainer", True, 4)
    assert pretraining["recipe"]["task_config"]["block_size"] == 4
    assert checkpoint["nnssl_content_hashes"] == sorted(HASHES)
    assert {entry["paper"] for entry in checkpoint["citations"]} >= {"arXiv:2111.06377", "arXiv:2412.17041"}


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.0),
        np.int64(1),
        np.zeros(2),
        Path("somewhere"),
        torch.__version__,
        collections.namedtuple("Point", "x")(1),
        {1, 2},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_load_again_is_refused_by_place(tmp_path, value):
    with pytest.raises(ValueError, match=r"checkpoint\['resume'\]\['list'\]\[1\] is of type"):
        save_checkpoint(tmp_path / "c.pth", {"network_weights": {}, "resume": {"list": [1, value]}})
    assert list(tmp_path.iterdir()) == []


def test_optimiser_states_and_dict_subclasses_load_again(tiny_plan, tmp_path):
    task, trainer = make_task(tiny_plan())
    optimizer = torch.optim.AdamW(task.parameters())
    task.decoder(task.encoder(torch.randn(1, 1, 16, 24, 8))).sum().backward()
    optimizer.step()
    resume = {"optimizer": optimizer.state_dict(), "best": collections.defaultdict(float, loss=0.5)}
    save_checkpoint(tmp_path / "c.pth", build_checkpoint(task, trainer, tiny_plan(), content_hashes=[], resume=resume))
    state = load_checkpoint(tmp_path / "c.pth")["resume"]
    assert state["best"] == {"loss": 0.5}
    fresh = torch.optim.AdamW(task.parameters())
    fresh.load_state_dict(state["optimizer"])
    for number, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], fresh.state_dict()["state"][number][name]) for name in values)


def test_views_of_one_memory_are_told_apart_by_shape_and_place(tmp_path):
    base = torch.arange(6.0)
    tensors = {"all": base, "front": base[:3], "back": base[3:], "table": base.view(2, 3), "turned": base.view(3, 2).T}
    save_checkpoint(tmp_path / "c.pth", {"network_weights": tensors})
    loaded = load_checkpoint(tmp_path / "c.pth")["network_weights"]
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_the_previous_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint(path, {"network_weights": {"w": torch.zeros(3)}})

    def half(value, where):
        where.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(module.torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"network_weights": {"w": torch.ones(3)}})
    assert torch.equal(load_checkpoint(path)["network_weights"]["w"], torch.zeros(3))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint_final\.pth.*nnssl_train"):
        load_checkpoint(path)
    save_checkpoint(path, {"network_weights": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    others = ((text, "it is none") for text in (b"garbage", b"hello world\nthis is text", b"root:x:0:0:root\n"))
    for damaged, reason in ((b"", "cut short"), (whole[: len(whole) // 2], "cut short"), *others):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"checkpoint_final\.pth cannot be read as a checkpoint: .*{reason}"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="holds no network_weights"):
        load_checkpoint(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "checkpoint_final.pth"
    path.touch()
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: Permission denied\."):
        load_checkpoint(path)


@pytest.mark.parametrize(("free", "expected"), [(3999, OSError), (4001, RuntimeError)])
def test_a_full_disk_is_told_from_another_failure_of_torch(tmp_path, monkeypatch, free: int, expected: type) -> None:
    """Catches a training that ends on a full disk with torch's \"unexpected pos 64 vs 0\"."""

    def fail(content: object, path: Path) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    weights = torch.zeros(1000)
    with pytest.raises(expected, match=r"No space left .*checkpoint_latest\.pth|unexpected pos"):
        save_checkpoint(tmp_path / "checkpoint_latest.pth", {"a": weights, "b": weights})
    assert list(tmp_path.iterdir()) == []


class Intruder:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_file_is_not_executed(tmp_path, capsys):
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(pickle.dumps(Intruder(), protocol=2))
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: .* might run code"):
        load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
