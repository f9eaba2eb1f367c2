"""Preprocessed volumes on disk: one small-block blosc2 file per case, cropped without decoding the rest.

A file holds the array and, in its metadata, the properties of the case and a coarse bit-packed grid of where its
foreground is. A volume is written once and read thousands of times, so the codec is the one that decodes twice as fast
as the smallest (LZ4-HC at level 1 behind a byte shuffle, in blocks of 32 voxels an edge), for a sixth more bytes;
`benchmarks/bench_store.py` measures the choice and docs/performance.md has its figures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt

from nnssl_ext.core.records import atomic_path, file_hash
from nnssl_ext.preprocessing.errors import CorruptCaseError, full_disk_named
from nnssl_ext.preprocessing.index import IndexEntry, Provenance, read_index
from nnssl_ext.preprocessing.layout import StorageType, block_shape, chunk_shape, occupancy_grid, to_storage

SUFFIX = ".b2nd"
COMPRESSION = {"codec": blosc2.Codec.LZ4HC, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
"""blosc2's parameters for every case."""


def write_case(
    folder: Path,
    case_id: str,
    data: npt.NDArray[np.float32],
    properties: Mapping[str, Any],
    foreground: npt.NDArray[np.bool_],
    *,
    spacing: Sequence[float],
    provenance: Provenance = Provenance(),  # noqa: B008 - frozen
    altered: npt.NDArray[np.bool_] | None = None,
    dtype: StorageType = "float16",
) -> IndexEntry:
    """Writes one case: to a temporary name, synced, then renamed.

    Args:
        folder: The configuration's folder; made when needed.
        case_id: Name of the case and of its file.
        data: Preprocessed values (C, Z, Y, X), finite.
        properties: JSON builtins that describe the case, as nnU-Net's preprocessor leaves them.
        foreground: (Z, Y, X), where there is something to see.
        spacing: In mm, (Z, Y, X), of the stored array.
        provenance: Where the case comes from.
        altered: (Z, Y, X), what was altered to make the subject unrecognisable; None: nothing.
        dtype: Type on disk.

    Raises:
        ValueError: If shapes disagree, a value does not fit the type, or the name cannot be a file's name.
        StorageFullError: If the disk is full; nothing is left behind.
        OSError: If writing fails otherwise.
    """
    if data.shape[1:] != foreground.shape:
        raise ValueError(f"{case_id}: foreground of shape {foreground.shape} does not fit data of shape {data.shape}")
    array, clamped = to_storage(data, dtype)
    occupancy, cell = occupancy_grid(foreground)
    hidden = None if altered is None or not altered.any() else altered
    frame = _encode(array, {**properties, "num_clamped_voxels": clamped}, occupancy, cell, hidden)
    path = _case_path(folder, case_id)
    with full_disk_named(path), atomic_path(path) as temporary:
        temporary.write_bytes(frame)
    return IndexEntry(
        case_id=case_id,
        shape=tuple(int(size) for size in array.shape),
        spacing=tuple(float(edge) for edge in spacing),
        checksum=hashlib.sha256(frame).hexdigest(),
        num_bytes=len(frame),
        foreground_fraction=float(foreground.mean()),
        altered_fraction=0.0 if hidden is None else float(hidden.mean()),
        **{**vars(provenance), "subject": case_id if provenance.subject is None else provenance.subject},
    )


def _case_path(folder: Path, case_id: str) -> Path:
    if not case_id or case_id.startswith(".") or "/" in case_id or "\\" in case_id:
        raise ValueError(
            f"case name {case_id!r} cannot be a file's name: it must not be empty, start with '.' or hold a slash"
        )
    return folder / f"{case_id}{SUFFIX}"


def _encode(
    array: npt.NDArray[Any],
    properties: Mapping[str, Any],
    grid: npt.NDArray[np.bool_],
    cell: tuple[int, int, int],
    altered: npt.NDArray[np.bool_] | None,
) -> bytes:
    stored = _compress(array)
    stored.schunk.vlmeta["properties"] = json.dumps(properties, allow_nan=False)
    stored.schunk.vlmeta["occupancy"] = [list(cell), list(grid.shape), np.packbits(grid).tobytes()]
    if altered is not None:  # a file in the file, so that a crop decodes a part of it; some kB
        stored.schunk.vlmeta["altered"] = _compress(altered[None].view(np.uint8)).to_cframe()
    return stored.to_cframe()


def _compress(array: npt.NDArray[Any]) -> Any:
    _single_threaded()
    block, chunk = block_shape(array.shape[1:]), chunk_shape(array.shape[1:])
    return blosc2.asarray(array, chunks=(1, *chunk), blocks=(1, *block), cparams=COMPRESSION)


class Store:
    """The preprocessed cases of one configuration, read through their index.

    Args:
        folder: The configuration's folder.
        entries: The cases in it.
    """

    def __init__(self, folder: Path, entries: dict[str, IndexEntry]) -> None:
        self.folder = Path(folder)
        self.entries = entries

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Reads the index and opens no case.

        Raises:
            FileNotFoundError: If there is no index.
            ValueError: If the index is damaged.
        """
        return cls(Path(folder), read_index(Path(folder)).entries)

    def open_case(self, case_id: str) -> Any:
        """Opens a case's file, for several calls of `read_crop` and `occupancy`.

        Raises:
            CorruptCaseError: If the file is missing, cut short, or not a stored case.
        """
        entry = self.entries[case_id]
        path = _case_path(self.folder, case_id)
        if not path.is_file() or path.stat().st_size != entry.num_bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise CorruptCaseError(f"{path}: found {found}, the index says {entry.num_bytes} bytes. {_repair(case_id)}")
        return _open(path)

    def read_crop(
        self,
        case_id: str,
        lower: Sequence[int],
        upper: Sequence[int],
        out: npt.NDArray[Any] | None = None,
        opened: Any = None,
    ) -> npt.NDArray[Any]:
        """Decodes the blocks that a box touches, and no others.

        Args:
            case_id: A case of the index.
            lower: First voxel (z, y, x) of the box, inside the volume.
            upper: One beyond its last voxel (z, y, x), inside the volume.
            out: A C-contiguous array (C, *box) of the stored type to decode into.
            opened: What `open_case` gave; without it the file is opened.

        Returns:
            All channels of the box (C, *box), of the stored type.

        Raises:
            ValueError: If the box is empty or leaves the volume, or `out` does not fit.
            CorruptCaseError: If the file is missing, cut short, or cannot be decoded.
        """
        shape = self.entries[case_id].shape
        sides = list(zip(lower, upper, shape[1:], strict=True))
        if not all(0 <= low < high <= size for low, high, size in sides):
            raise ValueError(
                f"{case_id}: box {tuple(lower)} to {tuple(upper)} is empty or leaves the volume {shape[1:]}"
            )
        array = self.open_case(case_id) if opened is None else opened
        start, stop = [0, *map(int, lower)], [shape[0], *map(int, upper)]
        target = tuple(high - low for low, high in zip(start, stop, strict=True))
        if out is None:
            out = np.empty(target, dtype=array.dtype)
        if out.shape != target or out.dtype != array.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"{case_id}: out must be contiguous, {array.dtype} and of shape {target}, not {out.dtype} {out.shape}"
            )
        try:
            return array.get_slice_numpy(out, (start, stop))
        except (RuntimeError, ValueError) as error:
            raise CorruptCaseError(
                f"{_case_path(self.folder, case_id)}: cannot be decoded ({error}). {_repair(case_id)}"
            ) from error

    def occupancy(self, case_id: str, opened: Any = None) -> tuple[npt.NDArray[np.bool_], tuple[int, int, int]]:
        """A coarse grid (Z, Y, X) of where the foreground is, and its cells' edges in voxels; see `occupancy_grid`.

        Raises:
            CorruptCaseError: If the file is missing, cut short or altered.
        """
        array = self.open_case(case_id) if opened is None else opened
        try:
            cell, shape, packed = array.schunk.vlmeta["occupancy"]
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=int(np.prod(shape)))
            return bits.view(bool).reshape(shape), (cell[0], cell[1], cell[2])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            path = _case_path(self.folder, case_id)
            raise CorruptCaseError(f"{path}: its foreground cannot be read ({error}). {_repair(case_id)}") from error

    def altered(
        self, case_id: str, lower: Sequence[int], upper: Sequence[int], opened: Any = None
    ) -> npt.NDArray[np.bool_]:
        """Which voxels of a box were altered to make the subject unrecognisable.

        Args:
            case_id: A case of which some were, by its entry.
            lower: First voxel (z, y, x) of the box, inside the volume.
            upper: One beyond its last voxel (z, y, x), inside the volume.
            opened: What `open_case` gave; without it the file is opened.

        Returns:
            (*box).

        Raises:
            CorruptCaseError: If the file is missing, cut short or altered.
        """
        array = self.open_case(case_id) if opened is None else opened
        try:
            mask = blosc2.ndarray_from_cframe(array.schunk.vlmeta["altered"])
            return mask[(0, *map(slice, lower, upper))].astype(bool)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            path = _case_path(self.folder, case_id)
            raise CorruptCaseError(
                f"{path}: its anonymisation mask cannot be read ({error}). {_repair(case_id)}"
            ) from error

    def properties(self, case_id: str) -> dict[str, Any]:
        """The case's properties as nnU-Net's preprocessor names them, from its file."""
        array = self.open_case(case_id)
        return json.loads(array.schunk.vlmeta["properties"])

    def verify(self, case_id: str) -> None:
        """Reads the whole file and compares its checksum.

        Raises:
            CorruptCaseError: If the file is missing, cut short or altered.
        """
        self.open_case(case_id)
        path = _case_path(self.folder, case_id)
        if file_hash(path) != self.entries[case_id].checksum:
            raise CorruptCaseError(f"{path}: its bytes were altered since it was written. {_repair(case_id)}")


def _repair(case_id: str) -> str:
    return f"Delete the file of {case_id} and run nnssl_preprocess again: it writes what is missing."


def _open(path: Path) -> Any:
    _single_threaded()
    try:
        return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
    except (RuntimeError, ValueError) as error:
        raise CorruptCaseError(f"{path}: is not a stored case ({error}). {_repair(path.stem)}") from error


@lru_cache(maxsize=1)
def _single_threaded() -> None:
    """One blosc2 thread a process: a loader has many processes, and forking after a threaded read deadlocks.

    The environment variable is set too, because it overrules every argument and its value goes into a file's header:
    a case that is written again must be the same bytes whatever the process was started with.
    """
    os.environ["BLOSC_NTHREADS"] = "1"
    blosc2.set_nthreads(1)
