"""The environment variables that nnU-Net reads, set from ours."""

from __future__ import annotations

import os
from pathlib import Path

KINDS = ("raw", "preprocessed", "results")
TRAINER_VARIABLE = "nnUNet_extTrainer"
"""Folders in which nnU-Net looks for trainers that it does not have itself."""
SHIM_FOLDER = Path(__file__).resolve().parents[1] / "nnunet_shim"


def use_nnunet_environment() -> None:
    """Sets `nnUNet_raw`, `nnUNet_preprocessed` and `nnUNet_results` for this process where only ours are set.

    Raises:
        ValueError: If neither of a pair is set.
    """
    for kind in KINDS:
        ours, theirs = os.environ.get(f"nnssl_{kind}"), os.environ.get(f"nnUNet_{kind}")
        if not ours and not theirs:
            raise ValueError(
                f"neither nnUNet_{kind} nor nnssl_{kind} is set. Say where the {kind} data should live, for example: "
                f"export nnUNet_{kind}=$HOME/nnunet/{kind}"
            )
        if not theirs:
            os.environ[f"nnUNet_{kind}"] = str(Path(str(ours)).expanduser())
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def nnunet_root(kind: str) -> Path:
    """nnU-Net's folder of one kind: `raw`, `preprocessed` or `results`; fine-tuning happens there.

    Raises:
        ValueError: If neither nnU-Net's nor our variable is set.
    """
    use_nnunet_environment()
    return Path(os.environ[f"nnUNet_{kind}"]).expanduser()


def exports() -> dict[str, str]:
    """What a shell should export so that nnU-Net's own commands find the data and `-tr SSLFinetuneTrainer`.

    Folders already listed in `nnUNet_extTrainer` stay.

    Raises:
        ValueError: If a folder is set neither for nnU-Net nor for us.
    """
    variables = {f"nnUNet_{kind}": str(nnunet_root(kind)) for kind in KINDS}
    folders = [folder for folder in os.environ.get(TRAINER_VARIABLE, "").split(os.pathsep) if folder]
    shim = str(SHIM_FOLDER)
    variables[TRAINER_VARIABLE] = os.pathsep.join([*(f for f in folders if f != shim), shim])
    variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
    return variables
