"""What is compared, checked before anything is trained: arms, folds, sizes, leaks; and the plans of every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.paths import find_dataset, results_root
from nnssl_ext.core.records import read_json
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split, folds_by_subject
from nnssl_ext.evaluation import arms, folds
from nnssl_ext.evaluation.arms import PlannedArm
from nnssl_ext.evaluation.folds import FoldRun
from nnssl_ext.evaluation.leaks import content_hashes, refuse_copies
from nnssl_ext.evaluation.metrics import DEFAULT_TOLERANCE_MM
from nnssl_ext.evaluation.records import NumTrain
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.finetuning.nnunet_plans import derive_plans
from nnssl_ext.finetuning.sources import source_hashes

HASHES_FILE = "nnssl_content_hashes.json"
EVALUATIONS_FOLDER = "evaluation"
BACKGROUND, IGNORE = "background", "ignore"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is compared, on what, and how often."""

    dataset: int | str
    """Id or name of the labelled dataset."""
    plans: tuple[str, ...]
    """Plans names of the arms; `arms.SEED_FIELD` in one stands for the seed."""
    labels: tuple[str, ...] = ()
    """Short names of the arms; none: made from their plans names."""
    configuration: str = "3d_fullres"
    folds: tuple[int, ...] = ()
    """Folds to run; none stands for all that are planned."""
    num_train: tuple[NumTrain, ...] = ("all",)
    """Training set sizes, in cases."""
    fractions: tuple[float, ...] = ()
    """Training set sizes as shares of a fold's training cases; instead of `num_train`."""
    seeds: tuple[int, ...] = (0,)
    reference: str | None = None
    """Plans name of the arm to compare with; None: the one planned from scratch. See `arms.baselines_of`."""
    tolerance_mm: float = DEFAULT_TOLERANCE_MM
    """Surface tolerance of NSD."""
    plain_trainer: str = arms.PLAIN_TRAINER
    """Trainer of arms that are plain nnU-Net plans."""
    name: str | None = None
    """Name of the evaluation's folder; None: made from the arms."""

    def __post_init__(self) -> None:
        folds.check_choices(self.folds, self.num_train, self.seeds)
        if self.tolerance_mm < 0:
            raise ValueError(f"a surface tolerance of {self.tolerance_mm} mm is not possible; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An evaluation that has been checked and planned."""

    settings: EvaluationSettings
    manifest: Manifest
    preprocessed: Path
    """The dataset's folder in nnU-Net's preprocessed data."""
    folder: Path
    """Where the evaluation is written."""
    arms: tuple[PlannedArm, ...]
    reference: PlannedArm
    baselines: Mapping[str, PlannedArm]
    """What every other arm is compared with, by name."""
    splits: tuple[Split, ...]
    folds: tuple[int, ...]
    num_train: tuple[NumTrain, ...]
    runs: tuple[FoldRun, ...]
    warnings: tuple[str, ...]

    @property
    def missing(self) -> list[FoldRun]:
        """The runs that are still to be trained."""
        return folds.missing_runs(self.runs)

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Foreground classes: name to label values."""
        labels = {k: v for k, v in (self.manifest.labels or {}).items() if k not in (BACKGROUND, IGNORE)}
        return {name: (value,) if isinstance(value, int) else tuple(value) for name, value in labels.items()}

    @property
    def ignore_label(self) -> int | None:
        """Label whose voxels count for nothing."""
        value = (self.manifest.labels or {}).get(IGNORE)
        return value if isinstance(value, int) else None


def prepare(settings: EvaluationSettings, executor: Executor) -> Prepared:
    """Reads and checks everything that can be known before training, and plans the runs; trains nothing.

    Raises:
        FileNotFoundError: If the dataset, an arm's plans or its weights are missing.
        ValueError: If the arms cannot be compared fairly, weights are not those of their plans, a case was pretrained
            on or has changed since it was trained on, or sizes or folds do not exist.
    """
    preprocessed = find_dataset(settings.dataset, nnunet_root("preprocessed"))
    manifest = Manifest.load(find_dataset(settings.dataset, nnunet_root("raw")))
    planned = arms.read_arms(
        preprocessed,
        settings.plans,
        settings.configuration,
        settings.plain_trainer,
        seeds=settings.seeds,
        labels=settings.labels,
    )
    reference = arms.choose_reference(planned, settings.reference)
    splits = arms.common_splits(planned) or _nnunet_splits(preprocessed, manifest)
    chosen, sizes = folds.choose(splits, settings.folds, settings.num_train, settings.fractions)
    arms.check_plain(planned, sizes)
    baselines = arms.baselines_of(planned, reference, settings.configuration)
    warnings = arms.check_weights(planned) + arms.check_fairness(planned, baselines, settings.configuration)
    cases = folds.cases_of(chosen.values())
    hashes = content_hashes(manifest, cases, executor, preprocessed / HASHES_FILE)
    refuse_copies(hashes, chosen)
    warnings += arms.refuse_leaks(planned, hashes, list(chosen.values()))
    warnings += folds.warn_of_patients(chosen, manifest.subjects())
    runs = folds.plan_runs(
        planned,
        splits,
        manifest.subjects(),
        folds=tuple(chosen),
        num_train=sizes,
        seeds=settings.seeds,
        configuration=settings.configuration,
        results=nnunet_root("results") / preprocessed.name,
    )
    made_of = source_hashes(manifest, cases, executor, preprocessed)
    folds.refuse_changed(runs, made_of, preprocessed, settings.configuration)
    name = settings.name or "__".join([*(arm.label for arm in planned), settings.configuration])
    return Prepared(
        settings=settings,
        manifest=manifest,
        preprocessed=preprocessed,
        folder=results_root() / preprocessed.name / EVALUATIONS_FOLDER / name,
        arms=planned,
        reference=reference,
        baselines=baselines,
        splits=splits,
        folds=tuple(chosen),
        num_train=sizes,
        runs=tuple(runs),
        warnings=tuple(warnings),
    )


def _nnunet_splits(preprocessed: Path, manifest: Manifest) -> tuple[Split, ...]:
    """nnU-Net's own folds where it has written them, else folds by patient."""
    path = preprocessed / folds.SPLITS_FILE
    if path.is_file():
        return tuple(Split(train=tuple(fold["train"]), val=tuple(fold["val"])) for fold in read_json(path))
    return tuple(folds_by_subject(manifest.subjects()))


def write_plans(prepared: Prepared) -> None:
    """Writes the plans file of every arm, size and seed, and refuses results that were made with other settings.

    Raises:
        ValueError: If there are results of the same name that do not belong to these plans.
    """
    if any(arm.config is None for arm in prepared.arms):
        folds.ensure_plain_splits(prepared.preprocessed, prepared.splits, prepared.folds)
    subjects = prepared.manifest.subjects()
    done: set[str] = set()
    for run in prepared.runs:
        if run.plans_name in done:
            continue
        done.add(run.plans_name)
        path = run.start.plans_path
        if run.plans_name != run.start.name and run.seed is not None:
            splits = folds.subsets_of_folds(prepared.splits, subjects, prepared.num_train, run.seed)[run.num_train]
            path = derive_plans(path, run.plans_name, list(splits), run.seed)
        folds.check_same_settings(run, read_json(path))
