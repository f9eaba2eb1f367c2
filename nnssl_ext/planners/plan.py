"""The plan: nnU-Net's plans file as a typed record, read and written without losing a key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.planners.primus import is_transformer

REQUIRED_KEYS = (
    "dataset_name",
    "plans_name",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "configurations",
    "foreground_intensity_properties_per_channel",
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One resolved configuration of a plan. Axes are those after `transpose_forward`."""

    name: str
    """`3d_fullres`, `2d` or a name of the user's own."""
    data_identifier: str
    """Folder of the preprocessed data beneath the dataset's folder."""
    spacing: tuple[float, ...]
    """Voxel size in mm after resampling, one entry per spatial dimension."""
    patch_size: tuple[int, ...]
    """Training crop in voxels, one entry per spatial dimension."""
    batch_size: int
    """Samples per optimiser step and device."""
    normalization_schemes: tuple[str, ...]
    """nnU-Net's class names, one per input channel."""
    use_mask_for_norm: tuple[bool, ...]
    """Whether statistics are taken over non-zero voxels only, one per channel."""
    resampling_fn_data: str
    """nnU-Net's resampling function for images."""
    resampling_fn_data_kwargs: dict[str, Any]
    """Its arguments."""
    resampling_fn_seg: str
    """nnU-Net's resampling function for label maps."""
    resampling_fn_seg_kwargs: dict[str, Any]
    """Its arguments."""
    architecture: dict[str, Any]
    """`network_class_name`, `arch_kwargs`, `_kw_requires_import`."""
    transpose_forward: tuple[int, ...]
    """Order in which the image's axes (z, y, x) are stored."""
    transpose_backward: tuple[int, ...]
    """The inverse order."""
    raw: dict[str, Any] = field(repr=False, compare=False)
    """The configuration as nnU-Net's JSON has it, inheritance resolved and not named any more."""

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, 2 or 3."""
        return len(self.patch_size)

    @property
    def num_input_channels(self) -> int:
        """Number of image channels."""
        return len(self.normalization_schemes)

    @property
    def backbone(self) -> str:
        """Kind of the network, as methods name what they run on: `vit` for Primus, else `cnn`."""
        return "vit" if is_transformer(self.architecture) else "cnn"

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Downsampling of each stage per axis; of a ViT three whose product is the token."""
        return tuple(tuple(stride) for stride in self.architecture["arch_kwargs"].get("strides", ()))


@dataclass(frozen=True)
class Plan:
    """A plans file. `raw` is nnU-Net's JSON, kept whole; the rest reads from it."""

    raw: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [key for key in REQUIRED_KEYS if key not in self.raw]
        if missing:
            raise ValueError(
                f"this is no plans file of nnU-Net's form: {', '.join(missing)} missing. "
                "Write one with: nnssl_plan_experiment -d DATASET"
            )

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plans file.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it is no JSON or lacks keys.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no plans at {path}. Write them with: nnssl_plan_experiment -d DATASET")
        return cls(read_json(path))

    def save(self, path: Path) -> None:
        """Writes the plans file atomically."""
        write_json(path, self.raw)

    @property
    def plans_name(self) -> str:
        """Name of the plans, as in the file's name."""
        return self.raw["plans_name"]

    @property
    def dataset_name(self) -> str:
        """`DatasetXXX_Name`."""
        return self.raw["dataset_name"]

    @property
    def image_reader_writer(self) -> str:
        """nnU-Net's reader class by name."""
        return self.raw["image_reader_writer"]

    @property
    def foreground_intensity_properties(self) -> dict[str, dict[str, float]]:
        """Intensity statistics of the dataset's foreground by channel index ("0", "1", ...)."""
        return self.raw["foreground_intensity_properties_per_channel"]

    @property
    def configuration_names(self) -> tuple[str, ...]:
        """The configurations of this plan."""
        return tuple(self.raw["configurations"])

    def configuration(self, name: str) -> Configuration:
        """One configuration, with what it inherits filled in.

        Raises:
            ValueError: If there is none of that name, it inherits from itself, or a key is missing or malformed.
        """
        raw = self._resolve(name, ())
        try:
            for fault in _faults(raw):
                raise ValueError(f"configuration {name!r} of plans {self.plans_name!r}: {fault}")
            return Configuration(
                name=name,
                data_identifier=raw["data_identifier"],
                spacing=tuple(float(value) for value in raw["spacing"]),
                patch_size=tuple(int(value) for value in raw["patch_size"]),
                batch_size=int(raw["batch_size"]),
                normalization_schemes=tuple(raw["normalization_schemes"]),
                use_mask_for_norm=tuple(raw["use_mask_for_norm"]),
                resampling_fn_data=raw["resampling_fn_data"],
                resampling_fn_data_kwargs=raw["resampling_fn_data_kwargs"],
                resampling_fn_seg=raw["resampling_fn_seg"],
                resampling_fn_seg_kwargs=raw["resampling_fn_seg_kwargs"],
                architecture=raw["architecture"],
                transpose_forward=tuple(self.raw["transpose_forward"]),
                transpose_backward=tuple(self.raw["transpose_backward"]),
                raw=raw,
            )
        except KeyError as error:
            raise ValueError(f"configuration {name!r} of plans {self.plans_name!r} has no {error}") from error

    def _resolve(self, name: str, visited: tuple[str, ...]) -> dict[str, Any]:
        configurations: Mapping[str, dict[str, Any]] = self.raw["configurations"]
        if name not in configurations:
            raise ValueError(
                f"plans {self.plans_name!r} have no configuration {name!r}. There: {', '.join(configurations)}"
            )
        if name in visited:
            raise ValueError(f"configuration {name!r} inherits from itself: {' -> '.join((*visited, name))}")
        own = deepcopy(configurations[name])
        parent = own.pop("inherits_from", None)
        return {**self._resolve(parent, (*visited, name)), **own} if parent else own


def _faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """What an edit by hand may have broken in a configuration, in words.

    Raises:
        KeyError: If a key is missing.
    """
    for key, kind, form in (
        ("patch_size", int, "whole numbers above 0"),
        ("spacing", int | float, "numbers above 0, in mm"),
    ):
        value = raw[key]
        if not isinstance(value, list) or not all(isinstance(each, kind) and each > 0 for each in value):
            yield f"{key} must be a list of {form}, not {value!r}"
    if len(raw["patch_size"]) != len(raw["spacing"]):
        yield f"patch_size {raw['patch_size']} and spacing {raw['spacing']} must have a number per axis"
    if not isinstance(raw["batch_size"], int) or raw["batch_size"] < 1:
        yield f"batch_size must be a whole number, 1 or more, not {raw['batch_size']!r}"
    network = raw["architecture"]["arch_kwargs"]
    stages = network.get("n_stages")
    for key in ("features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage", "n_conv_per_stage"):
        value = network.get(key)
        if stages is not None and isinstance(value, list) and len(value) != stages:
            yield f"{key} of the network has {len(value)} entries, for {stages} stages (n_stages)"
    for stride in network.get("strides", ()):
        if isinstance(stride, list) and len(stride) != len(raw["patch_size"]):
            yield f"a stride of the network, {stride}, has not a number for each axis of patch_size {raw['patch_size']}"
