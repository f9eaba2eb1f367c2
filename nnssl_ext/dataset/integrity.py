"""Whether the files of a dataset are what training needs, found out before hours are spent on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.imageio import Geometry, Header, read_header, read_image, read_segmentation
from nnssl_ext.imageio.nifti import count_non_finite, is_nifti, stored_spacing

MIN_SPACING_MM = 1e-3
"""A voxel of a micrometre: finer than any CT or MR scanner, clinical or micro."""
MAX_SPACING_MM = 100.0
"""Ten centimetres between voxels: coarser than any scan that shows anatomy."""
MAX_EXTENT_MM = 5000.0
"""Five metres: longer than a whole-body scan, so the spacing is in another unit."""
USABLE_KINDS = frozenset(
    {"duplicate", "non_finite_zeroed", "label_missing", "label_unreadable", "label_geometry", "label_values"}
)
"""Of problems that leave the image fit for pretraining."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one file."""

    case_id: str
    file: Path
    reason: str
    kind: str
    """In a word or two, such as `unreadable`."""

    def __str__(self) -> str:
        return f"{self.case_id}: {self.reason} [{self.kind}] ({self.file})"


def content_hash(channel: np.ndarray) -> str:
    """SHA-256 of a channel's shape and float32 values, as hex: equal for equal voxels, whatever the file's format.

    Args:
        channel: (Z, Y, X).
    """
    values = np.ascontiguousarray(channel, dtype="<f4")
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(values.data)
    return digest.hexdigest()


def image_hashes(files: Sequence[Path]) -> tuple[str, ...]:
    """Content hash of each channel of one case, as preprocessing records them."""
    data, _ = read_image(list(files))
    return tuple(map(content_hash, data))


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """One case, read and checked."""

    problems: list[Problem]
    image: np.ndarray | None = None
    """(C, Z, Y, X), float32; None where it could not be read."""
    geometry: Geometry | None = None
    """Of the image."""
    hashes: tuple[str, ...] = ()
    """One content hash per channel."""


def read_checked(case: Case, num_channels: int, label_values: frozenset[int] | None = None) -> CheckedCase:
    """Reads one case and finds what is wrong with it by itself.

    Args:
        case: Its files.
        num_channels: Channels that the dataset has.
        label_values: Values that a label map may hold; None where they are not checked.
    """
    header, problems = _check_headers(case, num_channels)
    if header is None:
        return CheckedCase(problems=problems)
    try:
        problems += [problem for file in filter(is_nifti, case.images) for problem in _check_stored(case, file)]
        image, geometry = read_image(case.images)
    except ValueError as error:
        return CheckedCase(problems=[*problems, Problem(case.case_id, case.images[0], str(error), "unreadable")])
    problems += check_voxels(case, image)
    if case.label is not None:
        problems += _check_label(case, case.label, header, label_values)
    hashes = tuple(content_hash(channel) for channel in image)
    return CheckedCase(problems=problems, image=image, geometry=geometry, hashes=hashes)


def check_voxels(case: Case, image: np.ndarray) -> list[Problem]:
    """Lists channels whose values cannot be learned from.

    Args:
        case: Where the image comes from.
        image: (C, Z, Y, X).
    """
    problems = []
    for index, channel in enumerate(image):
        file = case.images[min(index, len(case.images) - 1)]
        finite = np.isfinite(channel)
        if not finite.all():
            reason = f"{channel.size - int(finite.sum())} of {channel.size} voxels are NaN or infinite"
            problems.append(Problem(case.case_id, file, reason, "non_finite"))
        elif channel.min() == channel.max():
            kind = "empty" if channel.flat[0] == 0 else "constant"
            problems.append(Problem(case.case_id, file, f"every voxel is {channel.flat[0]:g}", kind))
    return problems


def find_duplicates(hashes: Mapping[str, Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Groups of cases that share a channel's content.

    Args:
        hashes: Case id to content hashes.
    """
    holders: dict[str, set[str]] = {}
    for case_id, values in hashes.items():
        for value in values:
            holders.setdefault(value, set()).add(case_id)
    return tuple(sorted({tuple(sorted(group)) for group in holders.values() if len(group) > 1}))


def duplicate_problems(manifest: Manifest, hashes: Mapping[str, Iterable[str]]) -> list[Problem]:
    """Lists the cases that repeat an earlier one's voxels.

    Args:
        manifest: The dataset.
        hashes: Case id to content hashes.
    """
    return [
        Problem(case_id, manifest.case(case_id).images[0], f"same voxels as {first}", "duplicate")
        for first, *others in find_duplicates(hashes)
        for case_id in others
    ]


def find_odd_dimensions(manifest: Manifest, depth: Mapping[str, int]) -> list[Problem]:
    """Lists single slices among volumes, or volumes among single slices, whichever are fewer.

    Args:
        manifest: The dataset.
        depth: Case id to number of slices.
    """
    flat = [case_id for case_id, slices in depth.items() if slices == 1]
    deep = [case_id for case_id, slices in depth.items() if slices > 1]
    odd = flat if len(flat) <= len(deep) else deep
    if not flat or not deep:
        return []
    problems = []
    for case_id in odd:
        kind_of_rest = "volumes" if odd is flat else "2D images"
        reason = f"it has {depth[case_id]} slice(s), while most of the dataset are {kind_of_rest}"
        problems.append(Problem(case_id, manifest.case(case_id).images[0], reason, "2d_among_3d"))
    return problems


def _check_headers(case: Case, num_channels: int) -> tuple[Header | None, list[Problem]]:
    """What the headers tell; the first header is None where the voxels need not be read any more."""
    problems: list[Problem] = []
    headers: list[Header] = []
    for file in case.images:
        try:
            header = read_header(file)
        except FileNotFoundError:
            problems.append(Problem(case.case_id, file, "the file does not exist", "missing"))
            continue
        except ValueError as error:
            problems.append(Problem(case.case_id, file, str(error), "unreadable"))
            continue
        headers.append(header)
        problems += _check_spacing(case.case_id, file, header)
    if len(headers) < len(case.images) or not headers:
        return None, problems or [Problem(case.case_id, Path(), "it has no image", "missing")]
    faults = _check_channels(case, headers, num_channels)
    return (None if faults else headers[0]), problems + faults


def _check_channels(case: Case, headers: Sequence[Header], num_channels: int) -> list[Problem]:
    first, file = headers[0], case.images[0]
    found = sum(header.num_components for header in headers)
    for header, path in zip(headers, case.images, strict=True):
        if header.dimension == 4 and found != num_channels:
            reason = f"a 4D file with {header.num_components} volumes, the dataset has {num_channels} channel(s)"
            return [Problem(case.case_id, path, f"{reason}; split it into one file per channel", "4d")]
    if found != num_channels:
        return [Problem(case.case_id, file, f"{found} channel(s), the dataset has {num_channels}", "channels")]
    for header, path in zip(headers[1:], case.images[1:], strict=True):
        if header.shape != first.shape:
            reason = f"its shape {header.shape} differs from {first.shape} of channel 0"
        elif not header.geometry.same_place(first.geometry):
            reason = "its spacing, origin or direction differs from that of channel 0"
        else:
            continue
        return [Problem(case.case_id, path, reason, "channels")]
    return []


def _check_spacing(case_id: str, file: Path, header: Header) -> list[Problem]:
    spacing = header.spacing if header.shape[0] > 1 else header.spacing[1:]
    shape = header.shape[-len(spacing) :]
    stored = stored_spacing(file) if is_nifti(file) else spacing
    if not all(np.isfinite(value) and value > 0 for value in stored):
        reason = f"its header holds the voxel size {stored} mm, which readers replace or turn positive"
    elif min(spacing) < MIN_SPACING_MM or max(spacing) > MAX_SPACING_MM:
        reason = f"a spacing of {spacing} mm (z, y, x); {MIN_SPACING_MM} to {MAX_SPACING_MM:g} mm is plausible"
    elif max(length * value for length, value in zip(shape, spacing, strict=True)) > MAX_EXTENT_MM:
        reason = f"{shape} voxels of {spacing} mm span more than {MAX_EXTENT_MM / 1000:g} m"
    else:
        return []
    return [Problem(case_id, file, reason, "spacing")]


def _check_stored(case: Case, file: Path) -> list[Problem]:
    """Reads a NIfTI file to its end, and lists the voxels that are not what the reader will make of them."""
    count = count_non_finite(file)
    if count == 0:
        return []
    reason = f"{count} stored voxels are NaN or infinite; the reader sets them to 0"
    return [Problem(case.case_id, file, reason, "non_finite_zeroed")]


def _check_label(case: Case, file: Path, image: Header, values: frozenset[int] | None) -> list[Problem]:
    try:
        header = read_header(file)
        if is_nifti(file):
            count_non_finite(file)
        labels, _ = read_segmentation(file)
    except FileNotFoundError:
        return [Problem(case.case_id, file, "the label map does not exist", "label_missing")]
    except ValueError as error:
        return [Problem(case.case_id, file, str(error), "label_unreadable")]
    if header.shape != image.shape:
        reason = f"the label map has shape {header.shape}, the image {image.shape}"
        return [Problem(case.case_id, file, reason, "label_geometry")]
    problems = []
    if not header.geometry.same_place(image.geometry):
        reason = "the label map's spacing, origin or direction differs from the image's"
        problems.append(Problem(case.case_id, file, reason, "label_geometry"))
    unknown = set(np.unique(labels).tolist()) - set(values if values is not None else np.unique(labels).tolist())
    if unknown:
        reason = f"label values {sorted(unknown)} that dataset.json does not name"
        problems.append(Problem(case.case_id, file, reason, "label_values"))
    return problems
