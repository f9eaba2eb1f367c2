from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnssl_ext.imageio import Geometry, read_header, read_image, read_segmentation, reader_name_for, write_image

OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
SHAPE = (5, 7, 6)


def make(path: Path, shape: tuple[int, ...] = SHAPE, dtype: str = "float32", oblique: bool = True) -> Path:
    voxels = np.random.default_rng(len(path.name)).integers(-100, 100, shape).astype(dtype)
    image = sitk.GetImageFromArray(voxels, isVector=False)
    if len(shape) == 3:
        image.SetSpacing((0.7, 0.8, 3.0))
        image.SetOrigin((-10.0, 20.5, 3.0))
        if oblique:
            image.SetDirection(OBLIQUE)
    sitk.WriteImage(image, str(path), True)
    return path


def reader_class(name: str) -> type:
    return {"SimpleITKIO": SimpleITKIO, "NaturalImage2DIO": NaturalImage2DIO, "Tiff3DIO": Tiff3DIO}[name]


def assert_as_nnunet(files: list[Path], ending: str) -> None:
    data, geometry = read_image(files)
    reference, properties = reader_class(reader_name_for(ending, files[0]))().read_images([str(file) for file in files])
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data, reference)
    ours = geometry.to_nnunet_properties()
    np.testing.assert_allclose(ours["spacing"], properties["spacing"], rtol=1e-12)
    assert ("sitk_stuff" in ours) == ("sitk_stuff" in properties)
    for key, value in properties.get("sitk_stuff", {}).items():
        np.testing.assert_allclose(ours["sitk_stuff"][key], value, rtol=1e-12)
    header = read_header(files[0])
    assert (header.num_components * len(files), *header.shape) == data.shape
    assert header.spacing == pytest.approx(geometry.spacing)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_volumes_are_read_as_nnunet_reads_them_oblique_and_anisotropic(tmp_path: Path, ending: str) -> None:
    assert_as_nnunet([make(tmp_path / f"x{ending}")], ending)
    data, geometry = read_image([tmp_path / f"x{ending}"])
    assert data.shape == (1, *SHAPE)
    assert geometry.spacing == pytest.approx((3.0, 0.8, 0.7))
    assert geometry.direction == pytest.approx(OBLIQUE)


def test_channels_are_stacked_in_order(tmp_path: Path) -> None:
    files = [make(tmp_path / "a_0000.nii.gz"), make(tmp_path / "aa_0001.nii.gz")]
    assert_as_nnunet(files, ".nii.gz")
    data, _ = read_image(files)
    np.testing.assert_array_equal(data[1], read_image([files[1]])[0][0])


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_flat_itk_image_gets_one_slice_and_a_huge_slice_distance(tmp_path: Path, ending: str) -> None:
    path = make(tmp_path / f"flat{ending}", (9, 8))
    assert_as_nnunet([path], ending)
    assert read_image([path])[0].shape == (1, 1, 9, 8)
    assert read_image([path])[1].spacing == (999.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "mode", "channels"),
    [("g.png", "L", 1), ("rgb.png", "RGB", 3), ("rgba.png", "RGBA", 4), ("p.png", "P", 3), ("i.png", "I;16", 1),
     ("g.bmp", "L", 1), ("g.tif", "L", 1), ("rgb.tif", "RGB", 3)],
)  # fmt: skip
def test_pictures_are_read_as_nnunet_reads_them(tmp_path: Path, name: str, mode: str, channels: int) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (11, 13), dtype=np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 99) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / name)
    assert_as_nnunet([tmp_path / name], Path(name).suffix)
    assert read_image([tmp_path / name])[0].shape == (channels, 1, 11, 13)


@pytest.mark.parametrize("planar", [True, False])
def test_colour_tiff_of_either_layout(tmp_path: Path, planar: bool) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (3, 11, 13), dtype=np.uint8)
    path = tmp_path / "c.tif"
    if planar:
        tifffile.imwrite(path, colours, planarconfig="separate", photometric="rgb")
    else:
        tifffile.imwrite(path, colours.transpose(1, 2, 0), photometric="rgb")
    assert_as_nnunet([path], ".tif")
    np.testing.assert_array_equal(read_image([path])[0][:, 0], colours)


def test_tiff_volume_takes_its_spacing_from_the_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "v_0000.tif"
    tifffile.imwrite(path, np.random.default_rng(0).normal(size=(4, 6, 5)).astype("float32"), photometric="minisblack")
    assert_as_nnunet([path], ".tif")
    assert read_image([path])[1].spacing == (1.0, 1.0, 1.0)
    (tmp_path / "v.json").write_text('{"spacing": [3, 0.5, 0.5]}')
    assert_as_nnunet([path], ".tif")
    assert read_header(path).spacing == (3.0, 0.5, 0.5)
    (tmp_path / "v.json").write_text('{"spacing": [3]}')
    with pytest.raises(ValueError, match=r"v\.json must hold"):
        read_header(path)


def test_volumes_of_a_4d_file_are_channels_with_a_3d_geometry(tmp_path: Path) -> None:
    path = make(tmp_path / "4d.nii.gz", (3, *SHAPE))
    data, geometry = read_image([path])
    reference, properties = SimpleITKIO().read_images([str(path)])
    np.testing.assert_array_equal(data, reference)
    assert list(geometry.spacing) == properties["spacing"]
    assert len(geometry.origin) == 3
    assert len(geometry.direction) == 9
    assert read_header(path).num_components == 3


def truncate(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_truncated_volume_is_refused_and_named(tmp_path: Path, ending: str) -> None:
    path = truncate(make(tmp_path / f"x{ending}", (20, 20, 20)))
    with pytest.raises(ValueError, match=r"x\.n|x\.m"):
        read_image([path])


def test_itk_itself_reads_a_truncated_nifti_as_zeros(tmp_path: Path) -> None:
    path = truncate(make(tmp_path / "x.nii", (20, 20, 20)))
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[-5:] == 0).all()  # why check_whole is there


def test_gzip_of_several_members_is_whole(tmp_path: Path) -> None:
    plain = make(tmp_path / "x.nii").read_bytes()
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    np.testing.assert_array_equal(read_image([tmp_path / "x.nii.gz"])[0], read_image([tmp_path / "x.nii"])[0])


def test_a_text_file_called_nifti_is_refused(tmp_path: Path) -> None:
    """Catches an error of the header's reader that names neither the file nor what is wrong with it."""
    (tmp_path / "text.nii").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.nii cannot be read: it has no NIfTI header"):
        read_image([tmp_path / "text.nii"])


@pytest.mark.parametrize("name", ["e.nii.gz", "e.nrrd", "e.mha", "e.png", "e.tif"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is an empty file"):
        read_image([tmp_path / name])


@pytest.mark.parametrize("name", ["e.nii.gz", "e.nrrd", "e.mha", "e.png", "e.bmp", "e.tif"])
def test_file_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no image" * 100)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_image([tmp_path / name])


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_truncated_picture_is_refused(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_image([truncate(tmp_path / name, 0.7)])


def test_itk_reads_no_mha_in_capitals(tmp_path: Path) -> None:
    path = make(tmp_path / "x.mha").rename(tmp_path / "x.MHA")
    with pytest.raises(ValueError, match=r"Rename it to end in \.mha"):
        read_image([path])


def test_vector_and_complex_images_are_refused(tmp_path: Path) -> None:
    vectors = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.float32), isVector=True)
    sitk.WriteImage(vectors, str(tmp_path / "v.nii.gz"))
    with pytest.raises(ValueError, match=r"v\.nii\.gz holds 3 values per voxel"):
        read_image([tmp_path / "v.nii.gz"])
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(SHAPE, np.complex64)), str(tmp_path / "c.nii.gz"))
    with pytest.raises(ValueError, match="complex"):
        read_image([tmp_path / "c.nii.gz"])


def test_skewed_affine_is_refused(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.3
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), affine)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "s.nii.gz")
    with pytest.raises(ValueError, match="orthonormal"):
        read_image([tmp_path / "s.nii.gz"])


def test_channels_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    first, other = make(tmp_path / "a.nii.gz"), make(tmp_path / "b.nii.gz", (5, 7, 5))
    with pytest.raises(ValueError, match="differ in shape"):
        read_image([first, other])
    write_image(np.zeros(SHAPE, np.float32), Geometry(spacing=(1.0, 1.0, 1.0)), tmp_path / "c.nii.gz")
    with pytest.raises(ValueError, match="differ in spacing"):
        read_image([first, tmp_path / "c.nii.gz"])


def test_missing_file_no_file_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image([tmp_path / "nothing.nii.gz"])
    with pytest.raises(ValueError, match="no image file"):
        read_image([])
    (tmp_path / "x.jpg").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"Readable: \.nii\.gz"):
        read_image([tmp_path / "x.jpg"])
    with pytest.raises(ValueError, match="no reader knows"):
        reader_name_for(".jpg")


def test_five_dimensions_that_are_used_are_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5, 2, 2), np.float32), np.eye(4)), tmp_path / "5d.nii.gz")
    with pytest.raises(ValueError, match="has 5 dimensions"):
        read_image([tmp_path / "5d.nii.gz"])


def test_segmentation_is_small_integers(tmp_path: Path) -> None:
    geometry = Geometry(spacing=(1.0, 1.0, 1.0))
    write_image(np.full(SHAPE, 3, np.float32), geometry, tmp_path / "s.nii.gz")
    labels, _ = read_segmentation(tmp_path / "s.nii.gz")
    assert labels.dtype == np.uint8
    assert (labels == 3).all()
    write_image(np.full(SHAPE, -1, np.int16), geometry, tmp_path / "n.nii.gz")
    assert read_segmentation(tmp_path / "n.nii.gz")[0].dtype == np.int16
    write_image(np.full(SHAPE, 0.5, np.float32), geometry, tmp_path / "f.nii.gz")
    with pytest.raises(ValueError, match="no whole numbers"):
        read_segmentation(tmp_path / "f.nii.gz")
    write_image(np.full(SHAPE, 1e6, np.float32), geometry, tmp_path / "b.nii.gz")
    with pytest.raises(ValueError, match="32767 are possible"):
        read_segmentation(tmp_path / "b.nii.gz")
    with pytest.raises(ValueError, match="2 channels"):
        read_segmentation(make(tmp_path / "4d.nii.gz", (2, *SHAPE)))


def test_damaged_voxel_size_differs_from_what_itk_reads(tmp_path: Path) -> None:
    from nnssl_ext.imageio.nifti import stored_spacing

    path = make(tmp_path / "x.nii", oblique=False)
    content = bytearray(path.read_bytes())
    content[80:84] = struct.pack("<f", 0.0)
    path.write_bytes(content)
    assert stored_spacing(path)[0] == 0.0
    assert read_header(path).spacing[2] != 0.0


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    path = make(tmp_path / "x.nii.gz")
    code = (
        "import sys, pathlib; from nnssl_ext.imageio import read_image; "
        f"read_image([pathlib.Path({str(path)!r})]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real_data
def test_real_volumes_are_read_as_nnunet_reads_them(real_data: Path) -> None:
    for path in sorted((real_data / "volumes").glob("*.nii.gz")):
        assert_as_nnunet([path], ".nii.gz")
