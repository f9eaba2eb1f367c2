"""One image, against nnU-Net's own preprocessor on the same plan."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.case import preprocess_array

Z, CT = "ZScoreNormalization", "CTNormalization"


def nnunet(data: np.ndarray, spacing: tuple[float, ...], plan: Plan) -> tuple[np.ndarray, dict[str, Any]]:
    manager = PlansManager(plan.raw)
    configuration = manager.get_configuration("3d_fullres")
    description = {"labels": {"background": 0}, "channel_names": {"0": "image"}}
    properties: dict[str, Any] = {"spacing": list(spacing)}
    stock = DefaultPreprocessor(verbose=False)
    array, _, properties = stock.run_case_npy(data, None, properties, manager, configuration, description)
    return array, properties


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "options"),
    [
        ((19, 23, 21), (1.0, 1.0, 1.0), (0.8, 1.2, 1.1), {}),
        ((19, 23, 21), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), {}),
        ((14, 23, 21), (4.0, 1.0, 1.0), (1.0, 1.2, 1.1), {}),
        ((14, 23, 21), (4.0, 1.0, 1.0), (4.0, 1.2, 1.1), {}),
        ((19, 13, 21), (1.0, 3.5, 1.0), (1.2, 1.2, 1.2), {"transpose": (1, 0, 2)}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (0.8, 1.2, 1.1), {"schemes": (CT,)}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (0.8, 1.2, 1.1), {"use_mask": (True,)}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (0.8, 1.2, 1.1), {"schemes": (Z, CT), "use_mask": (True, False)}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (0.8, 1.2, 1.1), {"schemes": (Z, Z), "transpose": (2, 0, 1)}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (1.2, 1.1), {}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (0.8, 1.2, 1.1), {"schemes": ("RescaleTo01Normalization",)}),
        ((19, 23, 21), (1.0, 2.0, 1.0), (2.0, 2.0, 2.0), {"function": "no_resampling_hack"}),
    ],
)
def test_numbers_and_properties_equal_nnunet(
    make_plan: Callable[..., Plan],
    make_image: Callable[..., np.ndarray],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    options: dict[str, Any],
) -> None:
    plan = make_plan(target, **options)
    configuration = plan.configuration("3d_fullres")
    data = np.stack([make_image(seed, shape) for seed in range(configuration.num_input_channels)])
    before = data.copy()
    ours = preprocess_array(data, spacing, plan, configuration)
    theirs, properties = nnunet(data, spacing, plan)
    np.testing.assert_array_equal(data, before)
    np.testing.assert_allclose(ours.data, theirs, atol=2e-5)
    assert ours.data.dtype == np.float32
    assert ours.foreground.shape == theirs.shape[1:]
    for name, value in properties.items():
        assert ours.properties[name] == [list(item) if isinstance(item, list) else item for item in value]


def test_flat_images_equal_nnunet(make_plan: Callable[..., Plan], make_image: Callable[..., np.ndarray]) -> None:
    plan = make_plan((1.5, 1.5))
    data = make_image(0, (9, 40, 37))[4][None, None]
    ours = preprocess_array(data, (999.0, 1.0, 1.0), plan, plan.configuration("3d_fullres"))
    theirs, _ = nnunet(data, (999.0, 1.0, 1.0), plan)
    assert ours.data.shape == (1, 1, 25, 25)
    np.testing.assert_allclose(ours.data, theirs, atol=2e-5)


def test_spacing_is_that_of_the_stored_array(
    make_plan: Callable[..., Plan], make_image: Callable[..., np.ndarray]
) -> None:
    data = make_image(0, (12, 14, 16))[None]
    for target, function, expected in (
        ((0.8, 1.2, 1.1), "resample_data_or_seg_to_shape", (0.8, 1.2, 1.1)),
        ((1.2, 1.1), "resample_data_or_seg_to_shape", (2.0, 1.2, 1.1)),
        ((0.8, 1.2, 1.1), "no_resampling_hack", (2.0, 3.0, 1.0)),
    ):
        plan = make_plan(target, function=function, transpose=(1, 0, 2))
        result = preprocess_array(data, (3.0, 2.0, 1.0), plan, plan.configuration("3d_fullres"))
        assert result.spacing == expected


def test_foreground_lies_where_the_bright_object_is(make_plan: Callable[..., Plan]) -> None:
    data = np.ones((1, 20, 24, 28), np.float32)
    data[0, 4:12, 4:12, 16:24] = 100
    plan = make_plan((2.0, 2.0, 2.0))
    result = preprocess_array(data, (1.0, 1.0, 1.0), plan, plan.configuration("3d_fullres"))
    expected = np.zeros((10, 12, 14), bool)
    expected[2:6, 2:6, 8:12] = True
    np.testing.assert_array_equal(result.foreground, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(make_plan: Callable[..., Plan], bad: float) -> None:
    plan = make_plan(schemes=(Z, Z))
    data = np.ones((2, 6, 6, 6), np.float32)
    data[1, 2, 2, 2:4] = bad
    with pytest.raises(ValueError, match="channel 1 has 2 voxels that are NaN or infinite"):
        preprocess_array(data, (1, 1, 1), plan, plan.configuration("3d_fullres"))


def test_an_empty_image_is_refused(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    with pytest.raises(ValueError, match="zero everywhere"):
        preprocess_array(np.zeros((1, 6, 6, 6)), (1, 1, 1), plan, plan.configuration("3d_fullres"))
