"""The commands `nnssl_features` and `nnssl_register`, from files to files."""

import numpy as np
import pytest
import torch

from nnssl_ext.cli.features import main as features
from nnssl_ext.cli.register import main as register
from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.imageio import read_image, read_segmentation, write_image, write_segmentation
from nnssl_ext.trainers.mae import MAETrainer
from tests.downstream.test_grids import OBLIQUE


def run(command, *arguments) -> int:
    try:
        command([str(argument) for argument in arguments])
    except SystemExit as status:
        return int(status.code or 0)
    return 0


@pytest.fixture
def scans(tmp_path):
    """Two oblique images with labels; the second has another size."""
    rng = np.random.default_rng(0)
    for name, shape in (("a", (12, 40, 20)), ("b_0000", (11, 42, 24))):
        image = rng.normal(100, 10, shape).astype(np.float32)
        image[3:8, 10:30, 6:14] += 200
        write_image(image, OBLIQUE, tmp_path / f"{name}.nii.gz")
        write_segmentation((image > 250).astype(np.uint8), OBLIQUE, tmp_path / f"{name}_seg.nii.gz")
    return tmp_path


def checkpoint(plan, folder):
    configuration = plan.configuration("3d_fullres")
    trainer = MAETrainer.configured(["block_size=4"], configuration.backbone)
    task = trainer.build_task(configuration, 4).eval()
    save_checkpoint(folder / "final.pth", build_checkpoint(task, trainer, plan, content_hashes=[]))
    return folder / "final.pth"


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_features_of_two_images(request, scans, kind, capsys):
    path = checkpoint(request.getfixturevalue(kind)(), scans)
    out = scans / "seen"
    a, b = scans / "a.nii.gz", scans / "b_0000.nii.gz"
    assert run(features, path, a, b, "-o", out, "--foreground", "--features", "nifti") == 0
    wanted = {f"{name}{end}" for name in "ab" for end in ("_features.nii.gz", "_pca.nii.gz", "_planes.png")}
    wanted |= {f"{name}_attention.nii.gz" for name in "ab"} if "vit" in kind else set()
    assert {file.name for file in out.iterdir()} == wanted
    assert (out / "a_planes.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("red, green and blue") == 1
    for name in ("pca", *(["attention"] if "vit" in kind else [])):
        import SimpleITK as sitk

        overlay = sitk.ReadImage(str(out / f"a_{name}.nii.gz"))
        image = sitk.ReadImage(str(a))
        assert overlay.GetSize()[:3] == image.GetSize()
        assert np.allclose(overlay.GetOrigin()[:3], image.GetOrigin(), atol=1e-4)
    if "vit" in kind:  # the mean over two heads comes first
        heads = read_image([out / "a_attention.nii.gz"])[0]
        assert np.allclose(heads[0], heads[1:].mean(0), atol=2e-3)


def test_mistakes_of_features_are_one_line(tiny_plan, scans, capsys):
    path = checkpoint(tiny_plan(channels=2), scans)
    image = scans / "a.nii.gz"
    torch.save({"weights": 1}, scans / "other.pth")
    for arguments, text in (
        ((path, image), "a has 1 channels, and the checkpoint's network takes 2"),
        ((scans / "none.pth", image), "no checkpoint at"),
        ((scans / "other.pth", image), "holds no network_weights"),
        ((path, image, image), "several images are called a"),
        ((path, image, "--features", "csv"), "use one of npz, nifti, nifti_full, none"),
        ((path, f"{image},{image}", "--level", 9), "level 9 is not there"),
        ((path, image, "--anonymization_masks", image, image), "2 anonymization masks for 1 images"),
    ):
        assert run(features, *arguments, "-o", scans / "out") == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.rstrip().count("\n") == 0
    assert not (scans / "out").exists() or not list((scans / "out").iterdir())


def test_registration_of_files(tiny_plan, scans, capsys):
    path = checkpoint(tiny_plan(), scans)
    out = scans / "out"
    labels = ("--moving_labels", scans / "a_seg.nii.gz", "--fixed_labels", scans / "b_0000_seg.nii.gz")
    images = scans / "a.nii.gz", scans / "b_0000.nii.gz"
    assert run(register, *images, "--checkpoint", path, "-o", out, "--level", 0, "--spacing", 2, *labels) == 0
    names = ("a_to_b_field.nii.gz", "a_to_b.nii.gz", "a_to_b_labels.nii.gz", "a_to_b.png")
    assert {file.name for file in out.iterdir()} == set(names)
    printed = capsys.readouterr().out
    assert "voxels folded:" in printed
    assert "SD of log Jacobian:" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("1 "))
    assert all(0 < float(score) <= 1 for score in line.split()[1:])
    warped, geometry = read_image([out / "a_to_b.nii.gz"])
    assert warped.shape == (1, 11, 42, 24)
    assert geometry.same_place(OBLIQUE)
    assert set(np.unique(read_segmentation(out / "a_to_b_labels.nii.gz")[0])) == {0, 1}


def test_mistakes_of_register_are_one_line(scans, capsys):
    image = scans / "a.nii.gz"
    assert run(register, image, image) == 2
    assert "one of the arguments --checkpoint --mind --none is required" in capsys.readouterr().err
    for arguments, text in (
        (("--mind", "--spacing", 0), "--spacing 0.0 must be above 0"),
        (("--mind", "--fixed_labels", image), "--fixed_labels needs --moving_labels"),
        (("--mind", "--level", 1), "--level chooses a network's feature map: it needs --checkpoint"),
        (("--mind", "--moving_labels", scans / "b_0000_seg.nii.gz"), "do not lie in the same place"),
        (("--none", "--start", "there"), "start 'there' is not known"),
        (("--mind", "--regularization", -1), "regularization=-1.0"),
    ):
        assert run(register, image, image, *arguments, "-o", scans / "out") == 2
        assert text in capsys.readouterr().err
    assert not (scans / "out").exists()  # also the labels are looked at before an image is registered
