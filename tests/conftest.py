"""Fixtures for every test: folders of a pipeline, and the real volumes."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two busy-waiting torch processes on two cores run 40x slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real volumes; the test is skipped where it is absent."""
    folder = Path(os.environ.get("NNSSL_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real volumes in {folder}; set NNSSL_TEST_DATA to their folder")
    return folder


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder with raw, preprocessed and results in it, and the environment pointing there."""
    for kind in ("raw", "preprocessed", "results"):
        folder = tmp_path / kind
        folder.mkdir()
        monkeypatch.setenv(f"nnssl_{kind}", str(folder))
        monkeypatch.setenv(f"nnUNet_{kind}", str(folder))
    return tmp_path
