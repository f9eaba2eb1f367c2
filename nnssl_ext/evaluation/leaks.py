"""Content hashes of the images that are evaluated on, to be compared with those that were pretrained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nnssl_ext.core.executor import Executor
from nnssl_ext.dataset.integrity import image_hashes
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split
from nnssl_ext.finetuning.sources import kept_hashes


def content_hashes(
    manifest: Manifest, cases: Sequence[str], executor: Executor, cache: Path
) -> dict[str, tuple[str, ...]]:
    """Hashes of the raw voxels of each case, one per channel: the same as preprocessing for pretraining records.

    They know an image again under another name, in another folder or in another file format.

    Args:
        manifest: The dataset.
        cases: Ids of the cases.
        executor: Where the images are read.
        cache: File that keeps the hashes; one is used again while its image files keep size and time.

    Raises:
        ValueError: If an image cannot be read.
    """
    files = {case: manifest.case(case).images for case in cases}
    return kept_hashes(image_hashes, files, executor, cache, "looking for leaks")


def refuse_copies(hashes: Mapping[str, Sequence[str]], splits: Mapping[int, Split]) -> None:
    """Refuses folds that train on a copy of an image that they validate on.

    Args:
        hashes: Content hashes by case.
        splits: By number of the fold.

    Raises:
        ValueError: If there is one, with both cases.
    """
    for number, split in splits.items():
        trained = {code: case for case in split.train for code in hashes[case]}
        for case in split.val:
            copies = sorted({trained[code] for code in hashes[case] if code in trained})
            if copies:
                raise ValueError(
                    f"fold {number} validates on {case} and trains on {copies[0]}, which holds the same image: its "
                    "result would not be honest. Remove one of the two, or put both on one side in splits_final.json "
                    "and plan again"
                )
