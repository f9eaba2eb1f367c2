"""Small stores of preprocessed cases."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.preprocessing.store import Store, write_case

MakeStore = Callable[..., Store]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Writes cases `case_0`, `case_1`, ... of the given shapes; a voxel's value is its position in the volume."""

    def make(
        shapes: Sequence[tuple[int, int, int]],
        foreground: Mapping[int, np.ndarray] | None = None,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        num_channels: int = 1,
    ) -> Store:
        entries = {}
        for number, shape in enumerate(shapes):
            z, y, x = np.indices(shape)
            position = (10000 * number + z * 1000 + y * 30 + x).astype(np.float32) / 8
            data = np.stack([position + channel for channel in range(num_channels)])
            mask = (foreground or {}).get(number, np.ones(shape, bool))
            entry = write_case(tmp_path / "store", f"case_{number}", data, {}, mask, spacing=spacing, dtype="float32")
            entries[entry.case_id] = entry
        return Store(tmp_path / "store", entries)

    return make
