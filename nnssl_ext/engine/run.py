"""What a run is made of and where it lies: its settings, its folder, its identity and what it has seen."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnssl_ext.core.checks import at_least
from nnssl_ext.core.random import generator
from nnssl_ext.core.records import to_dict, write_json
from nnssl_ext.dataset.splits import Split
from nnssl_ext.engine.device import Precision
from nnssl_ext.engine.task import PretrainTrainer
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.preprocessing.store import Store

logger = logging.getLogger(__name__)

CROPS_PER_VALIDATION_CASE = 2
"""Validation sees at least two crops of each case it uses, so that a case can be retrieved from another crop."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
RECORDED_PACKAGES = ("nnssl_ext", "torch", "nnunetv2", "dynamic-network-architectures", "numpy")


ProbeOf = Callable[[Encoder], Mapping[str, float]]
"""From the encoder that is exported, in eval mode, to numbers to log; NaN where one cannot be told."""


@dataclass(frozen=True)
class TrainedOn:
    """What a run trains on, wherever else it lies."""

    hashes: frozenset[str] = frozenset()
    """Of the contents of its images."""
    patients: frozenset[str] = frozenset()
    """Its patients, as far as they are known."""


Probe = Callable[[Sequence[str], TrainedOn], ProbeOf]
"""A probe for a run that holds out these cases and trains on others; a ValueError, before the first step, where there
are too few cases to look at."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run is carried out, as opposed to what is learned, which the trainer says."""

    seed: int = 0
    """Seed of initialisation, split, crops, views and dropout."""
    device: str = "cpu"
    """`cpu`, `cuda`, or `cuda:N`."""
    precision: Precision = "auto"
    """`bf16`, `fp16`, `fp32`, or `auto`: what the device has."""
    compile: bool = False
    """Whether torch.compile compiles the forward pass."""
    channels_last: bool | None = None
    """Whether tensors lie in memory with the channels last; None: on a CPU, where it saves a fifth of a step's time."""
    deterministic: bool = False
    """Whether only deterministic kernels are used, so that a resumed run on a GPU is bitwise the same."""
    num_workers: int = 0
    """Processes that read crops, on each rank; 0 reads in the training process."""
    save_every: int = 10
    """Epochs between two checkpoints, 1 or more."""
    probe_every: int = 0
    """Epochs between two probes of the features by labels, 0 or more; 0: never. The last epoch is then probed too."""
    tensorboard: bool = True
    """Whether to write TensorBoard events."""

    def __post_init__(self) -> None:
        at_least(self, save_every=1, num_workers=0, seed=0, probe_every=0)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that `pretrain` needs."""

    trainer: PretrainTrainer
    """The resolved recipe."""
    plan: Plan
    """The plans."""
    configuration: Configuration
    """The configuration of the plans that is trained on."""
    data_folder: Path
    """The preprocessed configuration."""
    folder: Path
    """Where the run goes."""
    settings: RunSettings = field(default_factory=RunSettings)
    """How it is carried out."""
    resume: bool = False
    """Whether to go on with a run that is there."""
    probe: Probe | None = None
    """How features are probed; None: they are not, whatever the settings say."""
    memory_gb: float | None = None
    """Memory of the device in GiB; None where nobody asked."""

    @property
    def title(self) -> str:
        """The run's name for logs and pictures."""
        return f"{type(self.trainer).__name__} on {self.plan.dataset_name}, {self.configuration.name}"


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def latest(self) -> Path:
        """Checkpoint to resume from."""
        return self.path / "checkpoint_latest.pth"

    @property
    def best(self) -> Path:
        """Checkpoint with the lowest validation loss."""
        return self.path / "checkpoint_best.pth"

    @property
    def final(self) -> Path:
        """Checkpoint of the finished run, in its released form."""
        return self.path / "checkpoint_final.pth"

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.json"

    @property
    def splits(self) -> Path:
        """The cases trained on and those held out."""
        return self.path / "splits.json"

    @property
    def hashes(self) -> Path:
        """Content hashes of every case that the run has seen, without names or paths."""
        return self.path / "pretraining_cases.json"

    @property
    def log(self) -> Path:
        """The log."""
        return self.path / "training_log.txt"


def validation_cases(cases: Sequence[str], num_crops: int, seed: int) -> tuple[str, ...]:
    """The held-out cases that an epoch's validation looks at: all, or as many as can be shown twice.

    Args:
        cases: Held out.
        num_crops: Validation crops an epoch over all ranks.
        seed: Of the run.
    """
    most = max(num_crops // CROPS_PER_VALIDATION_CASE, 1)
    order = generator(seed, "validation cases").permutation(len(cases))[:most]
    return tuple(cases[position] for position in sorted(order))


def content_hashes(store: Store, split: Split) -> list[str]:
    """Hashes of the raw voxels of every case that the run sees, validation included, sorted."""
    return sorted({code for case_id in (*split.train, *split.val) for code in store.entries[case_id].content_hashes})


def trained_on(store: Store, split: Split) -> TrainedOn:
    """Images and patients of the training cases; a patient of whom nothing is known has the name of the case."""
    entries = [store.entries[case_id] for case_id in split.train]
    hashes = frozenset(code for entry in entries for code in entry.content_hashes)
    return TrainedOn(hashes, frozenset(entry.subject for entry in entries if entry.subject != entry.case_id))


def identity(spec: RunSpec, world_size: int, precision: str) -> dict[str, Any]:
    """What decides a run's numbers. A resumed run must agree in all of it.

    The same samples may be spread differently over ranks and accumulated batches, so only their product counts.
    """
    recipe = to_dict(spec.trainer)
    accumulate = recipe.pop("accumulate")
    return {
        "trainer": type(spec.trainer).__name__,
        "recipe": recipe,
        "dataset": spec.plan.dataset_name,
        "plans": spec.plan.plans_name,
        "configuration": spec.configuration.name,
        "patch_size": list(spec.configuration.patch_size),
        "architecture": spec.configuration.architecture,
        "samples_per_step": spec.configuration.batch_size * world_size * accumulate,
        "seed": spec.settings.seed,
        "precision": precision,
    }


def write_config(folder: RunFolder, spec: RunSpec, world_size: int, precision: str) -> None:
    """Write `config.json`: the run's identity, how it is carried out, the command and the versions."""
    content = {
        **identity(spec, world_size, precision),
        "batch_size": spec.configuration.batch_size,
        "accumulate": spec.trainer.accumulate,
        "world_size": world_size,
        "settings": to_dict(spec.settings),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
    }
    write_json(folder.config, content)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the package's log to a file for the length of a block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger("nnssl_ext")
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
