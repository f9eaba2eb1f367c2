"""The arms of a comparison, read from their plans files, and the checks that make the comparison a fair one.

An arm whose plans hold `nnssl_finetuning` is trained by `SSLFinetuneTrainer`, on training subsets and seeds of its own.
Any other plans file is *plain nnU-Net*: the stock trainer, all training cases, no seed.

A name with `{seed}` in it, such as `ptPlans__mae_p{seed}`, is one arm with plans for every seed: each seed stands on a
pretraining of its own. Then the luck of the pretraining is part of the comparison, and it is shared by all folds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl_ext.core.paths import plans_in
from nnssl_ext.core.records import read_json
from nnssl_ext.dataset.splits import Split
from nnssl_ext.evaluation.records import Arm, NumTrain, Role
from nnssl_ext.finetuning.config import PLANS_KEY, FinetuningConfig, read_config
from nnssl_ext.finetuning.run import DEFAULT_TRAINER

_BEFORE_SEED = re.compile(r"(_+p)?[-_]*$")
PLAIN_TRAINER = "nnUNetTrainer"
NAME_PREFIX = "ptPlans__"
SEED_FIELD = "{seed}"
"""Stands for the seed in the name of an arm that has plans of its own for every seed."""
_SAME_IN_ALL_ARMS = ("num_epochs", "iterations_per_epoch", "precision", "validation_mirroring")
"""Fine-tuning settings that must not differ between arms, since they are no part of a start's recipe."""
_OF_THE_WEIGHTS = ("pretrained_weights", "weights_hash", "transfer", "pretraining_content_hashes")
_EXPECTED_TO_DIFFER = ("splits", "seed", *_OF_THE_WEIGHTS)
_NO_INFLUENCE = ("val_iterations_per_epoch", "save_every", "validate_every")
"""Fine-tuning settings that change no weight."""
ARCHITECTURE = "architecture"
_NETWORK_KEYS = (
    "patch_size",
    "batch_size",
    "spacing",
    ARCHITECTURE,
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)
"""Parts of a configuration that, where they differ, are a second difference beside the pretraining."""


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """An arm with its plans, as long as the evaluation runs."""

    name: str
    plans_path: Path
    plans: dict[str, Any]
    config: FinetuningConfig | None
    """None for plain nnU-Net."""
    trainer: str
    short: str = ""
    """Name for tables and figures; empty: made from `name`."""
    per_seed: Mapping[int, PlannedArm] = field(default_factory=dict)
    """Plans of each seed, where every seed has its own; the fields above are then those of the first seed."""

    @property
    def starts(self) -> tuple[PlannedArm, ...]:
        """The plans that its runs are derived from: one for each seed, or itself."""
        return tuple(self.per_seed.values()) or (self,)

    def at(self, seed: int) -> PlannedArm:
        """The plans that the runs of a seed are derived from."""
        return self.per_seed.get(seed, self)

    @property
    def pretrained(self) -> bool:
        """Whether its network starts from pretrained weights."""
        return self.config is not None and self.config.pretrained_weights is not None

    @property
    def images_known(self) -> bool:
        """Whether the checkpoints of all its seeds say which images they were pretrained on."""
        return all(start.config and start.config.pretraining_content_hashes for start in self.starts)

    @property
    def label(self) -> str:
        """Short name: `mae` for `ptPlans__mae`."""
        return self.short or self.name.removeprefix(NAME_PREFIX)


def read_arm(plans_path: Path, configuration: str, plain_trainer: str = PLAIN_TRAINER) -> PlannedArm:
    """Reads one arm.

    Raises:
        FileNotFoundError: If the plans file is missing; the message lists the plans that are there.
        ValueError: If it has no such configuration, or its fine-tuning settings are not valid.
    """
    if not plans_path.is_file():
        raise FileNotFoundError(
            f"no plans {plans_path.stem!r} in {plans_path.parent} (there: {plans_in(plans_path.parent)}). Make them "
            "with nnssl_plan_finetuning -d DATASET -pc CHECKPOINT -n NAME, the baseline with --from_scratch"
        )
    plans = read_json(plans_path)
    if configuration not in plans["configurations"]:
        valid = ", ".join(plans["configurations"])
        raise ValueError(f"{plans_path.name} has no configuration {configuration!r}. Valid: {valid}. Give it with -c")
    config = read_config(plans, str(plans_path)) if PLANS_KEY in plans else None
    trainer = plain_trainer if config is None else DEFAULT_TRAINER
    return PlannedArm(name=plans["plans_name"], plans_path=plans_path, plans=plans, config=config, trainer=trainer)


def read_arms(
    folder: Path,
    names: Sequence[str],
    configuration: str,
    plain_trainer: str = PLAIN_TRAINER,
    *,
    seeds: Sequence[int] = (),
    labels: Sequence[str] = (),
) -> tuple[PlannedArm, ...]:
    """Reads the arms of a comparison.

    Args:
        folder: The dataset's folder in nnU-Net's preprocessed data.
        names: Plans names, perhaps with `SEED_FIELD`.
        configuration: nnU-Net's configuration.
        plain_trainer: Trainer of plain nnU-Net plans.
        seeds: Seeds of the evaluation.
        labels: Short names; none: made from the names.

    Raises:
        FileNotFoundError: If a plans file is missing.
        ValueError: If one has no such configuration, its settings are not valid, or labels and names differ in number.
    """
    if labels and len(labels) != len(names):
        raise ValueError(f"{len(labels)} labels do not name {len(names)} arms: {', '.join(labels)}")

    def read(name: str, label: str) -> PlannedArm:
        if SEED_FIELD not in name:
            return replace(read_arm(folder / f"{name}.json", configuration, plain_trainer), short=label)
        starts = {
            seed: read_arm(folder / f"{name.replace(SEED_FIELD, str(seed))}.json", configuration, plain_trainer)
            for seed in seeds
        }
        own = _BEFORE_SEED.sub("", name.partition(SEED_FIELD)[0])
        named = {seed: replace(start, short=label or own.removeprefix(NAME_PREFIX)) for seed, start in starts.items()}
        return replace(named[seeds[0]], name=own, per_seed=named)

    return tuple(read(name, label) for name, label in zip(names, labels or [""] * len(names), strict=True))


def all_starts(arms: Iterable[PlannedArm]) -> list[PlannedArm]:
    """The plans of all seeds of all arms."""
    return [start for arm in arms for start in arm.starts]


def choose_reference(arms: Sequence[PlannedArm], wanted: str | None) -> PlannedArm:
    """The arm that the others are compared with: the wanted one, else the only one planned from scratch.

    Raises:
        ValueError: If there are fewer than two arms, the wanted one is not among them, or the choice is not clear.
    """
    names = ", ".join(arm.name for arm in arms)
    if len({arm.name for arm in arms}) != len(arms) or len(arms) < 2:
        raise ValueError(f"a comparison needs two or more different plans with -p (given: {names or 'none'})")
    if wanted is not None:
        found = [arm for arm in arms if wanted in (arm.name, arm.label)]
        if not found:
            raise ValueError(f"--reference {wanted!r} is not among the arms: {names}")
        return found[0]
    scratch = [arm for arm in arms if arm.config is not None and not arm.pretrained]
    if len(scratch) != 1:
        raise ValueError(
            f"{len(scratch)} of the arms ({names}) start from scratch, so say which one to compare with: "
            "--reference PLANS. A fair baseline is planned with nnssl_plan_finetuning ... --from_scratch"
        )
    return scratch[0]


def baselines_of(arms: Sequence[PlannedArm], reference: PlannedArm, configuration: str) -> dict[str, PlannedArm]:
    """What each arm but the reference is compared with, by its name.

    It is the reference; but a pretrained arm whose network is another one's from scratch is compared with that.
    """
    scratch = [arm for arm in arms if arm.config is not None and not arm.pretrained]

    def nearest(arm: PlannedArm) -> PlannedArm:
        def distance(base: PlannedArm) -> tuple[bool, int]:
            differing = differing_network(arm, base, configuration)
            return ARCHITECTURE in differing, len(differing)

        if not arm.pretrained or all(base is not reference for base in scratch):
            return reference
        return min([reference, *scratch], key=distance)

    return {arm.name: nearest(arm) for arm in arms if arm is not reference}


def differing_network(arm: PlannedArm, base: PlannedArm, configuration: str) -> list[str]:
    """The parts of a configuration in which two arms differ."""
    own, other = (a.plans["configurations"][configuration] for a in (arm, base))
    return [key for key in _NETWORK_KEYS if own.get(key) != other.get(key)]


def common_splits(arms: Sequence[PlannedArm]) -> tuple[Split, ...] | None:
    """The folds that all arms share, or None when every arm is plain nnU-Net (whose plans list no folds).

    Raises:
        ValueError: If two arms were planned with different folds.
    """
    planned = [start for start in all_starts(arms) if start.config is not None]
    for arm in planned[1:]:
        if _as_sets(arm) != _as_sets(planned[0]):
            raise ValueError(
                f"{planned[0].name} and {arm.name} were planned with different folds, so their cases cannot be paired. "
                "Plan both again with the same splits: nnssl_plan_finetuning"
            )
    return planned[0].config.splits if planned and planned[0].config else None


def _as_sets(arm: PlannedArm) -> list[tuple[frozenset[str], frozenset[str]]]:
    splits = arm.config.splits if arm.config else ()
    return [(frozenset(split.train), frozenset(split.val)) for split in splits]


def check_fairness(arms: Sequence[PlannedArm], baselines: Mapping[str, PlannedArm], configuration: str) -> list[str]:
    """Refuses arms that train for different lengths; returns warnings about other differences beside the pretraining.

    Args:
        arms: All arms.
        baselines: As from `baselines_of`.
        configuration: nnU-Net's configuration.

    Raises:
        ValueError: If an arm's length of training or way of validation differs from its baseline's.
    """
    warnings = []
    compared = [(start, baselines[arm.name]) for arm in arms if arm.name in baselines for start in arm.starts]
    for arm, base in compared:
        recipe, network = _differing_recipe(arm, base), differing_network(arm, base, configuration)
        if recipe or network:
            warnings.append(
                f"{arm.label} and {base.label} differ in {', '.join([*network, *recipe])} besides the "
                "pretraining, so a difference between them is not the pretraining's alone."
            )
    return list(dict.fromkeys(warnings))


def _differing_recipe(arm: PlannedArm, reference: PlannedArm) -> list[str]:
    """What two arms are trained with that is not the same, each as `lr (0.001, not 0.01)`."""
    if arm.config is None or reference.config is None:
        return _differing_from_plain(arm, reference)
    differing = []
    for name in arm.config.__dataclass_fields__:
        own, base = getattr(arm.config, name), getattr(reference.config, name)
        if own == base or name in (*_EXPECTED_TO_DIFFER, *_NO_INFLUENCE):
            continue
        if name in _SAME_IN_ALL_ARMS:
            raise ValueError(
                f"{name} is {own} in {arm.name} and {base} in {reference.name}: arms must be trained and "
                "validated alike. Plan one of them again with nnssl_plan_finetuning"
            )
        differing.append(f"{name} ({own}, not {base})")
    return differing


def _differing_from_plain(arm: PlannedArm, reference: PlannedArm) -> list[str]:
    """The same where one of them is plain nnU-Net, whose training no plans name."""
    ours = arm.config or reference.config
    if ours is None:
        return []
    plain = arm if arm.config is None else reference
    length = f"{ours.num_epochs} epochs of {ours.iterations_per_epoch} steps"
    mirroring = [] if ours.validation_mirroring else ["mirroring in validation (plain nnU-Net's alone)"]
    return [f"training ({plain.trainer}'s own, by default 1000 epochs of 250 steps, beside {length})", *mirroring]


def find_leaks(arms: Iterable[PlannedArm], hashes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Cases whose images were pretrained on, by arm.

    Args:
        arms: The arms.
        hashes: Content hashes of the images of each training and validation case.
    """
    leaks = {}
    for arm in all_starts(arms):
        seen = set(arm.config.pretraining_content_hashes) if arm.config else set()
        found = sorted(case for case, own in hashes.items() if seen.intersection(own))
        if found:
            leaks[arm.name] = found
    return leaks


def check_weights(arms: Iterable[PlannedArm]) -> list[str]:
    """Refuses weights files that do not hold what the plans were made with; returns warnings where nobody knows.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one holds other weights.
    """
    from nnssl_ext.finetuning.weights import other_weights, weights_file_hash

    unknown = []
    for arm in all_starts(arms):
        if arm.config is None or not arm.config.pretrained_weights:
            continue
        path = arm.plans_path.with_name(arm.config.pretrained_weights)
        if arm.config.weights_hash is None:
            unknown.append(
                f"The plans {arm.name} do not tell their weights by content (they are of a former version), so it "
                f"cannot be checked that all results are of what is in {path.name} now."
            )
        elif weights_file_hash(path) != arm.config.weights_hash:
            raise ValueError(other_weights(path))
    return unknown


def refuse_seen(name: str, cases: Sequence[str], splits: Sequence[Split], what: str = "were in") -> None:
    """Refuses cases of the folds that were pretrained on.

    Args:
        name: Whose pretraining set it is.
        cases: Those in it.
        splits: The folds.
        what: How they are connected with it.

    Raises:
        ValueError: If there is one.
    """
    if not cases:
        return
    validated = {case for split in splits for case in split.val}
    held_out = [case for case in cases if case in validated]
    kind, shown = ("validation", held_out) if held_out else ("training", cases)
    raise ValueError(
        f"{len(shown)} {kind} cases {what} the pretraining set of {name}, such as {', '.join(shown[:3])}: their "
        "result would not be honest. Pretrain on other images (nnssl_convert msd ... --unlabelled N makes disjoint "
        "datasets), or leave these cases out of the folds"
    )


def refuse_leaks(arms: Sequence[PlannedArm], hashes: Mapping[str, Sequence[str]], splits: Sequence[Split]) -> list[str]:
    """Refuses an evaluation whose cases were pretrained on; returns warnings where that cannot be known.

    Raises:
        ValueError: If a validation or training case of any fold was in a pretraining set, by content.
    """
    for name, cases in find_leaks(arms, hashes).items():
        refuse_seen(name, cases, splits)
    return [
        f"A checkpoint of {arm.label} does not say which images it was pretrained on, so it cannot be checked "
        "whether the cases evaluated here were among them."
        for arm in arms
        if arm.pretrained and not arm.images_known
    ]


def describe_arm(
    arm: PlannedArm,
    base: PlannedArm | None,
    configuration: str,
    pretraining_run: Path | None,
    commands: Sequence[str],
) -> Arm:
    """The arm as it goes into `evaluation.json`; `base` is what it is compared with, None for the reference."""
    role: Role = "reference" if base is None else "arm" if arm.config is not None else "plain"
    return Arm(
        name=arm.name,
        role=role,
        trainer=arm.trainer,
        pretrained=arm.pretrained,
        images_known=arm.images_known,
        baseline=base.name if base else "",
        other_network=base is not None and ARCHITECTURE in differing_network(arm, base, configuration),
        pretrained_per_seed=bool(arm.per_seed),
        label=arm.label,
        weights=arm.config.pretrained_weights if arm.config else None,
        pretraining_run=str(pretraining_run) if pretraining_run else None,
        training=_settings(arm.config),
        commands=tuple(commands),
    )


def _settings(config: FinetuningConfig | None) -> dict[str, str]:
    if config is None:
        return {"recipe": "nnU-Net's own"}
    shown = (name for name in config.__dataclass_fields__ if name not in _EXPECTED_TO_DIFFER)
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in _fields(config, shown)}


def _fields(config: FinetuningConfig, names: Iterable[str]) -> list[tuple[str, Any]]:
    values = [(name, getattr(config, name)) for name in names]
    return [(name, value) for name, value in values if value is not None]


def check_plain(arms: Sequence[PlannedArm], num_train: Sequence[NumTrain]) -> None:
    """Refuses plain nnU-Net where only training subsets are compared, since it always trains on all cases.

    Raises:
        ValueError: If an arm is plain and `all` is not among the sizes.
    """
    plain = [arm.name for arm in arms if arm.config is None]
    if plain and "all" not in num_train:
        raise ValueError(
            f"{', '.join(plain)} is plain nnU-Net, which trains on all cases of a fold: add all to --num_train, or "
            "leave it out"
        )
