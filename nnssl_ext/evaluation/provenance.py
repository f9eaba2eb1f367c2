"""Where an arm came from: the pretraining run behind its weights, the commands that made it, the versions in use."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.core.history import recorded_commands
from nnssl_ext.core.paths import preprocessed_root, raw_root, results_root
from nnssl_ext.core.records import read_json
from nnssl_ext.evaluation.arms import PlannedArm
from nnssl_ext.finetuning.sources import RECORD_FILE
from nnssl_ext.finetuning.sources import versions as recorded_versions

if TYPE_CHECKING:
    import torch

HASHES_FILE = "pretraining_cases.json"
CONFIG_FILE = "config.json"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
PACKAGES = (
    "nnssl_ext",
    "nnunetv2",
    "torch",
    "dynamic_network_architectures",
    "batchgeneratorsv2",
    "numpy",
    "scipy",
    "SimpleITK",
)
_ENCODER_PREFIXES = ("encoder.stages.", "eva.")
"""Names of the encoder's tensors in a U-Net and in a Primus."""


def find_pretraining_run(arm: PlannedArm) -> Path | None:
    """The run on this machine that an arm's weights come from, or None.

    It saw exactly the images that the plans name, and holds a checkpoint with the very same encoder weights, since
    several methods may have been pretrained on the same images.
    """
    if arm.config is None or not arm.config.pretraining_content_hashes or arm.config.pretrained_weights is None:
        return None
    wanted = set(arm.config.pretraining_content_hashes)
    weights = arm.plans_path.with_name(arm.config.pretrained_weights)
    for path in sorted(results_root().glob(f"*/*/*/{HASHES_FILE}")):
        if set(read_json(path)["content_hashes"]) == wanted and _holds_weights(path.parent, weights):
            return path.parent
    return None


def _holds_weights(run: Path, weights: Path) -> bool:
    import torch

    own = _encoder(weights)
    for name in CHECKPOINTS:
        found = _encoder(run / name)
        shared = own.keys() & found.keys()
        if shared and all(torch.equal(own[key], found[key]) for key in shared):
            return True
    return False


def _encoder(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        return {}
    state = torch.load(path, map_location="cpu", weights_only=True)["network_weights"]
    return {key: value for key, value in state.items() if key.startswith(_ENCODER_PREFIXES)}


def commands_of(arm: PlannedArm, pretraining_run: Path | None) -> tuple[str, ...]:
    """The commands that made an arm, where they were recorded: from its data to its fine-tuning plan."""
    datasets = [arm.plans_path.parent.name]
    records = [arm.plans_path.with_name(f"{arm.plans_path.stem}_report.json")]
    if pretraining_run is not None:
        datasets.insert(0, pretraining_run.parents[1].name)
        records.insert(0, pretraining_run / CONFIG_FILE)
    folders = [root / name for root in (raw_root(), preprocessed_root()) for name in dict.fromkeys(datasets)]
    prepared = dict.fromkeys(line for folder in folders for line in recorded_commands(folder))
    contents: list[dict[str, Any]] = [read_json(path) for path in records if path.is_file()]
    return (*prepared, *(shlex.join(content["command"]) for content in contents if content.get("command")))


def version_warnings(folders: Sequence[Path]) -> list[str]:
    """A warning where runs were made with other versions than those that are installed now.

    Args:
        folders: Of fold runs and of pretraining runs; one that recorded none tells nothing.
    """
    now = recorded_versions()
    records = [read_json(f / name) for f in folders for name in (RECORD_FILE, CONFIG_FILE) if (f / name).is_file()]
    other = {f"{k} {v}" for record in records for k, v in record.get("versions", {}).items() if now.get(k) != v}
    if not other:
        return []
    return [
        f"Some runs were made with other versions than those named below: {', '.join(sorted(other))}. Numbers of "
        "different versions may differ by themselves."
    ]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    installed = {name: version for name in PACKAGES if (version := _version(name))}
    return {**installed, "python": platform.python_version(), "system": platform.platform()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
