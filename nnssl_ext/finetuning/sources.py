"""What preprocessed cases and trained folds were made of, by which a corrected image or label is noticed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.core.records import file_hash, read_json, write_json
from nnssl_ext.dataset.manifest import Manifest

CACHE_FILE = "nnssl_file_hashes.json"
"""In the dataset's preprocessed folder: the hashes of its raw files."""
SOURCES_FOLDER = "nnssl_sources"
"""In the dataset's preprocessed folder, a file for each folder of preprocessed cases, in which nnU-Net allows no other
files: the hashes of the files that each case was made of."""
RECORD_FILE = "nnssl_run.json"
"""In a fold's folder: what it is trained on, and with which versions."""

Hashes = dict[str, tuple[str, ...]]
"""By case."""


def kept_hashes(
    function: Callable[[Sequence[Path]], tuple[str, ...]],
    files: Mapping[str, Sequence[Path]],
    executor: Executor,
    cache: Path,
    title: str,
) -> Hashes:
    """Hashes of files, made anew only where a file has another size or time than when it was hashed.

    Args:
        function: A module-level function of the files of one case.
        files: By case.
        executor: Where they are read.
        cache: File that keeps the hashes.
        title: Of the progress bar.

    Raises:
        ValueError: If a file cannot be read.
    """
    stamps = {case: _stamp(own) for case, own in files.items()}
    kept: dict[str, dict[str, Any]] = read_json(cache) if cache.is_file() else {}
    missing = {case: (own,) for case, own in files.items() if kept.get(case, {}).get("files") != stamps[case]}
    for result in track(executor.run(function, missing), len(missing), title):
        if result.error is not None:
            raise ValueError(f"case {result.key} cannot be read: {result.error}")
        kept[result.key] = {"files": stamps[result.key], "hashes": list(result.value)}
    if missing:
        write_json(cache, kept)
    return {case: tuple(kept[case]["hashes"]) for case in files}


def _stamp(files: Sequence[Path]) -> list[list[Any]]:
    """Path, size and time of each file, as JSON keeps them."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def file_hashes(files: Sequence[Path]) -> tuple[str, ...]:
    """SHA-256 of each file's bytes."""
    return tuple(map(file_hash, files))


def source_hashes(manifest: Manifest, cases: Iterable[str], executor: Executor, preprocessed: Path) -> Hashes:
    """Hashes of the raw image and label files of labelled cases.

    Args:
        manifest: The dataset.
        cases: Ids.
        executor: Where files are read.
        preprocessed: The dataset's preprocessed folder, which keeps them.

    Raises:
        ValueError: If a file cannot be read.
    """
    chosen = [manifest.case(case) for case in cases]
    files = {case.case_id: (*case.images, *filter(None, [case.label])) for case in chosen}
    return kept_hashes(file_hashes, files, executor, preprocessed / CACHE_FILE, "looking for changed files")


def sources_file(folder: Path) -> Path:
    """Where it is kept what the preprocessed cases of a folder were made of."""
    return folder.parent / SOURCES_FOLDER / f"{folder.name}.json"


def read_sources(folder: Path) -> Hashes:
    """What the preprocessed cases of a folder, or a fold, were made of; nothing where that was not recorded."""
    path, record = sources_file(folder), folder / RECORD_FILE
    known = read_json(path) if path.is_file() else read_json(record)["sources"] if record.is_file() else {}
    return {case: tuple(hashes) for case, hashes in known.items()}


def write_sources(folder: Path, hashes: Mapping[str, Sequence[str]]) -> None:
    """Adds cases to the record of a folder of preprocessed ones."""
    write_json(sources_file(folder), {case: list(own) for case, own in {**read_sources(folder), **hashes}.items()})


def write_record(fold: Path, preprocessed_cases: Path) -> None:
    """Keeps in a fold's folder what it is trained on, and with which versions."""
    sources = {case: list(own) for case, own in read_sources(preprocessed_cases).items()}
    write_json(fold / RECORD_FILE, {"sources": sources, "versions": versions()})


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, as pretraining runs record them too."""
    from nnssl_ext.engine.run import RECORDED_PACKAGES

    return {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}}
