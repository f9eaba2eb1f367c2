"""A tiny labelled dataset in nnU-Net's format, and checkpoints in upstream's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnssl_ext.core.records import write_json

DATASET = "Dataset007_Balls"
NUM_CASES = 6
SHAPE = (14, 20, 18)
WIDTHS = (4, 8, 8)


def architecture(dims: int = 3, name: str = "ResidualEncoderUNet") -> dict[str, Any]:
    """A three-stage U-Net of nnU-Net's, some thousand parameters."""
    blocks = "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": list(WIDTHS),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 3,
            "strides": [[1] * dims, [2] * dims, [2] * dims],
            blocks: [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def network(channels: int = 1, outputs: int = 1, seed: int = 0, **kwargs: Any) -> torch.nn.Module:
    """That U-Net as nnU-Net builds it."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(seed)
    arch = architecture(**kwargs)
    return get_network_from_plans(
        arch["network_class_name"],
        arch["arch_kwargs"],
        arch["_kw_requires_import"],
        channels,
        outputs,
        deep_supervision=True,
    )


def checkpoint(channels: int = 1, dims: int = 3, **configuration: Any) -> dict[str, Any]:
    """A released checkpoint as upstream writes it: exactly three keys."""
    net = network(channels, channels, dims=dims)
    arch = architecture(dims)
    patch = [16] * dims
    settings = {
        "data_identifier": "nnsslPlans_onemmiso",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "spacing": [1.0] * dims,
        "patch_size": patch,
    }
    plan = {
        "architecture_plans": {
            "arch_class_name": "ResidualEncoderUNet",
            "arch_kwargs": arch["arch_kwargs"],
            "arch_kwargs_requiring_import": arch["_kw_requires_import"],
        },
        "pretrain_plan": {
            "dataset_name": "Dataset001_Unlabelled",
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "experiment_planner_used": "FixedResEncUNetPlanner",
            "configurations": {"onemmiso": {**settings, **configuration}},
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }
    citations = [{"type": "Framework", "name": "nnssl", "paper": "arXiv:2412.17041"}]
    return {"network_weights": net.state_dict(), "citations": citations, "nnssl_adaptation_plan": plan}


def write_raw(raw: Path, channels: int = 1) -> Path:
    """Balls of two sizes in noise, anisotropic spacing, `channels` images a case."""
    import SimpleITK as sitk

    folder = raw / DATASET
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    for index in range(NUM_CASES):
        label = np.zeros(SHAPE, np.uint8)
        for value, radius in ((1, 5.0), (2, 3.0)):
            centre = np.array(SHAPE) * rng.uniform(0.35, 0.65, 3)
            label[((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2] = value
        for channel in range(channels):
            image = rng.normal(100, 10, SHAPE) + 80 * label
            _write(sitk, image.astype(np.float32), folder / "imagesTr" / f"ball_{index}_{channel:04d}.nii.gz")
        _write(sitk, label, folder / "labelsTr" / f"ball_{index}.nii.gz")
    names = {str(channel): f"noise{channel}" for channel in range(channels)}
    labels = {"background": 0, "large": 1, "small": 2}
    description = {"channel_names": names, "labels": labels, "numTraining": NUM_CASES, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", description)
    return folder


def _write(sitk: Any, array: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 1.5))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def raw_dataset(roots: Path) -> Path:
    """The tiny dataset in `nnUNet_raw`."""
    return write_raw(roots / "raw")


@pytest.fixture
def checkpoint_file(tmp_path: Path) -> Path:
    """A pretrained checkpoint in upstream's released form."""
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint(), path)
    return path


def write_fingerprint(preprocessed: Path, channels: int = 1) -> Path:
    """nnU-Net's fingerprint of the tiny dataset, without the processes that extracting it takes."""
    statistics = {"mean": 180.0, "median": 180.0, "std": 40.0, "min": 90.0, "max": 290.0}
    statistics |= {"percentile_99_5": 280.0, "percentile_00_5": 95.0}
    folder = preprocessed / DATASET
    content = {
        "spacings": [[1.5, 1.0, 1.0]] * NUM_CASES,
        "shapes_after_crop": [list(SHAPE)] * NUM_CASES,
        "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(channels)},
        "median_relative_size_after_cropping": 1.0,
    }
    write_json(folder / "dataset_fingerprint.json", content)
    return folder


@pytest.fixture
def labelled_dataset(raw_dataset: Path, roots: Path) -> Path:
    """The tiny dataset with its fingerprint; its preprocessed folder."""
    return write_fingerprint(roots / "preprocessed")
