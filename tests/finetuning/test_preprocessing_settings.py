from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext.finetuning.preprocessing_settings import Preprocessing, resolve_preprocessing
from nnssl_ext.finetuning.pretrained import Pretrained, read_pretrained

from .conftest import checkpoint

STATISTICS = {"mean": 1.0, "std": 2.0, "percentile_00_5": -3.0, "percentile_99_5": 4.0}
FINGERPRINT = {
    "spacings": [[3.0, 0.5, 0.6], [4.0, 0.5, 0.8], [5.0, 0.9, 0.7]],
    "shapes_after_crop": [[10, 40, 40]] * 3,
    "foreground_intensity_properties_per_channel": {"0": STATISTICS, "1": STATISTICS},
}


def pretrained(
    tmp_path: Path, *, channels: int = 1, dims: int = 3, own: Any = None, **configuration: Any
) -> Pretrained:
    content = checkpoint(channels, dims, **configuration)
    content["nnssl_adaptation_plan"]["pretrain_plan"] |= own or {}
    path = tmp_path / "pretrained.pth"
    torch.save(content, path)
    return read_pretrained(path)


def resolve(source: Pretrained, mode: Any = "like_pretrained", channels: int = 1, **options: Any) -> Preprocessing:
    return resolve_preprocessing(mode, source, num_channels=channels, fingerprint=FINGERPRINT, **options)


def test_like_pretrained_repeats_the_pretraining(tmp_path: Path) -> None:
    axes = {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    source = pretrained(tmp_path, own=axes, spacing=[1.0, 2.0, 3.0], use_mask_for_norm=[True])
    found = resolve(source)
    assert found.spacing == (1.0, 2.0, 3.0)
    assert found.transpose_forward == (1, 0, 2)
    assert found.normalization_schemes == ("ZScoreNormalization",)
    assert found.use_mask_for_norm == (True,)
    assert found.resampling["resampling_fn_data_kwargs"]["order"] == 3
    assert found.resampling["resampling_fn_seg_kwargs"] == {
        "is_seg": True,
        "order": 1,
        "order_z": 0,
        "force_separate_z": None,
    }


def test_ct_statistics_are_those_of_the_pretraining(tmp_path: Path) -> None:
    theirs = {"0": {**STATISTICS, "mean": 77.0}}
    source = pretrained(
        tmp_path,
        own={"foreground_intensity_properties_per_channel": theirs},
        normalization_schemes=["CTNormalization"],
    )
    assert resolve(source).intensities == theirs
    assert resolve(source, channels=2).intensities == {"0": theirs["0"], "1": theirs["0"]}


def test_ct_without_statistics_is_refused(tmp_path: Path) -> None:
    source = pretrained(tmp_path, normalization_schemes=["CTNormalization"])
    with pytest.raises(ValueError, match=r"does not hold the intensity statistics.*-m default_nnunet"):
        resolve(source)


def test_fixed_takes_the_spacing_in_image_order_and_stores_it_transposed(tmp_path: Path) -> None:
    source = pretrained(tmp_path, own={"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]})
    assert resolve(source, "fixed", spacing=(3.0, 1.0, 2.0)).spacing == (2.0, 3.0, 1.0)


@pytest.mark.parametrize(
    ("mode", "spacing", "text"),
    [
        ("fixed", None, "needs a spacing"),
        ("like_pretrained", (1, 1, 1), "only that mode takes one"),
        ("fixed", (1, 1), "give 3 positive numbers"),
        ("fixed", (1, 0, 1), "give 3 positive numbers"),
        ("isotropic", None, "mode 'isotropic' is not known. Give one of like_pretrained, default_nnunet, fixed"),
    ],
)
def test_wrong_spacings_and_modes_are_refused(tmp_path: Path, mode: str, spacing: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        resolve(pretrained(tmp_path), mode, spacing=spacing)


def test_no_resample_leaves_voxels_and_notes_their_median(tmp_path: Path) -> None:
    found = resolve(pretrained(tmp_path), "no_resample")
    assert found.spacing == (4.0, 0.5, 0.7)
    for kind in ("data", "seg", "probabilities"):
        assert found.resampling[f"resampling_fn_{kind}"] == "no_resampling_hack"
        assert found.resampling[f"resampling_fn_{kind}_kwargs"] == {}


def test_like_a_pretraining_that_did_not_resample(tmp_path: Path) -> None:
    source = pretrained(tmp_path, spacing_style="noresample")
    assert resolve(source) == resolve(source, "no_resample")


def test_default_nnunet_takes_all_from_its_plans(tmp_path: Path) -> None:
    settings = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "spacing": [2.0, 1.0, 1.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "batch_size": 2,
    }
    plans = {
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": STATISTICS},
        "configurations": {"3d_fullres": settings},
    }
    found = resolve(pretrained(tmp_path), "default_nnunet", nnunet_plans=plans)
    assert found.spacing == (2.0, 1.0, 1.0)
    assert found.identifier() == "nnUNetPlans_3d_fullres"
    assert found.resampling == {"resampling_fn_data": "resample_data_or_seg_to_shape"}
    with pytest.raises(ValueError, match=r"pretrained network has 2 dimensions.*have no 2d, only 3d_fullres"):
        resolve(pretrained(tmp_path, dims=2), "default_nnunet", nnunet_plans=plans)


def test_more_channels_share_what_the_pretrained_one_had(tmp_path: Path) -> None:
    assert resolve(pretrained(tmp_path), channels=3).normalization_schemes == ("ZScoreNormalization",) * 3


def test_channels_prepared_differently_cannot_be_shared_out(tmp_path: Path) -> None:
    source = pretrained(tmp_path, channels=2, normalization_schemes=["ZScoreNormalization", "NoNormalization"])
    assert resolve(source, channels=2).normalization_schemes == ("ZScoreNormalization", "NoNormalization")
    with pytest.raises(ValueError, match="for 3 channels use -m default_nnunet"):
        resolve(source, channels=3)


def test_a_normalisation_that_nnunet_lacks_is_refused(tmp_path: Path) -> None:
    source = pretrained(tmp_path, normalization_schemes=["PercentileNormalization"])
    with pytest.raises(ValueError, match="PercentileNormalization, which the released nnU-Net does not have"):
        resolve(source)


def test_a_resampling_that_nnunet_lacks_is_refused_unless_nothing_is_resampled(tmp_path: Path) -> None:
    source = pretrained(tmp_path, resampling_fn_data="resample_by_magic")
    with pytest.raises(ValueError, match="'resample_by_magic', which the released nnU-Net does not have"):
        resolve(source)
    assert resolve(source, "no_resample").resampling["resampling_fn_data"] == "no_resampling_hack"


def test_the_released_nnunet_has_every_function_and_scheme_named_here() -> None:
    from nnunetv2.preprocessing.normalization import default_normalization_schemes
    from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name

    from nnssl_ext.finetuning.preprocessing_settings import NORMALIZATION_SCHEMES, RESAMPLING_FUNCTIONS

    for scheme in NORMALIZATION_SCHEMES:
        assert hasattr(default_normalization_schemes, scheme)
    for name in RESAMPLING_FUNCTIONS:
        assert callable(recursive_find_resampling_fn_by_name(name))


def test_equal_settings_share_data_and_different_ones_do_not(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    names = {
        resolve(source).identifier(),
        resolve(source, "no_resample").identifier(),
        resolve(source, "fixed", spacing=(2.0, 1.0, 1.0)).identifier(),
        resolve(source, channels=2).identifier(),
    }
    assert len(names) == 4
    assert resolve(source, "fixed", spacing=(1.0, 1.0, 1.0)).identifier() == resolve(source).identifier()
