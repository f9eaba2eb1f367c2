"""Content hashes of the images that are evaluated on, to be compared with those that were pretrained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.dataset.manifest import Manifest


def content_hashes(manifest: Manifest, cases: Sequence[str], executor: Executor) -> dict[str, tuple[str, ...]]:
    """Hashes of the raw voxels of each case, one per channel: the same as preprocessing for pretraining records.

    They know an image again under another name, in another folder or in another file format.

    Raises:
        ValueError: If an image cannot be read.
    """
    tasks = {case: (manifest.case(case).images,) for case in cases}
    hashes: dict[str, tuple[str, ...]] = {}
    for result in track(executor.run(hash_images, tasks), len(tasks), "looking for leaks"):
        if result.error is not None:
            raise ValueError(f"case {result.key} cannot be read: {result.error}")
        hashes[result.key] = result.value
    return hashes


def hash_images(files: Sequence[Path]) -> tuple[str, ...]:
    """Content hash of each channel of one case."""
    from nnssl_ext.dataset.integrity import content_hash
    from nnssl_ext.imageio import read_image

    data, _ = read_image(list(files))
    return tuple(content_hash(channel) for channel in data)
