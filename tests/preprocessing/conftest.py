"""A plan and a small raw dataset, so that preprocessing can be compared with nnU-Net's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnssl_ext.dataset.manifest import Manifest, write_dataset_json
from nnssl_ext.planners.plan import Plan

SEPARATE_Z = {"order": 3, "order_z": 0, "force_separate_z": None}
STATISTICS = {
    "mean": 100.0,
    "median": 100.0,
    "std": 50.0,
    "min": -300.0,
    "max": 500.0,
    "percentile_00_5": -20.0,
    "percentile_99_5": 240.0,
}


def smooth_image(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth image (Z, Y, X) with zero margins on two sides and a hole of zeros."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1)
    image = (noise / noise.std() * 60 + 100).astype(np.float32)
    image[:2] = 0
    image[:, -3:] = 0
    image[5:8, 5:8, 5:8] = 0
    return image


@pytest.fixture
def make_image() -> Callable[[int, tuple[int, ...]], np.ndarray]:
    return smooth_image


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    def make(
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        schemes: Sequence[str] = ("ZScoreNormalization",),
        use_mask: Sequence[bool] | None = None,
        transpose: Sequence[int] = (0, 1, 2),
        function: str = "resample_data_or_seg_to_shape",
    ) -> Plan:
        keywords = {"is_seg": False, **SEPARATE_Z} if function == "resample_data_or_seg_to_shape" else {}
        configuration: dict[str, Any] = {
            "data_identifier": "nnsslPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [16] * len(spacing),
            "spacing": list(spacing),
            "normalization_schemes": list(schemes),
            "use_mask_for_norm": list(use_mask or [False] * len(schemes)),
            "resampling_fn_data": function,
            "resampling_fn_data_kwargs": keywords,
            "resampling_fn_seg": function,
            "resampling_fn_seg_kwargs": keywords and {**keywords, "is_seg": True, "order": 1},
            "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
        }
        return Plan(
            {
                "dataset_name": "Dataset001_Test",
                "plans_name": "nnsslPlans",
                "image_reader_writer": "SimpleITKIO",
                "transpose_forward": list(transpose),
                "transpose_backward": np.argsort(transpose).tolist(),
                "foreground_intensity_properties_per_channel": {str(i): STATISTICS for i in range(len(schemes))},
                "configurations": {"3d_fullres": configuration},
            }
        )

    return make


@pytest.fixture
def make_dataset(roots: Path) -> Callable[..., Manifest]:
    """Writes oblique images of several shapes into `$nnssl_raw/Dataset001_Test` and returns their manifest."""

    def make(
        num_cases: int = 4, shape: tuple[int, ...] = (14, 22, 20), num_channels: int = 1, ending: str = ".nii.gz"
    ) -> Manifest:
        folder = roots / "raw" / "Dataset001_Test"
        (folder / "imagesTr").mkdir(parents=True)
        cosine, sine = np.cos(0.3), np.sin(0.3)
        for case in range(num_cases):
            size = tuple(edge + case for edge in shape)
            for channel in range(num_channels):
                image = sitk.GetImageFromArray(smooth_image(10 * case + channel, size))
                image.SetSpacing((0.9, 1.1, 2.0 + case))
                image.SetOrigin((3.0, -7.0, 11.0))
                image.SetDirection((cosine, -sine, 0, sine, cosine, 0, 0, 0, 1))
                sitk.WriteImage(image, str(folder / "imagesTr" / f"case_{case}_{channel:04d}{ending}"))
        names = [f"c{channel}" for channel in range(num_channels)]
        write_dataset_json(folder, channel_names=names, file_ending=ending, num_cases=num_cases)
        return Manifest.load(folder)

    return make
