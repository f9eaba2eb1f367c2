"""The index of a preprocessed configuration: one record per case, so that nobody opens a volume to learn about it.

The finished index is one JSON file with a row per case. While cases are being written it is a journal, one JSON line
per finished case, so that a run that was killed knows what it need not do again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from nnssl_ext.core.records import write_text
from nnssl_ext.preprocessing.errors import full_disk_named

INDEX_FILE = "nnssl_index.json"
JOURNAL_FILE = "nnssl_index.journal"
FORMAT = 3
READABLE = {1: 11, 2: 14, FORMAT: 15}
"""Number of columns of every format that is read. A column that came later has a default: nothing is known."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """What is known about one stored case without opening its file."""

    case_id: str
    """Name of the case; its file is `<case_id>.b2nd`."""
    shape: tuple[int, ...]
    """Stored shape (C, Z, Y, X)."""
    spacing: tuple[float, ...]
    """Spacing of the stored array in mm, (Z, Y, X)."""
    subject: str
    """Whom the case shows; splits are made by subject."""
    dataset: str
    """The dataset within a collection that the case comes from."""
    modalities: tuple[str, ...]
    """One modality or contrast name per channel."""
    checksum: str
    """SHA-256 of the case's file, hex."""
    num_bytes: int
    """Size of the case's file."""
    foreground_fraction: float
    """Share of the stored volume that is foreground, 0 to 1."""
    content_hashes: tuple[str, ...]
    """Hash of the raw voxels, one per channel: recognises a case under any name."""
    source: tuple[str, ...]
    """Size and modification time of each raw file, to notice that one was replaced."""
    session: str = ""
    """Visit of the subject at which the image was made; empty where unknown."""
    grid: str = ""
    """Code of the raw image's shape, spacing and place: images of one session that share it are co-registered. Empty
    where unknown."""
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Where the stored volume begins within the raw image, in mm along its axes (Z, Y, X)."""
    altered_fraction: float = 0.0
    """Share of the stored volume that was altered to make the subject unrecognisable, 0 to 1; the file holds where."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a case comes from; the fields are those of its `IndexEntry`."""

    subject: str | None = None
    """None where nobody knows: the case then counts as a subject of its own."""
    dataset: str = ""
    modalities: tuple[str, ...] = ()
    content_hashes: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    session: str = ""
    grid: str = ""
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)


_COLUMNS = tuple(column.name for column in fields(IndexEntry))


@dataclass(frozen=True, kw_only=True)
class Index:
    """Every case of one preprocessed configuration and the settings that made it."""

    settings: Mapping[str, Any]
    """What decides the stored numbers; cases made with other settings must not be mixed."""
    entries: dict[str, IndexEntry] = field(default_factory=dict)
    """The cases by name."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cases that were left out, and why."""


def _row(entry: IndexEntry) -> str:
    return json.dumps([getattr(entry, name) for name in _COLUMNS], allow_nan=False, separators=(",", ":"))


def _entry(row: list[Any]) -> IndexEntry:
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in row]
    return IndexEntry(*values)


def write_index(folder: Path, index: Index) -> None:
    """Writes the index atomically, one line per case.

    Args:
        folder: The configuration's folder.
        index: Its cases; they are written in alphabetical order.
    """
    head = json.dumps(
        {"format": FORMAT, "settings": index.settings, "failed": index.failed, "columns": _COLUMNS}, allow_nan=False
    )
    rows = ",\n".join(_row(index.entries[case_id]) for case_id in sorted(index.entries))
    with full_disk_named(folder / INDEX_FILE):
        write_text(folder / INDEX_FILE, f'{head[:-1]}, "cases": [\n{rows}\n]}}\n')


def read_index(folder: Path) -> Index:
    """Reads the finished index of a folder.

    Raises:
        FileNotFoundError: If the folder was never preprocessed, or not to its end.
        ValueError: If the index is damaged or of another format.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {INDEX_FILE} in {folder}: it is not preprocessed to its end. Run nnssl_preprocess."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Run nnssl_preprocess --overwrite.") from error
    known = READABLE.get(content.get("format"))
    if known is None:
        raise ValueError(
            f"{path} has format {content.get('format')}, this version reads {', '.join(map(str, READABLE))}. "
            "Run nnssl_preprocess --overwrite."
        )
    if tuple(content.get("columns", ())) != _COLUMNS[:known]:
        raise ValueError(
            f"{path} is damaged: its columns are not those of format {content['format']}. Run nnssl_preprocess "
            "--overwrite."
        )
    entries = {row[0]: _entry(row) for row in content["cases"]}
    return Index(settings=content["settings"], entries=entries, failed=content["failed"])


class Journal:
    """Finished cases of a run, one synced line each; a context manager.

    Its first line holds the settings. A last line cut short by a crash is dropped when the journal is read.

    Args:
        folder: The configuration's folder.
        settings: What decides the stored numbers.
        entries: Cases that are already there; the journal is written anew with them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], entries: Iterable[IndexEntry] = ()) -> None:
        self._path = folder / JOURNAL_FILE
        lines = [json.dumps({"format": FORMAT, "settings": settings}, allow_nan=False), *map(_row, entries)]
        with full_disk_named(self._path):
            write_text(self._path, "\n".join(lines) + "\n")
        self._file = self._path.open("ab", buffering=0)

    def add(self, entry: IndexEntry) -> None:
        """Notes a case whose file is whole and in place."""
        with full_disk_named(self._path):
            line = f"{_row(entry)}\n".encode()
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_journal(folder: Path) -> Index | None:
    """What an unfinished run had done, or None where there is no journal with a whole first line."""
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return None
    head, *rows = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    if not head:
        return None
    content = json.loads(head)
    if content["format"] not in READABLE:
        return None
    entries = (_entry(json.loads(row)) for row in rows)
    return Index(settings=content["settings"], entries={entry.case_id: entry for entry in entries})
