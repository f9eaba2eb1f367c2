"""Results of single cases on disk, one line each, so that an extraction that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nnssl_ext.core.records import write_text
from nnssl_ext.dataset.integrity import Problem
from nnssl_ext.dataset.manifest import Case
from nnssl_ext.fingerprint.record import CaseFingerprint

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What a worker found in one case."""

    case_id: str
    stamp: Stamp
    """Size in bytes and time of change in ns of each file; the result holds as long as they are the same."""
    fingerprint: CaseFingerprint | None = None
    """None where the case cannot be used."""
    quantiles: tuple[tuple[float, ...], ...] = ()
    """Of each channel's foreground; see `intensity_quantiles`."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with the case."""


def file_stamp(case: Case) -> Stamp:
    """Size and time of change of each of a case's files; (-1, -1) for one that is missing."""
    files = [*case.images, *([case.label] if case.label else [])]
    states = [file.stat() if file.is_file() else None for file in files]
    return tuple((state.st_size, state.st_mtime_ns) if state else (-1, -1) for state in states)


def read_journal(path: Path, settings: Mapping[str, Any], cases: Iterable[Case]) -> dict[str, CaseResult]:
    """The results that still hold: made with these settings, from files that have not changed since.

    A last line that a crash cut off is passed over.

    Args:
        path: The journal; it need not be there.
        settings: What results depend on besides the files, as JSON builtins.
        cases: Those that count.
    """
    if not path.is_file():
        return {}
    heading, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    if heading != _heading(settings):
        return {}
    wanted = {case.case_id: case for case in cases}
    results = (_adapter().validate_json(line) for line in lines if line.endswith("\n"))
    return {
        result.case_id: result
        for result in results
        if result.case_id in wanted and result.stamp == file_stamp(wanted[result.case_id])
    }


def start_journal(path: Path, settings: Mapping[str, Any], results: Iterable[CaseResult]) -> None:
    """Writes a journal anew, atomically, with the results that still hold."""
    write_text(path, _heading(settings) + "".join(map(_line, results)))


def append_result(file: IO[str], result: CaseResult) -> None:
    """Adds one result to an open journal and hands it to the system."""
    file.write(_line(result))
    file.flush()


def _heading(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True) + "\n"


def _line(result: CaseResult) -> str:
    return _adapter().dump_json(result).decode() + "\n"


@cache
def _adapter() -> TypeAdapter[CaseResult]:
    from pydantic import TypeAdapter

    return TypeAdapter(CaseResult)
