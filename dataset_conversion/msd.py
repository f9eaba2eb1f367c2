"""The Medical Segmentation Decathlon's layout: `dataset.json`, `imagesTr`, `labelsTr` and perhaps `imagesTs`.

Some of the cases can go, without their labels, into a second dataset for pretraining; each case goes to one of the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import file_hash, read_json
from nnssl_ext.dataset.manifest import DATASET_FILE
from nnssl_ext.dataset.raw_writer import RawDataset, new_dataset_folder, write_datasets
from nnssl_ext.dataset.splits import nested_subsets
from nnssl_ext.imageio import file_ending_of

UNLABELLED_SUFFIX = "Unlabelled"
_TASK = re.compile(r"Task\d+_(\w+)")
_NOT_CARRIED_OVER = ("modality", "labels", "training", "test", "numTraining", "numTest")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the Decathlon's `dataset.json` says."""

    name: str
    channel_names: tuple[str, ...]
    file_ending: str
    labels: dict[str, int | tuple[int, ...]]
    training: dict[str, tuple[Path, Path]]
    """Case id to image and label."""
    test: dict[str, Path]
    extra: dict[str, Any]


def convert(
    source: Path,
    raw: Path,
    *,
    dataset_id: int,
    name: str | None = None,
    unlabelled: int = 0,
    unlabelled_dataset: int | None = None,
    seed: int = 0,
    num_processes: int = 0,
) -> list[Path]:
    """Converts a dataset of the Decathlon; 4D images become one file per channel.

    Args:
        source: The extracted folder.
        raw: Where raw datasets live.
        dataset_id: Of the labelled dataset.
        name: Of the dataset; else the source's.
        unlabelled: Number of training cases that go into the second dataset, without labels.
        unlabelled_dataset: Id of the second dataset.
        seed: Of the draw of the unlabelled cases.
        num_processes: Worker processes; 0 works in this one.

    Returns:
        The folders written: labelled, then unlabelled.

    Raises:
        FileNotFoundError: If the source or files of it are missing.
        ValueError: If the source is malformed, the numbers do not fit it, or the target is taken.
    """
    content = read_source(source)
    name = name or content.name
    if (unlabelled > 0) != (unlabelled_dataset is not None):
        raise ValueError("--unlabelled N and --unlabelled_dataset ID belong together: give both, or none")
    if unlabelled_dataset is None:
        datasets = [_labelled(content, new_dataset_folder(raw, dataset_id, name), sorted(content.training), {})]
    else:
        if unlabelled_dataset == dataset_id:
            raise ValueError(f"both datasets would have id {dataset_id}; give --unlabelled_dataset another")
        drawn = draw_unlabelled({key: image for key, (image, _) in content.training.items()}, unlabelled, seed)
        kept = sorted(set(content.training) - set(drawn))
        record = {"nnssl_draw": {"unlabelled": unlabelled, "seed": seed}}
        second = new_dataset_folder(raw, unlabelled_dataset, name + UNLABELLED_SUFFIX)
        datasets = [
            _labelled(content, new_dataset_folder(raw, dataset_id, name), kept, record),
            _unlabelled(content, second, drawn, record),
        ]
    write_datasets(datasets, num_processes)
    return [dataset.folder for dataset in datasets]


def draw_unlabelled(images: Mapping[str, Path], number: int, seed: int) -> tuple[str, ...]:
    """Draws the cases that are given away. Cases that are copies of one file stay together.

    Args:
        images: Case id to file.
        number: How many; one more where the last drawn has a copy.
        seed: Of the draw.

    Raises:
        ValueError: If none would be drawn, or no other case would be left.
    """
    if not 1 <= number < len(images):
        raise ValueError(f"{number} unlabelled cases are not possible: there are {len(images)}, and one must be left")
    content = {case_id: file_hash(image) for case_id, image in images.items()}
    drawn = nested_subsets(content, sorted(images), [number], seed)[number]
    if len(drawn) == len(images):
        raise ValueError(f"{number} of {len(images)} cases and their copies leave none with labels; draw fewer")
    return drawn


def read_source(source: Path) -> Source:
    """Reads and checks the Decathlon's `dataset.json`.

    Raises:
        FileNotFoundError: If the folder or its `dataset.json` is missing.
        ValueError: If it lacks keys, lists no case or one twice, or its files have different endings.
    """
    path = source / DATASET_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} has no {DATASET_FILE}, so it is not of the Decathlon; for other trees use: nnssl_convert folder"
        )
    content = read_json(path)
    missing = [key for key in ("modality", "labels", "training") if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, so it does not follow the Decathlon's layout")
    if not content["training"]:
        raise ValueError(f"{path} lists no training case")
    pairs = [(source / entry["image"], source / entry["label"]) for entry in content["training"]]
    tests = [source / (entry["image"] if isinstance(entry, dict) else entry) for entry in content.get("test", [])]
    ending = file_ending_of(pairs[0][0])
    files = [*(file for pair in pairs for file in pair), *tests]
    odd = [str(file) for file in files if not file.name.endswith(ending)]
    if odd:
        raise ValueError(f"nnU-Net wants one file ending; {pairs[0][0].name} has {ending}, but there is {odd[0]}")
    training = {image.name.removesuffix(ending): (image, label) for image, label in pairs}
    if len(training) < len(pairs):
        raise ValueError(f"{path} lists {len(pairs)} training cases with {len(training)} different names")
    return Source(
        name=_name(source, content),
        channel_names=tuple(content["modality"][key] for key in sorted(content["modality"], key=int)),
        file_ending=ending,
        labels={name: int(value) for value, name in sorted(content["labels"].items(), key=lambda item: int(item[0]))},
        training=training,
        test={file.name.removesuffix(ending): file for file in tests},
        extra={key: value for key, value in content.items() if key not in _NOT_CARRIED_OVER},
    )


def _name(source: Path, content: Mapping[str, Any]) -> str:
    """The task's name in the folder's name, as nnU-Net takes it, else the one in `dataset.json`."""
    match = _TASK.fullmatch(source.resolve().name)
    return match[1] if match else re.sub(r"\W+", "", content.get("name", "")) or re.sub(r"\W+", "", source.name)


def _image_names(source: Source, case_id: str, folder: str = "imagesTr") -> tuple[str, ...]:
    return tuple(f"{folder}/{case_id}_{i:04d}{source.file_ending}" for i in range(len(source.channel_names)))


def _labelled(source: Source, folder: Path, case_ids: Sequence[str], record: Mapping[str, Any]) -> RawDataset:
    files = {}
    for case_id in case_ids:
        image, label = source.training[case_id]
        files[image] = _image_names(source, case_id)
        files[label] = (f"labelsTr/{case_id}{source.file_ending}",)
    for case_id, image in source.test.items():
        files[image] = _image_names(source, case_id, "imagesTs")
    return RawDataset(
        folder=folder,
        channel_names=source.channel_names,
        file_ending=source.file_ending,
        num_cases=len(case_ids),
        labels=source.labels,
        files=files,
        extra={**source.extra, **record},
    )


def _unlabelled(source: Source, folder: Path, case_ids: Sequence[str], record: Mapping[str, Any]) -> RawDataset:
    return RawDataset(
        folder=folder,
        channel_names=source.channel_names,
        file_ending=source.file_ending,
        num_cases=len(case_ids),
        files={source.training[case_id][0]: _image_names(source, case_id) for case_id in case_ids},
        extra={**source.extra, **record},
    )
