"""Everything that speaks against a run is found here, before its first step and before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from nnssl_ext.core.records import read_json
from nnssl_ext.dataset.splits import Split, split_by_subject
from nnssl_ext.engine.device import resolve_device, resolve_precision
from nnssl_ext.engine.distributed import World
from nnssl_ext.engine.run import ProbeOf, RunFolder, RunSpec, identity, trained_on
from nnssl_ext.engine.task import PretrainTrainer
from nnssl_ext.planners.plan import Configuration
from nnssl_ext.planners.rules import FULL_PRECISION_BYTES, MEASURES, MIXED_PRECISION_BYTES, estimate_memory
from nnssl_ext.preprocessing.store import Store

MIN_CASES = 2


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against."""

    folder: RunFolder
    """Where it goes."""
    store: Store
    """Its data."""
    split: Split
    """Its cases."""
    device: torch.device
    """Where this process trains."""
    precision: str
    """The resolved precision."""
    finished: bool
    """Whether it has already been trained to the end."""
    probe: ProbeOf | None
    """How features are probed; None: they are not."""


def prepare(spec: RunSpec, world: World) -> Prepared:
    """Check everything that can be refused before the first step; write nothing.

    Args:
        spec: The run.
        world: This process among those that will train.

    Raises:
        ValueError: For a run that is there already, other settings than those it was started with, a patch that is not
            divisible, too few cases or patients, other channels than the network's, a device that is not there, too
            little memory, or a probe that has too few cases.
        FileNotFoundError: Where the data is not preprocessed.
    """
    folder = RunFolder(spec.folder)
    check_existing(folder, spec.resume)
    device = resolve_device(spec.settings.device, world)
    precision = resolve_precision(spec.settings.precision, device)
    check_identity(folder, identity(spec, world.size, precision))
    check_patch(spec.configuration)
    finished = folder.final.exists()
    if not finished:
        check_memory(spec, precision)
    store = Store.open(spec.data_folder)
    check_channels(store, spec.configuration)
    split = load_or_make_split(spec, store, folder)
    probe = (
        spec.probe(split.val, trained_on(store, split))
        if spec.probe is not None and spec.settings.probe_every
        else None
    )
    return Prepared(folder, store, split, device, precision, finished, probe)


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
    if spec.memory_gb is None or configuration.architecture["network_class_name"] not in MEASURES:
        return
    needed = estimate_memory(
        configuration.architecture,
        configuration.patch_size,
        configuration.batch_size,
        spec.trainer.step_cost(configuration),
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
                f"has {configuration.num_input_channels}. Preprocess with these plans: "
                "nnssl_preprocess -d DATASET --overwrite"
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
    subject_of = patients(store)
    num_subjects = len(set(subject_of.values()))
    if num_subjects < MIN_CASES:
        raise ValueError(
            f"All {len(subject_of)} cases belong to one patient or are copies, so the validation split would be empty: "
            "patients are never divided. Add patients, or correct the subjects in pretrain_data.json."
        )
    return split_by_subject(subject_of, trainer.val_fraction, seed)


def patients(store: Store) -> dict[str, str]:
    """Case id to patient. Patients that have an image in common, by content, count as one."""
    one: dict[str, str] = {}

    def root(name: str) -> str:
        while name in one:
            name = one[name]
        return name

    owner: dict[str, str] = {}
    for entry in store.entries.values():
        for code in entry.content_hashes:
            known, own = root(owner.setdefault(code, entry.subject)), root(entry.subject)
            if known != own:
                one[own] = known
    return {case_id: root(entry.subject) for case_id, entry in store.entries.items()}


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
