from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.dataset.integrity import (
    USABLE_KINDS,
    Problem,
    content_hash,
    duplicate_problems,
    find_duplicates,
    find_odd_dimensions,
    read_checked,
)
from nnssl_ext.dataset.manifest import Case, Manifest
from nnssl_ext.imageio import Geometry, write_image

GEOMETRY = Geometry(spacing=(2.0, 1.0, 1.0), origin=(3.0, 4.0, 5.0), direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
SHAPE = (6, 8, 7)
MIDDLE = 50


def voxels(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def image(path: Path, data: np.ndarray | None = None, geometry: Geometry = GEOMETRY) -> Path:
    write_image(voxels(len(path.name)) if data is None else data, geometry, path)
    return path


def set_spacing(path: Path, value: float) -> Path:
    """Writes a voxel size into the header of an uncompressed NIfTI file, past every check of a library."""
    content = bytearray(path.read_bytes())
    content[80:84] = struct.pack("<f", value)
    path.write_bytes(content)
    return path


def nan_voxel() -> np.ndarray:
    data = voxels()
    data[1, 2, 3] = np.nan
    return data


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def damaged(path: Path) -> Path:
    """Flips a byte of the compressed voxels, behind the header."""
    content = bytearray(path.read_bytes())
    content[-MIDDLE] ^= 0xFF
    path.write_bytes(content)
    return path


def four_dimensional(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(voxels(0, (2, *SHAPE)), isVector=False), str(path))
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "missing": (lambda folder: folder / "x.nii.gz", "missing", "does not exist"),
    "empty file": (lambda folder: touched(folder / "x.nii.gz"), "unreadable", "empty file"),
    "truncated gzip": (lambda folder: truncated(image(folder / "x.nii.gz")), "unreadable", "truncated"),
    "truncated": (lambda folder: truncated(image(folder / "x.nii")), "unreadable", "truncated"),
    "truncated nrrd": (lambda folder: truncated(image(folder / "x.nrrd")), "unreadable", "expected"),
    "flipped byte": (lambda folder: damaged(image(folder / "x.nii.gz", voxels(0, (30, 30, 30)))),
                     "unreadable", "damaged"),
    "no image": (lambda folder: text(folder / "x.nii.gz"), "unreadable", "cannot be read"),
    "all zero": (lambda folder: image(folder / "x.nii.gz", np.zeros(SHAPE, np.int16)), "empty", "every voxel is 0"),
    "constant": (lambda folder: image(folder / "x.nrrd", np.full(SHAPE, -1024.0)), "constant", "every voxel is -1024"),
    "nan": (lambda folder: image(folder / "x.mha", nan_voxel()), "non_finite", "1 of 336 voxels"),
    "inf": (lambda folder: image(folder / "x.nrrd", np.full(SHAPE, np.inf)), "non_finite", "336 of 336"),
    "nan in nifti": (lambda folder: image(folder / "x.nii.gz", nan_voxel()), "non_finite_zeroed", "1 stored voxels"),
    "4d": (lambda folder: four_dimensional(folder / "x.nii.gz"), "4d", "2 volumes, the dataset has 1 channel"),
    "zero spacing": (lambda folder: set_spacing(image(folder / "x.nii"), 0.0), "spacing", r"\(0\.0, 1\.0, 2\.0\)"),
    "nan spacing": (lambda folder: set_spacing(image(folder / "x.nii"), np.nan), "spacing", "nan"),
    "negative spacing": (lambda folder: set_spacing(image(folder / "x.nii"), -1.0), "spacing", "turn positive"),
    "metres": (lambda folder: image(folder / "x.nrrd", geometry=replace(GEOMETRY, spacing=(1e-4, 1e-3, 1e-3))),
               "spacing", "plausible"),
    "micrometres": (lambda folder: image(folder / "x.nrrd", geometry=replace(GEOMETRY, spacing=(2000.0, 1.0, 1.0))),
                    "spacing", "plausible"),
    "too long": (lambda folder: image(folder / "x.nrrd", voxels(0, (60, 4, 4)), replace(GEOMETRY, spacing=(99., 1, 1))),
                 "spacing", "span more than 5 m"),
}  # fmt: skip


def test_nifti_of_nan_alone_is_empty_for_the_reader(tmp_path: Path) -> None:
    path = image(tmp_path / "x.nii", np.full(SHAPE, np.nan))
    assert [p.kind for p in read_checked(Case(case_id="c", images=(path,)), 1).problems] == [
        "non_finite_zeroed",
        "empty",
    ]


def touched(path: Path) -> Path:
    path.touch()
    return path


def text(path: Path) -> Path:
    path.write_text("<html>404</html>" * 40)
    return path


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_its_reason(tmp_path: Path, name: str) -> None:
    make, kind, reason = BAD_FILES[name]
    path = make(tmp_path)
    checked = read_checked(Case(case_id="c", images=(path,)), 1)
    assert [(problem.case_id, problem.file, problem.kind) for problem in checked.problems] == [("c", path, kind)]
    assert re.search(reason, str(checked.problems[0]))
    assert bool(checked.hashes) == (kind in ("empty", "constant", "non_finite", "non_finite_zeroed", "spacing"))


@pytest.mark.parametrize("spacing", [(5.0, 0.5, 0.5), (0.05, 0.01, 0.01), (1.0, 1.0, 1.0)])
def test_sound_oblique_volume_passes(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    oblique = Geometry(spacing=spacing, origin=(1, 2, 3), direction=(0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    checked = read_checked(Case(case_id="c", images=(image(tmp_path / "x.nii.gz", geometry=oblique),)), 1)
    assert checked.problems == []
    assert checked.image is not None
    assert checked.hashes == (content_hash(checked.image[0]),)
    assert checked.geometry is not None
    assert checked.geometry.spacing == pytest.approx(spacing)


def channels(tmp_path: Path, second: Path, num_channels: int = 2) -> list[Problem]:
    return read_checked(Case(case_id="c", images=(image(tmp_path / "a_0000.nii.gz"), second)), num_channels).problems


def test_channels_that_do_not_lie_on_each_other(tmp_path: Path) -> None:
    assert channels(tmp_path, image(tmp_path / "bb_0001.nii.gz")) == []
    shape = channels(tmp_path, image(tmp_path / "c_0001.nii.gz", voxels(0, (6, 8, 8))))
    moved = channels(tmp_path, image(tmp_path / "d_0001.nii.gz", geometry=replace(GEOMETRY, origin=(3.0, 4.0, 6.0))))
    scaled = channels(tmp_path, image(tmp_path / "e_0001.nii.gz", geometry=replace(GEOMETRY, spacing=(2.1, 1.0, 1.0))))
    for problems, name in ((shape, "c"), (moved, "d"), (scaled, "e")):
        assert [(problem.kind, problem.file.name) for problem in problems] == [("channels", f"{name}_0001.nii.gz")]
    (count,) = channels(tmp_path, image(tmp_path / "f_0001.nii.gz"), num_channels=3)
    assert (count.kind, count.reason) == ("channels", "2 channel(s), the dataset has 3")


def test_the_bad_channel_is_the_one_named(tmp_path: Path) -> None:
    bad = image(tmp_path / "b_0001.nii.gz", np.zeros(SHAPE, np.float32))
    assert [(problem.kind, problem.file) for problem in channels(tmp_path, bad)] == [("empty", bad)]


def test_4d_file_with_the_right_number_of_volumes_is_sound(tmp_path: Path) -> None:
    checked = read_checked(Case(case_id="c", images=(four_dimensional(tmp_path / "x.nii.gz"),)), 2)
    assert checked.problems == []
    assert len(set(checked.hashes)) == 2


def with_label(tmp_path: Path, label: Path, values: frozenset[int] = frozenset({0, 1})) -> list[Problem]:
    return read_checked(Case(case_id="c", images=(image(tmp_path / "i.nii.gz"),), label=label), 1, values).problems


def test_label_maps(tmp_path: Path) -> None:
    good = np.random.default_rng(0).integers(0, 2, SHAPE).astype(np.uint8)
    assert with_label(tmp_path, image(tmp_path / "a.nii.gz", good)) == []
    bad = {
        "label_missing": tmp_path / "nothing.nii.gz",
        "label_unreadable": truncated(image(tmp_path / "t.nii.gz", good)),
        "label_values": image(tmp_path / "v.nii.gz", good * 3),
    }
    for kind, path in bad.items():
        assert [(problem.kind, problem.file) for problem in with_label(tmp_path, path)] == [(kind, path)]
    fractions = image(tmp_path / "f.nii.gz", good.astype(np.float32) / 2)
    (problem,) = with_label(tmp_path, fractions)
    assert problem.kind == "label_unreadable"
    assert "no whole numbers" in problem.reason
    smaller = image(tmp_path / "s.nii.gz", good[1:])
    moved = image(tmp_path / "m.nii.gz", good, replace(GEOMETRY, origin=(0.0, 0.0, 0.0)))
    assert [problem.kind for problem in with_label(tmp_path, smaller)] == ["label_geometry"]
    assert [problem.kind for problem in with_label(tmp_path, moved)] == ["label_geometry"]
    assert {*bad, "label_geometry"} < USABLE_KINDS


def test_content_hash_sees_values_and_shape_alone() -> None:
    data = voxels()
    assert content_hash(data) == content_hash(data.astype(np.float64))
    assert content_hash(data) == content_hash(np.asfortranarray(data))
    assert content_hash(data) != content_hash(data.reshape(SHAPE[::-1]))
    changed = data.copy()
    changed[0, 0, 0] = np.nextafter(changed[0, 0, 0], np.float32(np.inf))
    assert content_hash(data) != content_hash(changed)


def test_find_duplicates_compares_every_channel() -> None:
    hashes = {"a": ("1", "2"), "b": ("3",), "c": ("2",), "d": ()}
    assert find_duplicates(hashes) == (("a", "c"),)


def dataset(*cases: Case, labels: dict[str, int | tuple[int, ...]] | None = None) -> Manifest:
    return Manifest("Dataset001_X", Path("/nowhere"), ("MRI",), ".nii.gz", labels, cases)


def case_of(path: Path) -> Case:
    return Case(case_id=path.name.partition(".")[0], images=(path,))


def test_repeated_voxels_name_the_first_case(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.nii.gz", "b.nrrd", "c.nii.gz")]
    hashes = {"a": ("1",), "b": ("1",), "c": ("2",)}
    (problem,) = duplicate_problems(dataset(*map(case_of, paths)), hashes)
    assert str(problem) == f"b: same voxels as a [duplicate] ({tmp_path / 'b.nrrd'})"


def test_equal_voxels_have_equal_hashes_whatever_the_format(tmp_path: Path) -> None:
    same = voxels(99)
    files = [image(tmp_path / "a.nii.gz", same), image(tmp_path / "b.nrrd", same)]
    assert {read_checked(case_of(file), 1).hashes for file in files} == {(content_hash(same),)}


@pytest.mark.parametrize(
    ("depth", "odd", "rest"),
    [({"a": 1, "b": 5, "c": 6}, "a", "volumes"), ({"a": 1, "b": 1, "c": 6}, "c", "2D images")],
)
def test_the_fewer_of_slices_and_volumes_are_odd(depth: dict[str, int], odd: str, rest: str) -> None:
    cases = [Case(case_id=name, images=(Path(name),)) for name in depth]
    (problem,) = find_odd_dimensions(dataset(*cases), depth)
    assert (problem.case_id, problem.kind) == (odd, "2d_among_3d")
    assert rest in problem.reason


@pytest.mark.real_data
def test_real_cases_are_sound(real_data: Path) -> None:
    folder = real_data / "Task04_Hippocampus"
    for path in sorted((folder / "imagesTr").glob("*.nii.gz"))[:10]:
        case = replace(case_of(path), label=folder / "labelsTr" / path.name)
        assert read_checked(case, 1, frozenset({0, 1, 2})).problems == []
