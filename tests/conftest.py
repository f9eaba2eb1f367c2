"""Fixtures for every test: folders of a pipeline, and the real volumes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nnssl_ext.planners.plan import Plan

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two busy-waiting torch processes on two cores run 40x slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real volumes; the test is skipped where it is absent."""
    folder = Path(os.environ.get("NNSSL_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real volumes in {folder}; set NNSSL_TEST_DATA to their folder")
    return folder


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder with raw, preprocessed and results in it, and the environment pointing there."""
    for kind in ("raw", "preprocessed", "results"):
        folder = tmp_path / kind
        folder.mkdir()
        monkeypatch.setenv(f"nnssl_{kind}", str(folder))
        monkeypatch.setenv(f"nnUNet_{kind}", str(folder))
    return tmp_path


@pytest.fixture(params=[(16, 24, 8), (24, 16)], ids=["3d", "2d"])
def patch_size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """Voxels per axis of a small crop, in 3D and in 2D."""
    return request.param


@pytest.fixture(scope="session")
def tiny_plan() -> Callable[..., Plan]:
    """Makes plans of a residual U-Net of three stages, 4 to 16 features wide; a patch of two edges makes them 2D."""
    from nnssl_ext.planners.architecture import Topology, resenc_architecture
    from nnssl_ext.planners.plan import Plan
    from nnssl_ext.planners.spacing import resampling_keys

    def make(patch_size: tuple[int, ...] = (16, 24, 8), channels: int = 1) -> Plan:
        dims = len(patch_size)
        topology = Topology(
            patch_size=patch_size,
            strides=((1,) * dims, (2,) * dims, (2,) * dims),
            kernel_sizes=((3,) * dims,) * 3,
            divisor=(4,) * dims,
        )
        name = "2d" if dims == 2 else "3d_fullres"
        configuration = {
            "data_identifier": f"nnsslPlans_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": list(patch_size),
            "median_image_size_in_voxels": [float(size) for size in patch_size],
            "spacing": [1.0] * dims,
            "normalization_schemes": ["ZScoreNormalization"] * channels,
            "use_mask_for_norm": [False] * channels,
            **resampling_keys(kept=False),
            "architecture": resenc_architecture(topology, base_features=4, max_features=16, blocks=(1, 1, 1)),
            "batch_dice": False,
        }
        return Plan(
            {
                "dataset_name": "Dataset999_Tiny",
                "plans_name": "nnsslPlans",
                "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
                "original_median_shape_after_transp": [32, 32, 32],
                "image_reader_writer": "SimpleITKIO",
                "transpose_forward": [0, 1, 2],
                "transpose_backward": [0, 1, 2],
                "configurations": {name: configuration},
                "experiment_planner_used": "nnsslPlanner",
                "label_manager": "LabelManager",
                "foreground_intensity_properties_per_channel": {},
                "nnssl_planning": {"spacing_rule": "iso"},
            }
        )

    return make


@pytest.fixture(scope="session")
def tiny_vit_plan(tiny_plan) -> Callable[..., Plan]:
    """The same for a Primus of two blocks, 24 wide, with tokens of 2x4x4 voxels (2D: 4x4)."""
    from nnssl_ext.planners.plan import Plan
    from nnssl_ext.planners.primus import PrimusSize, primus_architecture

    size = PrimusSize(depth=2, num_heads=2, head_width={2: 12, 3: 12})

    def make(patch_size: tuple[int, ...] = (16, 24, 8), channels: int = 1) -> Plan:
        plan = tiny_plan(patch_size, channels)
        (configuration,) = plan.raw["configurations"].values()
        configuration["architecture"] = primus_architecture(size, patch_size, (2, 4, 4)[-len(patch_size) :])
        return Plan({**plan.raw, "experiment_planner_used": "nnsslPlannerPrimusXS"})

    return make
