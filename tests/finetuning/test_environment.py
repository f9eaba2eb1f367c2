import os
from pathlib import Path

import pytest

from nnssl_ext.cli import env
from nnssl_ext.finetuning.environment import SHIM_FOLDER, exports, nnunet_root, use_nnunet_environment


@pytest.fixture
def only_ours(roots: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", "undone after the test")
        monkeypatch.delenv(f"nnUNet_{kind}")
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    return roots


def test_nnunet_gets_our_folders_where_it_has_none(only_ours: Path) -> None:
    use_nnunet_environment()
    assert os.environ["nnUNet_raw"] == str(only_ours / "raw")  # noqa: SIM112 - nnU-Net's own spelling
    assert nnunet_root("results") == only_ours / "results"


def test_nnunets_own_folders_come_first(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    assert nnunet_root("raw") == Path("/elsewhere")


def test_a_missing_folder_is_asked_for(only_ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnssl_results")
    with pytest.raises(ValueError, match=r"neither nnUNet_results nor nnssl_results is set.*export nnUNet_results="):
        use_nnunet_environment()


def test_the_shim_is_added_to_other_trainer_folders_once(only_ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/mine", str(SHIM_FOLDER)]))
    assert exports()["nnUNet_extTrainer"] == os.pathsep.join(["/mine", str(SHIM_FOLDER)])


def test_the_command_prints_lines_that_a_shell_can_run(only_ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    lines = capsys.readouterr().out.splitlines()
    assert f"export nnUNet_raw={only_ours}/raw" in lines
    assert f"export nnUNet_extTrainer={SHIM_FOLDER}" in lines
    assert (SHIM_FOLDER / "SSLFinetuneTrainer.py").is_file()
