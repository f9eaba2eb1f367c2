"""Any tree of image files becomes an unlabelled dataset, its images referenced where they are, or copied."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from nnssl_ext.dataset.collection import CollectionImage, case_id_of, without_ending
from nnssl_ext.dataset.manifest import UNKNOWN_CHANNEL
from nnssl_ext.dataset.raw_writer import RawDataset, new_dataset_folder, write_datasets
from nnssl_ext.imageio import FILE_ENDINGS, file_ending_of

BIDS_SUBJECT = r"sub-([A-Za-z0-9]+)"
BIDS_SESSION = re.compile(r"ses-([A-Za-z0-9]+)")
EVERYTHING = ("*",)
LABEL_FOLDERS = ("labelstr", "labelsts", "labels", "segmentations", "masks")
LABEL_SUFFIXES = ("_seg", "_dseg", "_mask", "_label", "_labels", "-seg", "-mask", "-label")
"""Ends of file names that, like `LABEL_FOLDERS`, promise no image to learn from."""
_HASH_LENGTH = 8


def convert(
    source: Path,
    raw: Path,
    *,
    dataset_id: int,
    name: str,
    copy: bool = False,
    modality: str = UNKNOWN_CHANNEL,
    subject: str | None = None,
    include: Sequence[str] = EVERYTHING,
    exclude: Sequence[str] = (),
    num_processes: int = 0,
) -> list[Path]:
    """Makes an unlabelled dataset of every image below a folder, one case per file.

    Args:
        source: The folder.
        raw: Where raw datasets live.
        dataset_id: Of the new dataset.
        name: Of the new dataset.
        copy: Copy the images instead of referencing them.
        modality: Channel name; "CT" selects nnU-Net's CT normalisation, anything else z-score.
        subject: Regular expression searched for in a file's path below the source; its first group is the patient. By
            default BIDS's `sub-LABEL`, and where there is none each file is a patient of its own.
        include: Patterns such as `*T1w*`, on the path below the source; a file must match one.
        exclude: Patterns; a file must match none.
        num_processes: Worker processes for copying; 0 works in this one.

    Returns:
        The folder written.

    Raises:
        FileNotFoundError: If the source is no folder or holds no image.
        ValueError: If label maps would be taken for images, the regular expression is malformed or not found in a path,
            or the target is taken.
    """
    folder = new_dataset_folder(raw, dataset_id, name)
    source = source.absolute()
    files = list(find_images(source, include, exclude))
    if not files:
        raise FileNotFoundError(f"no image is left below {source}; looked for {', '.join(FILE_ENDINGS)}")
    if tuple(include) == EVERYTHING:
        _refuse_labels(source, files)
    cases = dict(zip(name_cases([file.relative_to(source) for file in files]), files, strict=True))
    paths = {case_id: _copied_path(case_id, file) if copy else file.as_posix() for case_id, file in cases.items()}
    endings = Counter(file_ending_of(Path(path)) for path in paths.values())
    by_name = copy and len(endings) == 1
    dataset = RawDataset(
        folder=folder,
        channel_names=(modality,),
        file_ending=endings.most_common(1)[0][0],
        num_cases=len(cases),
        files={file: (paths[case_id],) for case_id, file in cases.items()} if copy else {},
        references=None if by_name else {case_id: {"images": [path]} for case_id, path in paths.items()},
        images=_describe(cases, paths, source, dataset=name, modality=modality, subject=subject),
    )
    write_datasets([dataset], num_processes)
    return [folder]


def find_images(source: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    """Every readable image below a folder, sorted, links followed; hidden files and folders are passed over.

    Raises:
        FileNotFoundError: If the source is no folder.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder")
    for place, folders, names in os.walk(source.absolute(), followlinks=True):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            relative = path.relative_to(source.absolute()).as_posix()
            wanted = any(fnmatch(relative, p) for p in include) and not any(fnmatch(relative, p) for p in exclude)
            if wanted and name.lower().endswith(FILE_ENDINGS) and not name.startswith("."):
                yield path


def name_cases(paths: Sequence[Path]) -> list[str]:
    """A case id per file: its path, with `__` between the folders; a short hash is added where two would be alike.

    Args:
        paths: Relative to the source, all different.
    """
    names = [case_id_of(*path.parent.parts, without_ending(path.name)) for path in paths]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name}_{hashlib.sha256(path.as_posix().encode()).hexdigest()[:_HASH_LENGTH]}"
        for name, path in zip(names, paths, strict=True)
    ]


def _copied_path(case_id: str, file: Path) -> str:
    ending = file_ending_of(file).lower()
    return f"imagesTr/{case_id}_0000{'.mha' if ending == '.mhd' else ending}"


def _refuse_labels(source: Path, files: Sequence[Path]) -> None:
    labels = [
        file
        for file in files
        if without_ending(file.name).lower().endswith(LABEL_SUFFIXES)
        or any(part.lower() in LABEL_FOLDERS for part in file.relative_to(source).parent.parts)
    ]
    if labels:
        raise ValueError(
            f"{len(labels)} of {len(files)} files look like label maps, not images, such as {labels[0]}. Leave them "
            "out with --exclude, for example --exclude 'labelsTr/*' '*_seg.*', or name the images with --include"
        )


def _describe(
    cases: Mapping[str, Path],
    paths: Mapping[str, str],
    source: Path,
    *,
    dataset: str,
    modality: str,
    subject: str | None,
) -> tuple[CollectionImage, ...]:
    """Patients and sessions found in the files' paths; nothing where no path names a patient."""
    try:
        pattern = re.compile(subject or BIDS_SUBJECT)
    except re.error as error:
        raise ValueError(f"--subject {subject!r} is no regular expression: {error}") from error
    images = []
    num_named = 0
    for case_id, file in cases.items():
        relative = file.relative_to(source).as_posix()
        patient, session = pattern.search(relative), BIDS_SESSION.search(relative)
        if patient is None and subject is not None:
            raise ValueError(f"--subject {subject!r} is not found in {relative}; every file must name its patient")
        num_named += patient is not None
        images.append(
            CollectionImage(
                dataset=dataset,
                subject=case_id if patient is None else patient[pattern.groups and 1],
                session=session[1] if session else "",
                name=case_id,
                image_path=paths[case_id],
                modality=modality,
            )
        )
    return tuple(images) if num_named else ()
