from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.cli.convert import converters, main
from nnssl_ext.core.history import recorded_commands
from nnssl_ext.imageio import Geometry, write_image


def test_help_names_every_converter_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, nnssl_ext.cli.convert as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'SimpleITK', 'nnunetv2', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("msd", "folder", "Dataset004_Hippocampus"):
        assert name in run.stdout


def test_converters_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots: Path) -> None:
    module = "def convert(source, raw):\n    (raw / 'ran').write_text(str(source))\n    return []\n"
    (tmp_path / "Dataset042_Mine.py").write_text(module)
    monkeypatch.setattr("dataset_conversion.__path__", [str(tmp_path)])
    assert converters() == ["Dataset042_Mine"]
    main(["Dataset042_Mine", "somewhere"])
    assert (roots / "raw" / "ran").read_text() == "somewhere"


def test_folder_tells_what_it_made(tmp_path: Path, roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (tmp_path / "scans").mkdir(exist_ok=True)
        write_image(np.full((3, 4, 5), i), Geometry(spacing=(1, 1, 1)), tmp_path / "scans" / f"sub-{i // 2}_{i}.nii.gz")
    main(["folder", str(tmp_path / "scans"), "-d", "1", "--name", "Mine"])
    assert capsys.readouterr().out == f"{roots / 'raw' / 'Dataset001_Mine'}: 3 cases of 2 patients, 0 with labels\n"
    assert len(recorded_commands(roots / "raw" / "Dataset001_Mine")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "/nowhere", "-d", "1", "--name", "X"], "error: /nowhere is not a folder"),
        (["msd", "/nowhere", "-d", "1"], "error: /nowhere has no dataset.json"),
        (["folder", "/nowhere", "-d", "1000", "--name", "X"], "the id is 1 to 999"),
        (["folder", "/nowhere", "-d", "1"], "required: --name"),
        (["msd", "/nowhere", "-d", "1", "--unlabeled", "3"], "unrecognized arguments"),
        ([], "required: LAYOUT"),
        (["zip", "x"], "invalid choice"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(
    arguments: list[str], message: str, roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_unset_environment_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nnssl_raw", "nnUNet_raw"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        main(["folder", str(tmp_path), "-d", "1", "--name", "X"])
    assert "export nnssl_raw=" in capsys.readouterr().err


@pytest.mark.real_data
def test_hippocampus_in_two_parts(real_data: Path, roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(real_data / "Task04_Hippocampus")
    arguments = ["msd", source, "-d", "4", "--unlabelled", "60", "--unlabelled_dataset", "1", "-np", "1"]
    for _ in range(2):  # a repetition changes nothing
        main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("Dataset004_Hippocampus: 70 cases of 70 patients, 70 with labels")
        assert lines[1].endswith("Dataset001_HippocampusUnlabelled: 60 cases of 60 patients, 0 with labels")
    names = [{p.name for p in (roots / "raw").glob(f"Dataset00{i}_*/imagesTr/*")} for i in (1, 4)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 130
