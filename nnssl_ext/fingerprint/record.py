"""The fingerprint: what planning needs to know about a dataset, as one JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.core.records import from_dict, read_json, to_dict, write_json
from nnssl_ext.dataset.integrity import Problem

FINGERPRINT_FILE = "nnssl_fingerprint.json"

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class IntensityStatistics:
    """Foreground intensities of one channel; nnU-Net's names."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_99_5: float
    percentile_00_5: float


@dataclass(frozen=True, kw_only=True)
class CaseFingerprint:
    """One case. Axes are (z, y, x)."""

    shape: Shape
    """Voxels."""
    shape_after_crop: Shape
    """Voxels of the box that holds all that is not zero."""
    spacing: Spacing
    """mm."""
    foreground_fraction: float
    """Share of the voxels that some channel counts as foreground, in [0, 1]."""
    content_hashes: tuple[str, ...]
    """Of the voxels, one per channel."""
    intensities: tuple[IntensityStatistics | None, ...]
    """Of the foreground, one per channel; None where a channel has none."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All readable cases of a dataset, and what is wrong with the others."""

    dataset_name: str
    """`DatasetXXX_Name`."""
    foreground_rule: str
    """What counts as foreground, in words."""
    cases: dict[str, CaseFingerprint]
    """By case id."""
    foreground_intensity_properties_per_channel: dict[str, IntensityStatistics]
    """Over all cases, each with equal weight, by channel index; the form of nnU-Net's plans."""
    median_relative_size_after_cropping: float
    """Median share of a case's voxels inside the box of what is not zero."""
    problems: tuple[Problem, ...] = ()
    """What integrity checks found, in the cases that are left out and in those that are kept."""

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Reads a fingerprint.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it is not of this form.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no fingerprint at {path}. Make it with: nnssl_extract_fingerprint -d DATASET")
        return from_dict(cls, read_json(path), where=str(path))

    def save(self, path: Path) -> None:
        """Writes the fingerprint atomically."""
        write_json(path, to_dict(self))
