"""The cases of a raw dataset, from nnU-Net's `dataset.json` and upstream's `pretrain_data.json`.

`dataset.json` alone is enough: images lie in `imagesTr` or are referenced by its `dataset` key. `pretrain_data.json`
beside it adds subjects, sessions and modalities to those images; without a `dataset.json` it defines the cases itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.dataset.collection import CollectionImage, read_collection
from nnssl_ext.imageio.formats import FILE_ENDINGS, file_ending_of

DATASET_FILE = "dataset.json"
COLLECTION_FILE = "pretrain_data.json"
UNKNOWN_CHANNEL = "image"
"""Channel name where nobody said what was measured; nnU-Net normalises it by z-score."""
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "channel_names": (lambda value: isinstance(value, dict) and all(map(str.isdigit, value)), '{"0": "MRI"}'),
    "file_ending": (lambda value: isinstance(value, str), '".nii.gz"'),
    "labels": (lambda value: isinstance(value, dict) and all(map(_is_label, value.values())), '{"background": 0}'),
    "dataset": (
        lambda value: isinstance(value, dict) and all(isinstance(e, dict) and "images" in e for e in value.values()),
        '{"case_1": {"images": ["one.nii.gz"]}}',
    ),
}
"""Of keys of `dataset.json`, how they have to look, and an example."""

Label = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One unit of data: co-registered channels, perhaps with a label map."""

    case_id: str
    images: tuple[Path, ...]
    """One file per channel, in order, whether it exists or not; a colour picture or 4D file may bring several."""
    label: Path | None = None
    dataset: str = ""
    """Source dataset within a collection; else the name of the raw dataset."""
    subject: str = ""
    """Patient, unique over the manifest; the case itself where nothing is known."""
    session: str = ""
    modalities: tuple[str, ...] = ()
    """What each channel shows, such as "T1w" or "CT"."""
    anonymization_mask: Path | None = None
    """Voxels that were made unrecognisable (a face); 1 = altered."""


@dataclass(frozen=True)
class Manifest:
    """A raw dataset: its description and its cases, sorted by case id."""

    dataset_name: str
    folder: Path
    channel_names: tuple[str, ...]
    file_ending: str
    labels: dict[str, Label] | None
    """Name to value, or to the values of a region; None where the dataset has no labels at all."""
    cases: tuple[Case, ...]

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the description of a raw dataset; no image is opened.

        Args:
            folder: `$nnssl_raw/DatasetXXX_Name`.

        Raises:
            FileNotFoundError: If neither `dataset.json` nor `pretrain_data.json` is there.
            ValueError: If a file is malformed, there are no cases, or an environment variable in a path is not set.
        """
        folder = Path(folder).absolute()
        collection = read_collection(folder / COLLECTION_FILE) if (folder / COLLECTION_FILE).is_file() else None
        if (folder / DATASET_FILE).is_file():
            manifest = _from_dataset_json(folder)
            return manifest if collection is None else _with_collection(manifest, collection)
        if collection is None:
            raise FileNotFoundError(
                f"{folder} holds neither {DATASET_FILE} nor {COLLECTION_FILE}; make one with nnssl_convert (see --help)"
            )
        return _from_collection(folder, collection)

    @cached_property
    def _by_id(self) -> dict[str, Case]:
        return {case.case_id: case for case in self.cases}

    def case(self, case_id: str) -> Case:
        """The case of that id.

        Raises:
            ValueError: If there is none.
        """
        if case_id not in self._by_id:
            some = ", ".join(list(self._by_id)[:3])
            raise ValueError(f"{self.dataset_name} has no case {case_id!r}; it has {len(self.cases)}, such as {some}")
        return self._by_id[case_id]

    def subjects(self) -> dict[str, str]:
        """Case id to patient."""
        return {case.case_id: case.subject for case in self.cases}

    @property
    def label_values(self) -> frozenset[int]:
        """Every value that a label map may hold."""
        values: set[int] = set()
        for label in (self.labels or {}).values():
            values.update((label,) if isinstance(label, int) else label)
        return frozenset(values)


def write_dataset_json(
    folder: Path,
    *,
    channel_names: Sequence[str],
    file_ending: str,
    num_cases: int,
    labels: Mapping[str, Label] | None = None,
    dataset: Mapping[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes nnU-Net's `dataset.json`, atomically.

    Args:
        folder: Of the raw dataset.
        channel_names: In order; "CT" selects nnU-Net's CT normalisation.
        file_ending: Of images and labels, with the dot.
        num_cases: Training cases.
        labels: Name to value; without labels the background alone is named, which nnU-Net's tools require.
        dataset: nnU-Net's key for files referenced in place: case id to `{"images": [...], "label": ...}`.
        extra: Further keys, such as a licence.
    """
    content: dict[str, Any] = {
        "channel_names": {str(index): name for index, name in enumerate(channel_names)},
        "labels": dict(labels or {"background": 0}),
        "numTraining": num_cases,
        "file_ending": file_ending,
    }
    content |= dict(extra or {})
    if dataset is not None:
        content["dataset"] = {case_id: dict(entry) for case_id, entry in dataset.items()}
    write_json(Path(folder) / DATASET_FILE, content)


def _from_dataset_json(folder: Path) -> Manifest:
    path = folder / DATASET_FILE
    content = read_json(path)
    missing = [key for key in ("channel_names", "file_ending") if key not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {' and '.join(missing)}. If {folder} is from the Medical Segmentation Decathlon, "
            f"convert it: nnssl_convert msd {folder} -d ID"
        )
    for key, (fits, example) in _FORMS.items():
        if content.get(key) is not None and not fits(content[key]):
            raise ValueError(f"{path}: {key!r} must look like {example}, not {json.dumps(content[key])[:80]}")
    channels = tuple(str(content["channel_names"][key]) for key in sorted(content["channel_names"], key=int))
    find = _referenced_cases if "dataset" in content else _listed_cases
    cases = find(folder, content, channels)
    if not cases:
        raise ValueError(f"{folder} holds no cases: {_where_cases_would_be(folder, content)}")
    return Manifest(
        dataset_name=folder.name,
        folder=folder,
        channel_names=channels,
        file_ending=content["file_ending"],
        labels=_labels(content.get("labels")),
        cases=tuple(sorted(cases, key=lambda case: case.case_id)),
    )


def _labels(raw: Mapping[str, Any] | None) -> dict[str, Label] | None:
    if raw is None:
        return None
    return {name: tuple(map(int, value)) if isinstance(value, list) else int(value) for name, value in raw.items()}


def _is_label(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, int) or (isinstance(part, str) and part.isdigit()) for part in parts)


def overlooked(manifest: Manifest) -> list[str]:
    """What a user might miss among the cases of a dataset with a `dataset.json`, in sentences."""
    path, images = manifest.folder / DATASET_FILE, manifest.folder / "imagesTr"
    if not path.is_file():
        return []
    found = []
    number = read_json(path).get("numTraining")
    if number is not None and number != len(manifest.cases):
        found.append(f"numTraining in {path} is {number}, but {len(manifest.cases)} cases were found.")
    listed = {file for case in manifest.cases for file in case.images}
    files = sorted(images.iterdir()) if images.is_dir() else []
    unused = [file for file in files if file.name.lower().endswith(FILE_ENDINGS) and file.absolute() not in listed]
    unused = [file for file in unused if not file.name.startswith(".")]
    if unused:
        found.append(
            f"{len(unused)} files in {images} are not used, such as {unused[0].name}: images are those that end in "
            f"{manifest.file_ending}, as {path} says."
        )
    return found


def _where_cases_would_be(folder: Path, content: Mapping[str, Any]) -> str:
    if "dataset" in content:
        return f"the 'dataset' key of its {DATASET_FILE} is empty"
    return f"images are looked for as {folder / 'imagesTr'}/CASE_0000{content['file_ending']}"


def _referenced_cases(folder: Path, content: Mapping[str, Any], channels: tuple[str, ...]) -> list[Case]:
    cases = []
    for case_id, entry in content["dataset"].items():
        label = entry.get("label")
        cases.append(
            Case(
                case_id=case_id,
                images=tuple(resolve_path(image, folder) for image in entry["images"]),
                label=None if label is None else resolve_path(label, folder),
                dataset=folder.name,
                subject=case_id,
                modalities=channels,
            )
        )
    return cases


def _listed_cases(folder: Path, content: Mapping[str, Any], channels: tuple[str, ...]) -> list[Case]:
    ending = content["file_ending"]
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    channels_of: dict[str, int] = {}
    for path in sorted((folder / "imagesTr").glob(f"*{ending}")):
        if path.name.startswith("."):
            continue
        match = pattern.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} does not end in a channel number: nnU-Net names images CASE_0000{ending}")
        channels_of[match[1]] = max(int(match[2]) + 1, channels_of.get(match[1], 0))
    labels = {case_id: folder / "labelsTr" / f"{case_id}{ending}" for case_id in channels_of}
    return [
        Case(
            case_id=case_id,
            images=tuple(folder / "imagesTr" / f"{case_id}_{i:04d}{ending}" for i in range(num_images)),
            label=labels[case_id] if labels[case_id].is_file() else None,
            dataset=folder.name,
            subject=case_id,
            modalities=channels,
        )
        for case_id, num_images in channels_of.items()
    ]


def resolve_path(text: str, folder: Path) -> Path:
    """A path of a dataset description as an absolute one: variables expanded, relative to the dataset's folder.

    Raises:
        ValueError: If an environment variable in it is not set.
    """
    for name in _VARIABLE.findall(text):
        if name not in os.environ:
            raise ValueError(f"the path {text} in {folder} uses the variable {name}, which is not set; export it")
    return Path(os.path.normpath(folder.absolute() / os.path.expandvars(text)))


def _with_collection(manifest: Manifest, images: Sequence[CollectionImage]) -> Manifest:
    """Adds what a collection knows about the files of a manifest; cases it does not mention stay as they are."""
    known = {resolve_path(image.image_path, manifest.folder): image for image in images}
    cases = []
    for case in manifest.cases:
        found = [known.get(path) for path in case.images]
        first = next((image for image in found if image is not None), None)
        if first is None:
            cases.append(case)
            continue
        modalities = tuple(
            channel if image is None else image.modality or channel
            for image, channel in zip(found, case.modalities, strict=False)
        )
        cases.append(_described(case, first, modalities, manifest.folder))
    if not any(path in known for case in manifest.cases for path in case.images):
        raise ValueError(
            f"{manifest.folder / COLLECTION_FILE} describes none of the images of {DATASET_FILE} beside it: "
            f"its first path is {images[0].image_path}, the first case has {manifest.cases[0].images[0]}"
        )
    return replace(manifest, cases=tuple(cases))


def _from_collection(folder: Path, images: Sequence[CollectionImage]) -> Manifest:
    cases = []
    for image in images:
        case_id = image.case_id
        case = Case(case_id=case_id, images=(resolve_path(image.image_path, folder),), subject=case_id)
        cases.append(_described(case, image, (image.modality or UNKNOWN_CHANNEL,), folder))
    modalities = {image.modality for image in images}
    channel = next(iter(modalities)) if len(modalities) == 1 else ""
    return Manifest(
        dataset_name=folder.name,
        folder=folder,
        channel_names=(channel or UNKNOWN_CHANNEL,),
        file_ending=file_ending_of(cases[0].images[0]),
        labels=None,
        cases=tuple(sorted(cases, key=lambda case: case.case_id)),
    )


def _described(case: Case, image: CollectionImage, modalities: tuple[str, ...], folder: Path) -> Case:
    mask = image.anonymization_mask
    return replace(
        case,
        dataset=image.dataset,
        subject=f"{image.dataset}/{image.subject}",
        session=image.session,
        modalities=modalities,
        anonymization_mask=None if mask is None else resolve_path(mask, folder),
    )
