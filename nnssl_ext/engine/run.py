"""What a run is made of and where it lies: settings, folder, patients, and the refusals before it starts."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from nnssl_ext.core.random import generator
from nnssl_ext.core.records import read_json, to_dict, write_json
from nnssl_ext.dataset.splits import Split, split_by_subject
from nnssl_ext.engine.device import Precision
from nnssl_ext.engine.task import PretrainTrainer
from nnssl_ext.planners.architecture import RESENC_CLASS
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.planners.rules import FULL_PRECISION_BYTES, MIXED_PRECISION_BYTES, estimate_memory
from nnssl_ext.preprocessing.store import Store

logger = logging.getLogger(__name__)

MIN_CASES = 2
CROPS_PER_VALIDATION_CASE = 2
"""Validation sees at least two crops of each case it uses, so that a case can be retrieved from another crop."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
RECORDED_PACKAGES = ("nnssl_ext", "torch", "nnunetv2", "dynamic-network-architectures", "numpy")


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
    picture_every: int = 10
    """Epochs between two pictures of reconstructions, 1 or more; the first and the last epoch always get one."""
    tensorboard: bool = True
    """Whether to write TensorBoard events."""

    def __post_init__(self) -> None:
        for name, least in (("save_every", 1), ("picture_every", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")


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


def check_existing(folder: RunFolder, resume: bool) -> None:
    """Refuse to overwrite a run.

    Raises:
        ValueError: Where a run is there and was not asked to go on.
    """
    if resume:
        return
    for path, state in ((folder.final, "finished"), (folder.latest, "unfinished")):
        if path.exists():
            raise ValueError(
                f"{folder.path} holds {'a' if state == 'finished' else 'an'} {state} run. Go on with it by --c, "
                "train another beside it by -tag NAME, or remove the folder."
            )


def check_patch(configuration: Configuration) -> None:
    """Refuse a patch that the network cannot halve as often as it must.

    Raises:
        ValueError: Where an edge of the patch is no multiple of the product of the strides along its axis.
    """
    if not configuration.strides:
        return
    divisors = [prod(stride[axis] for stride in configuration.strides) for axis in range(configuration.dims)]
    fitting = tuple(max(size // by, 1) * by for size, by in zip(configuration.patch_size, divisors, strict=True))
    if fitting != configuration.patch_size:
        raise ValueError(
            f"patch_size {list(configuration.patch_size)} of configuration {configuration.name!r} is not divisible by "
            f"the network's strides {divisors}. Change it in the plans file, for example to {list(fitting)}."
        )


def check_memory(spec: RunSpec, precision: str) -> None:
    """Refuse a step that cannot fit into the device; a network whose size is not known is let through.

    Raises:
        ValueError: Where the estimate of the planner's rules exceeds the memory.
    """
    configuration = spec.configuration
    if spec.memory_gb is None or configuration.architecture["network_class_name"] != RESENC_CLASS:
        return
    needed = estimate_memory(
        configuration.architecture,
        configuration.patch_size,
        configuration.batch_size,
        spec.trainer.cost,
        num_channels=configuration.num_input_channels,
        bytes_per_value=FULL_PRECISION_BYTES if precision == "fp32" else MIXED_PRECISION_BYTES,
    )
    if needed > spec.memory_gb:
        raise ValueError(
            f"A step needs about {needed:.1f} GB and {spec.settings.device} has {spec.memory_gb:.1f} GB free: patch "
            f"{list(configuration.patch_size)}, batch {configuration.batch_size}, {precision}. Use a smaller "
            f"-batch_size, or plan for this device: nnssl_plan_experiment -d {spec.plan.dataset_name} "
            f"-gpu_memory_target {max(int(spec.memory_gb), 1)}."
        )


def check_channels(store: Store, configuration: Configuration) -> None:
    """Refuse data that was preprocessed with other plans.

    Raises:
        ValueError: Where a case has another number of channels than the network.
    """
    for case_id, entry in store.entries.items():
        if entry.shape[0] != configuration.num_input_channels:
            raise ValueError(
                f"{case_id} in {store.folder} has {entry.shape[0]} channel(s), configuration {configuration.name!r} "
                f"has {configuration.num_input_channels}. Preprocess with these plans: nnssl_preprocess --overwrite"
            )


def split_cases(store: Store, trainer: PretrainTrainer, seed: int) -> Split:
    """Hold out patients for validation.

    Raises:
        ValueError: With fewer than two cases, or where one side of the split would be empty.
    """
    if len(store.entries) < MIN_CASES:
        raise ValueError(
            f"{store.folder} holds {len(store.entries)} preprocessed case(s); pretraining needs {MIN_CASES} or more: "
            "one to train on and one held out. Add cases, then run nnssl_plan_and_preprocess again."
        )
    subject_of = {case_id: entry.subject for case_id, entry in store.entries.items()}
    num_subjects = len(set(subject_of.values()))
    if num_subjects < MIN_CASES:
        raise ValueError(
            f"All {len(subject_of)} cases belong to one patient, so the validation split would be empty: patients "
            "are never divided. Add patients, or correct the subjects in pretrain_data.json."
        )
    return split_by_subject(subject_of, trainer.val_fraction, seed)


def validation_cases(split: Split, num_crops: int, seed: int) -> tuple[str, ...]:
    """The held-out cases that an epoch's validation looks at: all, or as many as can be shown twice.

    Args:
        split: Of the run.
        num_crops: Validation crops an epoch over all ranks.
        seed: Of the run.
    """
    most = max(num_crops // CROPS_PER_VALIDATION_CASE, 1)
    order = generator(seed, "validation cases").permutation(len(split.val))[:most]
    return tuple(split.val[position] for position in sorted(order))


def load_or_make_split(spec: RunSpec, store: Store, folder: RunFolder) -> Split:
    """The split of a run that is there, else a new one.

    Raises:
        ValueError: Where the store lacks cases that the run was trained on.
    """
    if not (spec.resume and folder.splits.exists()):
        return split_cases(store, spec.trainer, spec.settings.seed)
    content = read_json(folder.splits)
    split = Split(train=tuple(content["train"]), val=tuple(content["val"]))
    missing = [case_id for case_id in (*split.train, *split.val) if case_id not in store.entries]
    if missing:
        raise ValueError(
            f"{len(missing)} cases of the run in {folder.path} are no longer in {store.folder}, the first is "
            f"{missing[0]}. Preprocess them again (nnssl_preprocess), or start another run with -tag NAME."
        )
    return split


def content_hashes(store: Store, split: Split) -> list[str]:
    """Hashes of the raw voxels of every case that the run sees, validation included, sorted."""
    return sorted({code for case_id in (*split.train, *split.val) for code in store.entries[case_id].content_hashes})


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


def check_identity(folder: RunFolder, now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        ValueError: Naming every setting that differs, with both values.
    """
    if not folder.config.exists():
        return
    before = read_json(folder.config)
    differences = list(_differences(before, now, ()))
    if differences:
        raise ValueError(
            f"The run in {folder.path} was started with other settings: {'; '.join(differences)}. Resume it with "
            "those, or train another beside it with -tag NAME."
        )


def _differences(before: Any, now: Any, path: Sequence[str]) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [line for name in now for line in _differences(before.get(name), now[name], (*path, name))]
    return [] if before == now else [f"{'.'.join(path)} was {before}, now {now}"]


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
