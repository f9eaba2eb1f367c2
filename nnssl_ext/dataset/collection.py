"""Upstream's `pretrain_data.json`: a collection of datasets of subjects of sessions of images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.imageio.formats import FILE_ENDINGS


@dataclass(frozen=True, kw_only=True)
class CollectionImage:
    """One image of a collection, with everything above it."""

    dataset: str
    subject: str
    session: str
    name: str
    image_path: str
    """As written: may start with `$VARIABLE`, or be relative to the file's folder."""
    modality: str = ""
    anonymization_mask: str | None = None

    @property
    def case_id(self) -> str:
        """Unique over the collection, and a plain file name."""
        return case_id_of(self.dataset, self.subject, self.session, without_ending(self.name))


def without_ending(name: str) -> str:
    """A file's name without the ending of an image, if it has one."""
    return next((name[: -len(ending)] for ending in FILE_ENDINGS if name.lower().endswith(ending)), name)


def case_id_of(*parts: str) -> str:
    """A case id made of the parts that are not empty, with what does not belong in a file name replaced by `_`."""
    return "__".join(re.sub(r"[^\w.-]+", "_", part).strip("_.") for part in parts if part)


def read_collection(path: Path) -> list[CollectionImage]:
    """Reads a `pretrain_data.json`.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it does not follow the schema, holds no image, or names two images alike.
    """
    content = read_json(path)
    try:
        images = list(_images(content))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} does not follow upstream's schema (collection > datasets > subjects > sessions > images): "
            f"{type(error).__name__} {error}"
        ) from error
    if not images:
        raise ValueError(f"{path} lists no image")
    name, count = Counter(image.case_id for image in images).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path} lists {count} images as {name}; images of one session need names of their own")
    return images


def _images(content: Mapping[str, Any]) -> Iterator[CollectionImage]:
    for index, dataset in content["datasets"].items():
        for subject_id, subject in dataset["subjects"].items():
            for session_id, session in subject["sessions"].items():
                for image in session["images"]:
                    masks = image.get("associated_masks") or {}
                    yield CollectionImage(
                        dataset=str(dataset.get("name") or index),
                        subject=str(subject_id),
                        session=str(session_id),
                        name=str(image["name"]),
                        image_path=str(image["image_path"]),
                        modality=str(image.get("modality") or ""),
                        anonymization_mask=masks.get("anonymization_mask"),
                    )


def write_collection(path: Path, name: str, images: Sequence[CollectionImage]) -> None:
    """Writes images as a `pretrain_data.json` that upstream reads too, atomically.

    Args:
        path: The file.
        name: Of the collection: the raw dataset's folder name.
        images: In any order.
    """
    datasets: dict[str, Any] = {}
    for image in images:
        dataset = datasets.setdefault(
            image.dataset, {"dataset_index": image.dataset, "name": image.dataset, "dataset_info": None, "subjects": {}}
        )
        subject = dataset["subjects"].setdefault(
            image.subject, {"subject_id": image.subject, "subject_info": None, "sessions": {}}
        )
        session = subject["sessions"].setdefault(
            image.session, {"session_id": image.session, "session_info": None, "images": []}
        )
        masks = {"anonymization_mask": image.anonymization_mask, "anatomy_mask": None}
        session["images"].append(
            {
                "name": image.name,
                "image_path": image.image_path,
                "modality": image.modality,
                "image_info": None,
                "associated_masks": masks if image.anonymization_mask else None,
            }
        )
    write_json(path, {"collection_index": name, "collection_name": name, "datasets": datasets})
