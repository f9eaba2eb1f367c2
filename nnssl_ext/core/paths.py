"""Where datasets, preprocessed volumes and results live: the environment, dataset names and run folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

DATASET_PATTERN = re.compile(r"Dataset(\d{3})_(\w[\w-]*)")
MAX_DATASET_ID = 999


def _root(kind: str) -> Path:
    for variable in (f"nnssl_{kind}", f"nnUNet_{kind}"):
        value = os.environ.get(variable)
        if value:
            return Path(value).expanduser()
    raise ValueError(
        f"neither nnssl_{kind} nor nnUNet_{kind} is set. Say where the {kind} data should live, "
        f"for example: export nnssl_{kind}=$HOME/nnssl/{kind}"
    )


def raw_root() -> Path:
    """Folder of the raw datasets: `$nnssl_raw`, else `$nnUNet_raw`.

    Raises:
        ValueError: If neither variable is set.
    """
    return _root("raw")


def preprocessed_root() -> Path:
    """Folder of fingerprints, plans and stores: `$nnssl_preprocessed`, else `$nnUNet_preprocessed`.

    Raises:
        ValueError: If neither variable is set.
    """
    return _root("preprocessed")


def results_root() -> Path:
    """Folder of the runs: `$nnssl_results`, else `$nnUNet_results`.

    Raises:
        ValueError: If neither variable is set.
    """
    return _root("results")


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """`DatasetXXX_Name`, nnU-Net's folder name of a dataset.

    Raises:
        ValueError: If the id is outside 1..999 or the name is not a plain word.
    """
    folder = f"Dataset{dataset_id:03d}_{name}"
    if not 1 <= dataset_id <= MAX_DATASET_ID or not DATASET_PATTERN.fullmatch(folder):
        raise ValueError(
            f"dataset {dataset_id} with name {name!r} is not allowed: the id is 1 to {MAX_DATASET_ID}, "
            "the name is made of letters, digits, '_' and '-'"
        )
    return folder


def _candidates(dataset: int | str, root: Path) -> list[Path]:
    text = str(dataset)
    folders = sorted(p for p in root.glob("Dataset*") if p.is_dir() and DATASET_PATTERN.fullmatch(p.name))
    if text.isdigit():
        return [p for p in folders if int(p.name[7:10]) == int(text)]
    return [p for p in folders if p.name == text]


def find_dataset(dataset: int | str, root: Path) -> Path:
    """The folder of a dataset beneath one root.

    Args:
        dataset: An id (`4`, `"4"`, `"004"`) or a full name (`"Dataset004_Hippocampus"`).
        root: One of the three roots.

    Raises:
        FileNotFoundError: If there is none; the message lists what is there.
        ValueError: If several folders have that id.
    """
    found = _candidates(dataset, root)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"several datasets in {root} have id {dataset}: {names}. Use the full name, or rename one")
    present = ", ".join(sorted(p.name for p in root.glob("Dataset*"))) or "no dataset"
    if not root.is_dir():
        present = "no such folder"
    raise FileNotFoundError(
        f"no dataset {dataset!r} in {_named(root)} ({present}). Convert one first, for example: "
        "nnssl_convert folder SOURCE -d 1 --name MyScans"
    )


def _named(root: Path) -> str:
    """A root behind the variables that point to it, for messages."""
    names = (f"{family}_{kind}" for family in ("nnssl", "nnUNet") for kind in ("raw", "preprocessed", "results"))
    pointing = [f"${name}" for name in names if (value := os.environ.get(name)) and Path(value).expanduser() == root]
    return " = ".join([*pointing, str(root)])


def find_dataset_name(dataset: int | str) -> str:
    """The full name of a dataset that is in the raw or in the preprocessed root.

    Raises:
        FileNotFoundError: If it is in neither.
        ValueError: If several datasets have that id, or neither root is set.
    """
    raw, preprocessed = raw_root(), preprocessed_root()
    names = {p.name for root in (raw, preprocessed) for p in _candidates(dataset, root)}
    if len(names) > 1:
        raise ValueError(f"id {dataset} belongs to several datasets: {', '.join(sorted(names))}. Use the full name")
    return names.pop() if names else find_dataset(dataset, raw).name


def run_name(trainer: str, plans_name: str, configuration: str) -> str:
    """`TRAINER__PLANS__CONFIGURATION`, the folder name of a run."""
    return f"{trainer}__{plans_name}__{configuration}"


def run_folder(dataset_name: str, trainer: str, plans_name: str, configuration: str, fold: int | str = "all") -> Path:
    """`$nnssl_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_FOLD`.

    Raises:
        ValueError: If the results root is not set.
    """
    return results_root() / dataset_name / run_name(trainer, plans_name, configuration) / f"fold_{fold}"


def plans_in(folder: Path) -> str:
    """Names of the plans in a dataset's preprocessed folder, for messages."""
    names = sorted(path.stem for path in folder.glob("*Plans*.json") if not path.stem.endswith("_report"))
    return ", ".join(names) or "none"
