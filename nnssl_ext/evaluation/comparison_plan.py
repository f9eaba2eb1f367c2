"""A comparison, checked before anything is trained: data, methods, plans, folds, leaks; and the tasks of its runs.

Every name holds a hash of what its numbers depend on. So what is there is used again, by this comparison and by others,
and what was made otherwise lies elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.paths import find_dataset, preprocessed_root, raw_root, results_root
from nnssl_ext.core.records import to_dict
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split, nested_subsets
from nnssl_ext.engine.task import TRAINERS
from nnssl_ext.evaluation import folds
from nnssl_ext.evaluation.arms import NAME_PREFIX, SEED_FIELD, refuse_seen
from nnssl_ext.evaluation.comparison_settings import ComparisonSettings, Protocol, has_sham
from nnssl_ext.evaluation.leaks import content_hashes, refuse_copies
from nnssl_ext.evaluation.preparation import EVALUATIONS_FOLDER, HASHES_FILE
from nnssl_ext.evaluation.records import NumTrain
from nnssl_ext.finetuning.nnunet_dataset import prepare_dataset
from nnssl_ext.finetuning.nnunet_plans import dataset_splits, parse_settings, read_splits
from nnssl_ext.finetuning.plans_content import configuration_name
from nnssl_ext.finetuning.sources import source_hashes
from nnssl_ext.planners.plan import Configuration, Plan
from nnssl_ext.planners.primus import PRIMUS_SIZES, primus_architecture, token_size, with_patch_size
from nnssl_ext.preprocessing.index import INDEX_FILE
from nnssl_ext.preprocessing.store import Store

SCRATCH = "scratch"
_CODE_LENGTH = 6
_NETWORK_KEYS = ("architecture", "batch_size", "patch_size")
"""Of a configuration: what does not decide how images are prepared."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of pretraining: a trainer on a plan, real or sham."""

    trainer: str
    sham: bool
    protocol: Protocol
    plan: Plan
    configuration: Configuration
    images: str
    """Code of the images that are pretrained on."""

    @property
    def short(self) -> str:
        """Name in plans and files, such as `MAE` or `MAE-sham`."""
        return self.trainer.removesuffix("Trainer") + ("-sham" if self.sham else "")

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        return self.short.replace("-", " ")

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        return self.protocol.batch_size or self.configuration.batch_size

    @property
    def code(self) -> str:
        """Of all that decides a step."""
        return code_of(
            self.trainer,
            self.plan.plans_name,
            self.configuration.name,
            self.configuration.architecture,
            self.configuration.patch_size,
            self.batch_size,
            self.protocol.settings,
            self.preparation,
            self.images,
        )

    @property
    def preparation(self) -> str:
        """Of all that decides how an image is prepared, which fine-tuning and probes take over from the pretraining."""
        prepared = {key: value for key, value in self.configuration.raw.items() if key not in _NETWORK_KEYS}
        intensities = self.plan.raw["foreground_intensity_properties_per_channel"]
        return code_of(self.plan.dataset_name, prepared, self.configuration.transpose_forward, intensities)

    @property
    def network(self) -> str:
        """Of the network that is fine-tuned, which arms from scratch share with it."""
        return code_of(with_patch_size(self.configuration.architecture, ()), self.preparation)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A comparison that nothing speaks against."""

    settings: ComparisonSettings
    dataset: str
    """`DatasetXXX_Name` with labels."""
    pretrain_dataset: str
    manifest: Manifest
    preprocessed: Path
    """The labelled dataset's folder in nnU-Net's preprocessed data."""
    folder: Path
    """Where the results go."""
    methods: tuple[Method, ...]
    """Real ones in the order asked for, then sham ones."""
    splits: tuple[Split, ...]
    folds: tuple[int, ...]
    num_train: tuple[NumTrain, ...]
    patch_size: tuple[int, ...]
    """Of fine-tuning."""
    made_of: Mapping[str, tuple[str, ...]]
    """Hashes of the raw files of every case of the folds."""
    warnings: tuple[str, ...]

    @property
    def configuration(self) -> str:
        """Configuration of the fine-tuning plans."""
        return configuration_name(len(self.patch_size))

    @property
    def networks(self) -> dict[str, Method]:
        """Every network once, with the first method that has it."""
        found: dict[str, Method] = {}
        for method in self.methods:
            found.setdefault(method.network, method)
        return found

    def plans_path(self, method: Method) -> Path:
        """The plans that a method is pretrained with."""
        return preprocessed_root() / self.pretrain_dataset / f"{method.plan.plans_name}.json"

    def scratch_label(self, network: str) -> str:
        """`scratch`, with the kind of the network where there are several."""
        if len(self.networks) == 1:
            return SCRATCH
        kinds = [method.configuration.backbone for method in self.networks.values()]
        kind = self.networks[network].configuration.backbone
        number = "" if kinds.count(kind) == 1 else f" {list(self.networks).index(network) + 1}"
        return f"{SCRATCH} {kind}{number}"

    @property
    def fine_tuned(self) -> tuple[Method, ...]:
        """The methods that are fine-tuned."""
        return tuple(method for method in self.methods if not method.sham or self.settings.sham == "finetune")

    def probe_cases(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Cases that probes learn from and cases that they are scored on, of the first fold."""
        split, probe, subjects = self.splits[self.folds[0]], self.settings.probe, self.manifest.subjects()
        pool, test = (
            nested_subsets(subjects, ids, [min(number, len(ids))], seed=0)[min(number, len(ids))]
            for ids, number in ((split.train, probe.num_pool), (split.val, probe.num_test))
        )
        return pool, test

    def finetuning_code(self, *parts: Any) -> str:
        """Of all that decides a fine-tuning run beside its start."""
        splits = [to_dict(split) for split in self.splits]
        return code_of(*parts, to_dict(self.settings.finetuning), self.patch_size, splits)

    def arm_pattern(self, method: Method, tag: str) -> str:
        """Plans name of a method's arm, with a field for the seed."""
        code = self.finetuning_code(tag, method.sham, method.protocol.transfer)
        return f"{NAME_PREFIX}{method.short}-{code}__p{SEED_FIELD}"

    def scratch_name(self, network: str, device: str) -> str:
        """Plans name of the arm from scratch on a network; a device's default precision is its own."""
        return f"{NAME_PREFIX}{SCRATCH}-{self.finetuning_code(network, device)}"


def code_of(*parts: Any) -> str:
    """A short hash of JSON builtins."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_CODE_LENGTH]


def plan_comparison(settings: ComparisonSettings, executor: Executor) -> Planned:
    """Reads and checks everything that can be known before training; writes derived plans and trains nothing.

    Raises:
        FileNotFoundError: If a dataset, plans or labels are missing.
        ValueError: If a method does not run on its plans, a fold or size does not exist, a setting does not fit, or a
            case that is fine-tuned on is among those that would be pretrained on.
    """
    raw = find_dataset(settings.dataset, raw_root())
    pretraining = find_pretraining_dataset(settings.pretrain_dataset, raw.name)
    methods = resolve_methods(settings, pretraining)
    parse_settings(settings.finetuning.settings)
    preprocessed = prepare_dataset(raw.name, 1, with_plans=False)
    splits = tuple(read_splits(settings.splits) if settings.splits else dataset_splits(preprocessed))
    by_fold, sizes = folds.choose(splits, settings.folds, settings.num_train, settings.fractions)
    manifest = Manifest.load(raw)
    _refuse_leaks(manifest, by_fold, pretraining, methods, executor, preprocessed / HASHES_FILE)
    planned = Planned(
        settings=settings,
        dataset=raw.name,
        pretrain_dataset=pretraining.name,
        manifest=manifest,
        preprocessed=preprocessed,
        folder=results_root() / raw.name / EVALUATIONS_FOLDER / settings.folder_name,
        methods=tuple(methods),
        splits=splits,
        folds=tuple(by_fold),
        num_train=sizes,
        patch_size=settings.finetuning.patch_size or base_patch(methods[0], pretraining),
        made_of=source_hashes(manifest, folds.cases_of(by_fold.values()), executor, preprocessed),
        warnings=tuple(_warnings(settings)),
    )
    pool, test = planned.probe_cases()
    if len(pool) < settings.probe.config.num_labelled or len(test) < 2:
        raise ValueError(
            f"fold {planned.folds[0]} has {len(pool)} training and {len(test)} validation cases, and a probe learns "
            f"from {settings.probe.config.num_labelled} and is scored on 2 or more. Give a smaller num_labelled in "
            '--settings ({"probe": {"config": {"num_labelled": N}}}), or other folds'
        )
    return planned


def _warnings(settings: ComparisonSettings) -> list[str]:
    steps = {trainer: settings.protocol(trainer).steps for trainer in settings.trainers}
    own = [f"{trainer} {number}" for trainer, number in steps.items() if number is not None]
    without = [trainer for trainer in settings.trainers if settings.sham != "no" and not has_sham(trainer)]
    warnings = []
    if own:
        warnings.append(f"Budgets are not equal: the settings give steps of their own to {', '.join(own)}.")
    if without:
        warnings.append(f"No sham run of {', '.join(without)}: the method does not say what its targets are.")
    return warnings


def find_pretraining_dataset(wanted: int | str | None, labelled: str) -> Path:
    """The preprocessed folder of the dataset to pretrain on: the wanted one, else the only other one that has a store.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If none was named and the choice is not clear.
    """
    if wanted is not None:
        return find_dataset(wanted, preprocessed_root())
    found = sorted({path.parent.parent for path in preprocessed_root().glob(f"Dataset*/*/{INDEX_FILE}")})
    others = [folder for folder in found if folder.name != labelled]
    if len(others) != 1:
        names = ", ".join(folder.name for folder in others) or "none"
        raise ValueError(
            f"say which dataset to pretrain on: --pretrain_dataset ID (preprocessed for it: {names}). Make one: "
            "nnssl_plan_and_preprocess -d ID"
        )
    return others[0]


def resolve_methods(settings: ComparisonSettings, pretraining: Path) -> list[Method]:
    """Every method with its plan, real ones first.

    Raises:
        FileNotFoundError: If plans are missing.
        ValueError: If a method does not run on its network, or dimensions differ between methods.
    """
    methods: list[Method] = []
    images: dict[str, str] = {}
    for sham in (False, True) if settings.sham != "no" else (False,):
        for trainer in settings.trainers:
            if not sham or has_sham(trainer):
                protocol = settings.protocol(trainer)
                plan = derive_pretraining_plan(pretraining, protocol)
                configuration = plan.configuration(protocol.configuration)
                _check_network(trainer, configuration)
                TRAINERS.get(trainer).configured(protocol.settings, configuration.backbone)
                identifier = configuration.data_identifier
                if identifier not in images:
                    images[identifier] = images_code(Store.open(pretraining / identifier))
                methods.append(
                    Method(
                        trainer=trainer,
                        sham=sham,
                        protocol=protocol,
                        plan=plan,
                        configuration=configuration,
                        images=images[identifier],
                    )
                )
    if len({method.configuration.dims for method in methods}) > 1:
        raise ValueError("2D and 3D methods cannot be compared: give them configurations of the same dimensions")
    return methods


def images_code(store: Store) -> str:
    """Of the images in a store, by name and content."""
    return code_of(sorted((case_id, list(entry.content_hashes)) for case_id, entry in store.entries.items()))


def _check_network(trainer: str, configuration: Configuration) -> None:
    encoders = TRAINERS.get(trainer).task.info.encoders
    if configuration.backbone not in encoders:
        raise ValueError(
            f"{trainer} runs on a {' or '.join(sorted(encoders))}, and its plans have a {configuration.backbone}. Give "
            f'it other plans in --settings: {{"pretraining": {{"{trainer}": {{"plans": "NAME"}}}}}}, or a transformer: '
            f'{{"transformer": "XS"}} (one of {", ".join(PRIMUS_SIZES)})'
        )


def derive_pretraining_plan(folder: Path, protocol: Protocol) -> Plan:
    """The plans that a protocol names; with another patch or network, written beside them under a name that says so.

    Raises:
        FileNotFoundError: If the plans are missing.
        ValueError: If they lack the configuration, or there is no transformer of that size.
    """
    plan = Plan.load(folder / f"{protocol.plans}.json")
    own = plan.configuration(protocol.configuration)
    patch_size = protocol.patch_size or own.patch_size
    architecture, parts = with_patch_size(own.architecture, patch_size), []
    if protocol.transformer is not None:
        if protocol.transformer not in PRIMUS_SIZES:
            raise ValueError(f"transformer {protocol.transformer!r} is unknown. Valid: {', '.join(PRIMUS_SIZES)}")
        token = protocol.token or token_size(own.spacing)
        architecture = primus_architecture(PRIMUS_SIZES[protocol.transformer], patch_size, token)
        parts.append(f"vit{protocol.transformer}-{'x'.join(map(str, token))}")
    if patch_size != own.patch_size:
        parts.append("x".join(map(str, patch_size)))
    if not parts:
        return plan
    changed = {**own.raw, "patch_size": list(patch_size), "architecture": architecture}
    name = "-".join([protocol.plans, *parts])
    derived = Plan({**plan.raw, "plans_name": name, "configurations": {protocol.configuration: changed}})
    derived.save(folder / f"{name}.json")
    return derived


def base_patch(method: Method, pretraining: Path) -> tuple[int, ...]:
    """The patch of the plans that a method's own were derived from."""
    plan = Plan.load(pretraining / f"{method.protocol.plans}.json")
    return plan.configuration(method.protocol.configuration).patch_size


def _refuse_leaks(
    manifest: Manifest,
    splits: Mapping[int, Split],
    pretraining: Path,
    methods: Sequence[Method],
    executor: Executor,
    cache: Path,
) -> None:
    """Refuses, before the first step, what `nnssl_evaluate` would refuse after the last.

    Raises:
        ValueError: If an image of a fold is among those that would be pretrained on, by content, or a further image of
            its patient, where both datasets name patients; or if an image is on both sides of a fold.
    """
    cases = folds.cases_of(splits.values())
    hashes = content_hashes(manifest, cases, executor, cache)
    refuse_copies(hashes, splits)
    for identifier in sorted({method.configuration.data_identifier for method in methods}):
        store = Store.open(pretraining / identifier)
        seen = {code for entry in store.entries.values() for code in entry.content_hashes}
        refuse_seen(pretraining.name, [case for case in cases if seen.intersection(hashes[case])], [*splits.values()])
        named = {entry.subject for case, entry in store.entries.items() if entry.subject != case}
        known = [case for case in cases if manifest.case(case).subject in named]
        refuse_seen(pretraining.name, known, [*splits.values()], "are of patients in")
