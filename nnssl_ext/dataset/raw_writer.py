"""Writing raw datasets in nnU-Net's format, in a way that can be interrupted and repeated.

Files are written whole or not at all and carry their source's time of change, so a repetition skips those that are
there; `dataset.json` comes last. A folder that holds anything else is refused before a file is touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.logs import track
from nnssl_ext.core.paths import dataset_folder_name
from nnssl_ext.core.records import atomic_path, read_json
from nnssl_ext.dataset.collection import CollectionImage, write_collection
from nnssl_ext.dataset.manifest import COLLECTION_FILE, DATASET_FILE, Label, write_dataset_json
from nnssl_ext.imageio import file_ending_of, read_header, write_image
from nnssl_ext.imageio.nifti import check_whole, is_nifti

CONVERTED_BY = "nnssl_convert"
IMAGE_FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
MAX_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A raw dataset that is to be written."""

    folder: Path
    channel_names: tuple[str, ...]
    file_ending: str
    num_cases: int
    labels: dict[str, Label] | None = None
    files: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    """Source file to its destinations, relative to the folder: one, or one per volume of a 4D source."""
    references: dict[str, dict[str, Any]] | None = None
    """nnU-Net's `dataset` key, where files are not found by their names."""
    images: tuple[CollectionImage, ...] = ()
    """For `pretrain_data.json`, where patients or sessions are known."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of `dataset.json`."""


def new_dataset_folder(raw: Path, dataset_id: int, name: str) -> Path:
    """The folder for a dataset of that id and name.

    Raises:
        ValueError: If the name is not allowed, or a dataset of another name has the id.
    """
    folder = raw / dataset_folder_name(dataset_id, name)
    taken = [path.name for path in sorted(raw.glob(f"Dataset{dataset_id:03d}_*")) if path.name != folder.name]
    if taken:
        raise ValueError(
            f"id {dataset_id} is taken by {raw / taken[0]}, so {folder.name} cannot be made. Give another id, "
            f"or name it {taken[0].partition('_')[2]!r} with --name"
        )
    return folder


def write_datasets(datasets: Sequence[RawDataset], num_processes: int = 0) -> None:
    """Writes raw datasets: all are checked before the first file is written.

    Args:
        datasets: Complete descriptions.
        num_processes: Worker processes; 0 works in this one.

    Raises:
        ValueError: If a folder holds what this conversion would not write, or files could not be converted.
        FileNotFoundError: If sources are missing.
    """
    for dataset in datasets:
        _check_sources(dataset)
        _check_target(dataset)
    for dataset in datasets:
        _write_files(dataset, num_processes)
        if dataset.images:
            write_collection(dataset.folder / COLLECTION_FILE, dataset.folder.name, dataset.images)
        write_dataset_json(
            dataset.folder,
            channel_names=dataset.channel_names,
            file_ending=dataset.file_ending,
            num_cases=dataset.num_cases,
            labels=dataset.labels,
            dataset=dataset.references,
            extra={**dataset.extra, "converted_by": CONVERTED_BY},
        )


def convert_file(source: Path, destinations: Sequence[Path]) -> None:
    """Copies a file, or splits a 4D file into its volumes; does nothing where that is done already.

    A `.mhd` header, whose voxels lie in a second file, becomes one `.mha` file where the destination says so.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If a file to split does not hold one volume per destination, or cannot be read.
    """
    if all(_is_current(source, destination) for destination in destinations):
        return
    if len(destinations) > 1:
        _split_volumes(source, destinations)
    elif file_ending_of(source).lower() != file_ending_of(destinations[0]).lower():
        _rewrite(source, destinations[0])
    else:
        with atomic_path(destinations[0]) as temporary:
            shutil.copyfile(source, temporary)
            _copy_time(source, temporary)


def _rewrite(source: Path, destination: Path) -> None:
    import SimpleITK as sitk

    image = sitk.ReadImage(str(source))
    with atomic_path(destination) as temporary:
        sitk.WriteImage(image, str(temporary), True)
        _copy_time(source, temporary)


def _split_volumes(source: Path, destinations: Sequence[Path]) -> None:
    import SimpleITK as sitk

    header = read_header(source)
    if header.num_components != len(destinations):
        raise ValueError(
            f"{source} holds {header.num_components} volume(s), dataset.json names {len(destinations)} channels"
        )
    if is_nifti(source):
        check_whole(source)
    volumes: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(source)))
    for volume, destination in zip(volumes, destinations, strict=True):
        write_image(volume, header.geometry, destination)
        _copy_time(source, destination)


def _copy_time(source: Path, target: Path) -> None:
    state = source.stat()
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))


def _is_current(source: Path, destination: Path) -> bool:
    if not destination.is_file():
        return False
    return destination.stat().st_mtime_ns == source.stat().st_mtime_ns


def _check_sources(dataset: RawDataset) -> None:
    missing = [str(source) for source in dataset.files if not source.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(dataset.files)} files do not exist: {_some(missing)}")


def _check_target(dataset: RawDataset) -> None:
    """Refuses a folder that this conversion did not make, or made with other settings."""
    description = dataset.folder / DATASET_FILE
    if description.is_file() and read_json(description).get("converted_by") != CONVERTED_BY:
        raise ValueError(f"{dataset.folder} exists and was not made by {CONVERTED_BY}. Give another id or --name")
    wanted = {name for destinations in dataset.files.values() for name in destinations}
    present = {
        f"{folder}/{path.name}"
        for folder in IMAGE_FOLDERS
        for path in (dataset.folder / folder).glob("*")
        if not path.name.startswith(".tmp-")
    }
    foreign = sorted(present - wanted)
    if foreign:
        raise ValueError(
            f"{dataset.folder} holds {len(foreign)} file(s) that this conversion would not write: {_some(foreign)}. "
            "They are from a conversion with other settings: remove the folder and start again, or give another id"
        )


def _write_files(dataset: RawDataset, num_processes: int) -> None:
    for leftover in dataset.folder.glob("*/.tmp-*"):  # of a conversion that was killed
        leftover.unlink()
    tasks = {
        str(source): (source, [dataset.folder / name for name in destinations])
        for source, destinations in dataset.files.items()
    }
    failed = []
    with make_executor(num_processes) as executor:
        for result in track(executor.run(convert_file, tasks), len(tasks), dataset.folder.name):
            if result.error is not None:
                failed.append(f"{result.key}: {result.error}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(tasks)} files could not be converted: {_some(sorted(failed))}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
