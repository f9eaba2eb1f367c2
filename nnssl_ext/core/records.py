"""Files and typed records: atomic writes, JSON, hashes, dataclasses with documented fields and checked overrides."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import os
import tempfile
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_HASH_BLOCK = 1 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    The temporary name keeps the suffixes of `path`. The file is synced before it is renamed, so after a crash or on a
    full disk `path` is either the old file or the whole new one.

    Raises:
        OSError: Whatever writing, syncing or renaming raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes builtins as indented JSON, atomically.

    Raises:
        ValueError: If a number is not finite (JSON has no NaN).
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not JSON; the message names the file and the place.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows' editors put a mark in front
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def to_dict(record: Any) -> dict[str, Any]:
    """A dataclass instance as JSON builtins (tuples become lists, paths strings)."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(record)).dump_python(record, mode="json")


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds a dataclass from JSON builtins, checking every name and type.

    Args:
        cls: A dataclass; fields may be dataclasses.
        mapping: The values.
        where: What the mapping is, for messages (a file).

    Raises:
        ValueError: If a key is unknown, missing or of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    _check_names(cls, mapping, where)
    try:
        return TypeAdapter(cls).validate_python(dict(mapping))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or cls.__name__
        prefix = f"{where}: " if where else ""
        own = first.get("ctx", {}).get("error")  # a record's own check, whose text names the value
        problem = str(own) if own else f"{first['msg']} (got {first['input']!r})"
        raise ValueError(f"{prefix}{name}: {problem}") from error


def _check_names(cls: type, mapping: Mapping[str, Any], where: str) -> None:
    fields = _field_types(cls)
    for name, value in mapping.items():
        if name not in fields:
            prefix = f"{where}: " if where else ""
            raise ValueError(f"{prefix}{cls.__name__} has no field {name!r}. Valid: {', '.join(sorted(fields))}")
        if dataclasses.is_dataclass(fields[name]) and isinstance(value, Mapping):
            _check_names(fields[name], value, where)


def _field_types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of a dataclass with `name=value` settings applied; dots reach into nested dataclasses.

    Values are parsed as JSON where they can be (`1e-3`, `true`, `[1, 2]`), else taken as text, then checked against the
    field's type.

    Raises:
        ValueError: If an override has no `=`, names no field, or has a value that does not fit.
    """
    values = to_dict(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form name=value")
        *parents, leaf = path.strip().split(".")
        target, cls = values, type(config)
        for parent in parents:
            _check_names(cls, {parent: None}, f"override {override!r}")
            if not dataclasses.is_dataclass(_field_types(cls)[parent]):
                raise ValueError(f"override {override!r}: {parent} has no fields of its own")
            target, cls = target[parent], _field_types(cls)[parent]
        _check_names(cls, {leaf: None}, f"override {override!r}")
        target[leaf] = _parse(text.strip())
    return from_dict(type(config), values, "overrides")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


@dataclasses.dataclass(frozen=True)
class FieldDescription:
    """One setting: dotted name, type, default and meaning."""

    name: str
    type: str
    default: Any
    doc: str


def describe(config: Any) -> list[FieldDescription]:
    """The settings of a dataclass instance with the texts beneath its fields; nested ones with dotted names."""
    rows: list[FieldDescription] = []
    docs, types = _field_docs(type(config)), _field_types(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows += [dataclasses.replace(row, name=f"{field.name}.{row.name}") for row in describe(value)]
        else:
            kind = types[field.name]
            label = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
            rows.append(FieldDescription(field.name, label.replace("typing.", ""), value, docs.get(field.name, "")))
    return rows


def _field_docs(cls: type[Any]) -> dict[str, str]:
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(text.value.value))
    return docs
