"""How labelled images are prepared for a pretrained network: pure functions of the checkpoint and the dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.planners.spacing import resampling_keys

Mode = Literal["like_pretrained", "default_nnunet", "fixed", "no_resample"]
MODES: tuple[Mode, ...] = ("like_pretrained", "default_nnunet", "fixed", "no_resample")
NO_RESAMPLING_FUNCTION = "no_resampling_hack"
RESAMPLING_FUNCTIONS = ("resample_data_or_seg_to_shape", "resample_torch_fornnunet", NO_RESAMPLING_FUNCTION)
"""Functions of the released nnU-Net that plans may name."""
NORMALIZATION_SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
"""Normalisations of the released nnU-Net. The others cannot be reproduced by it in training and prediction."""
_NEEDS_STATISTICS = "CTNormalization"
_INTENSITIES = "foreground_intensity_properties_per_channel"
_HASH_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Everything that decides what a preprocessed case holds. Axes of `spacing` are those after transposing."""

    spacing: tuple[float, ...]
    """Voxel size in mm; with `no_resampling_hack` only the dataset's median, which nothing is resampled to."""
    transpose_forward: tuple[int, ...]
    transpose_backward: tuple[int, ...]
    normalization_schemes: tuple[str, ...]
    """One per channel."""
    use_mask_for_norm: tuple[bool, ...]
    """One per channel."""
    resampling: dict[str, Any]
    """The six `resampling_fn_*` keys of nnU-Net's plans."""
    intensities: dict[str, Any]
    """Foreground intensity statistics by channel."""
    data_identifier: str | None = None
    """Folder of data that nnU-Net's own plans already describe, or None: named after these settings."""

    def identifier(self) -> str:
        """Name of the preprocessed folder: a function of these settings, so plans that share them share the data."""
        if self.data_identifier is not None:
            return self.data_identifier
        content = [getattr(self, name) for name in ("spacing", "transpose_forward", "normalization_schemes")]
        content += [self.use_mask_for_norm, {k: v for k, v in self.resampling.items() if "probabilities" not in k}]
        if _NEEDS_STATISTICS in self.normalization_schemes:
            content.append(self.intensities)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]
        return f"nnsslFinetuning_{len(self.spacing)}d_{digest}"


def resolve_preprocessing(
    mode: Mode,
    pretrained: Pretrained,
    *,
    num_channels: int,
    fingerprint: Mapping[str, Any],
    nnunet_plans: Mapping[str, Any] | None = None,
    spacing: Sequence[float] | None = None,
) -> Preprocessing:
    """The preprocessing of a mode.

    - `like_pretrained`: spacing, axis order and normalisation of the pretraining, its intensity statistics included;
    - `default_nnunet`: all from nnU-Net's own plans of the dataset;
    - `fixed`: like the pretraining, at the given spacing;
    - `no_resample`: like the pretraining, every case at its own spacing.

    Args:
        mode: One of `MODES`.
        pretrained: The checkpoint.
        num_channels: Of the dataset.
        fingerprint: nnU-Net's fingerprint of the dataset.
        nnunet_plans: nnU-Net's own plans of the dataset, for `default_nnunet`.
        spacing: mm per image axis (z, y, x), for `fixed`; two numbers for a 2D network.

    Raises:
        ValueError: If the mode is unknown or lacks its argument, or nnU-Net cannot do what the pretraining did.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known. Give one of {', '.join(MODES)}")
    if (spacing is not None) != (mode == "fixed"):
        raise ValueError("mode 'fixed' needs a spacing in mm per axis (-os), and only that mode takes one")
    dims = len(pretrained.patch_size)
    if mode == "default_nnunet":
        return _from_nnunet(nnunet_plans or {}, dims)
    forward = tuple(pretrained.plans.get("transpose_forward") or range(3))
    backward = tuple(pretrained.plans.get("transpose_backward") or range(3))
    schemes = _per_channel(tuple(pretrained.configuration["normalization_schemes"]), num_channels, pretrained)
    check_normalization(schemes)
    median = np.median(np.asarray(fingerprint["spacings"], dtype=float), axis=0)[list(forward)]
    wanted = _wanted_spacing(mode, pretrained, spacing, forward)
    return Preprocessing(
        spacing=tuple(float(value) for value in (median[3 - dims :] if wanted is None else wanted)),
        transpose_forward=forward,
        transpose_backward=backward,
        normalization_schemes=schemes,
        use_mask_for_norm=_per_channel(tuple(pretrained.configuration["use_mask_for_norm"]), num_channels, pretrained),
        resampling=_resampling(pretrained, resample=wanted is not None),
        intensities=_intensities(pretrained, schemes, fingerprint),
    )


def check_normalization(schemes: Sequence[str]) -> None:
    """Refuses normalisations that the released nnU-Net does not have.

    Raises:
        ValueError: Names the scheme and what to do.
    """
    for scheme in schemes:
        if scheme not in NORMALIZATION_SCHEMES:
            raise ValueError(
                f"the network was pretrained on images normalised by {scheme}, which the released nnU-Net does not "
                "have: it could not repeat it in training or prediction. Use -m default_nnunet, or pretrain with "
                f"one of {', '.join(NORMALIZATION_SCHEMES)}"
            )


def _wanted_spacing(
    mode: Mode, pretrained: Pretrained, spacing: Sequence[float] | None, forward: Sequence[int]
) -> tuple[float, ...] | None:
    """Voxel size after transposing, None to leave cases as they are."""
    dims = len(pretrained.patch_size)
    if mode == "no_resample":
        return None
    if spacing is None:
        return pretrained.spacing
    if len(spacing) != dims or min(spacing) <= 0:
        raise ValueError(f"spacing {tuple(spacing)} does not fit: give {dims} positive numbers in mm")
    return tuple(spacing) if dims == 2 else tuple(spacing[axis] for axis in forward)


def _per_channel(values: tuple[Any, ...], num_channels: int, pretrained: Pretrained) -> tuple[Any, ...]:
    """One value per channel of the dataset: as pretrained, or the one that all pretrained channels share."""
    if len(values) == num_channels:
        return values
    if len(set(values)) != 1:
        raise ValueError(
            f"{pretrained.name} was pretrained on {len(values)} channels prepared in different ways "
            f"({', '.join(map(str, values))}); for {num_channels} channels use -m default_nnunet"
        )
    return values[:1] * num_channels


def _resampling(pretrained: Pretrained, *, resample: bool) -> dict[str, Any]:
    keys = resampling_keys(kept=not resample)
    if not resample:
        return keys
    function = pretrained.configuration["resampling_fn_data"]
    if function not in RESAMPLING_FUNCTIONS:
        raise ValueError(
            f"the pretraining resampled with {function!r}, which the released nnU-Net does not have. Use "
            f"-m default_nnunet, -m no_resample, or pretrain with one of {', '.join(RESAMPLING_FUNCTIONS)}"
        )
    arguments = dict(pretrained.configuration["resampling_fn_data_kwargs"])
    return {**keys, "resampling_fn_data": function, "resampling_fn_data_kwargs": arguments}


def _intensities(pretrained: Pretrained, schemes: Sequence[str], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of the pretraining where it has them, else of the dataset where they make no difference."""
    known = pretrained.plans.get(_INTENSITIES)
    if known:
        values = [known[key] for key in sorted(known, key=int)]
        same = len(values) == len(schemes)
        return {str(index): values[index] if same else values[0] for index in range(len(schemes))}
    if _NEEDS_STATISTICS in schemes:
        raise ValueError(
            f"{pretrained.name} was pretrained with {_NEEDS_STATISTICS} but does not hold the intensity statistics "
            "that it used. Use -m default_nnunet: nnU-Net then takes those of this dataset"
        )
    return dict(fingerprint[_INTENSITIES])


def _from_nnunet(plans: Mapping[str, Any], dims: int) -> Preprocessing:
    name = configuration_name(dims)
    if name not in plans.get("configurations", {}):
        raise ValueError(
            f"the pretrained network has {dims} dimensions, but nnU-Net's own plans of this dataset have no {name}, "
            f"only {', '.join(plans.get('configurations', {})) or 'nothing'}"
        )
    settings = plans["configurations"][name]
    return Preprocessing(
        spacing=tuple(settings["spacing"]),
        transpose_forward=tuple(plans["transpose_forward"]),
        transpose_backward=tuple(plans["transpose_backward"]),
        normalization_schemes=tuple(settings["normalization_schemes"]),
        use_mask_for_norm=tuple(settings["use_mask_for_norm"]),
        resampling={key: value for key, value in settings.items() if key.startswith("resampling_fn_")},
        intensities=dict(plans[_INTENSITIES]),
        data_identifier=settings["data_identifier"],
    )


def configuration_name(dims: int) -> str:
    """nnU-Net's name of the configuration of a network with that many dimensions."""
    return "2d" if dims == 2 else "3d_fullres"
