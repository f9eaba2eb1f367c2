"""The evaluation from arms to `evaluation.json`: check, plan, train what is missing, score, conclude."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from nnssl_ext.core.executor import Executor
from nnssl_ext.core.logs import track
from nnssl_ext.core.paths import find_dataset, results_root
from nnssl_ext.core.records import read_json
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.dataset.splits import Split, folds_by_subject
from nnssl_ext.evaluation import analysis, arms, folds, scoring, training, verdict
from nnssl_ext.evaluation.arms import PlannedArm
from nnssl_ext.evaluation.leaks import content_hashes
from nnssl_ext.evaluation.metrics import DEFAULT_TOLERANCE_MM, ClassScores
from nnssl_ext.evaluation.provenance import find_pretraining_run, recorded_commands
from nnssl_ext.evaluation.records import CaseScores, Evaluation, NumTrain, Run, save_evaluation
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.finetuning.nnunet_plans import derive_plans

logger = logging.getLogger(__name__)

EVALUATIONS_FOLDER = "evaluation"
BACKGROUND, IGNORE = "background", "ignore"
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


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is compared, on what, and how often."""

    dataset: int | str
    """Id or name of the labelled dataset."""
    plans: tuple[str, ...]
    """Plans names of the arms."""
    configuration: str = "3d_fullres"
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_train: tuple[NumTrain, ...] = ("all",)
    """Training set sizes, in cases."""
    fractions: tuple[float, ...] = ()
    """Training set sizes as shares of a fold's training cases; instead of `num_train`."""
    seeds: tuple[int, ...] = (0,)
    reference: str | None = None
    """Plans name of the arm to compare with; None: the one planned from scratch."""
    tolerance_mm: float = DEFAULT_TOLERANCE_MM
    """Surface tolerance of NSD."""
    plain_trainer: str = arms.PLAIN_TRAINER
    """Trainer of arms that are plain nnU-Net plans."""
    name: str | None = None
    """Name of the evaluation's folder; None: made from the arms."""

    def __post_init__(self) -> None:
        for what in ("folds", "num_train", "seeds"):
            values = getattr(self, what)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{what} must be one or more different values (given: {list(values)})")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must be 0 or more (given: {list(self.seeds)})")
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
    splits: tuple[Split, ...]
    num_train: tuple[NumTrain, ...]
    runs: tuple[folds.FoldRun, ...]
    warnings: tuple[str, ...]

    @property
    def missing(self) -> list[folds.FoldRun]:
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
        FileNotFoundError: If the dataset or an arm's plans are missing.
        ValueError: If the arms cannot be compared fairly, a case was pretrained on, or sizes or folds do not exist.
    """
    preprocessed = find_dataset(settings.dataset, nnunet_root("preprocessed"))
    manifest = Manifest.load(find_dataset(settings.dataset, nnunet_root("raw")))
    planned = tuple(
        arms.read_arm(preprocessed / f"{name}.json", settings.configuration, settings.plain_trainer)
        for name in settings.plans
    )
    reference = arms.choose_reference(planned, settings.reference)
    splits = arms.common_splits(planned) or _nnunet_splits(preprocessed, manifest)
    sizes = settings.num_train
    if settings.fractions:
        sizes = tuple(folds.sizes_from_fractions(settings.fractions, [splits[fold] for fold in settings.folds]))
    folds.check_sizes(sizes, splits, settings.folds)
    arms.check_plain(planned, sizes)
    warnings = arms.check_fairness(planned, reference, settings.configuration)
    cases = sorted({case for fold in settings.folds for case in (*splits[fold].train, *splits[fold].val)})
    hashes = content_hashes(manifest, cases, executor) if any(arm.pretrained for arm in planned) else {}
    warnings += arms.refuse_leaks(planned, hashes, [splits[fold] for fold in settings.folds])
    runs = folds.plan_runs(
        planned,
        splits,
        manifest.subjects(),
        folds=settings.folds,
        num_train=sizes,
        seeds=settings.seeds,
        configuration=settings.configuration,
        results=nnunet_root("results") / preprocessed.name,
    )
    name = settings.name or "__".join([*(arm.label for arm in planned), settings.configuration])
    return Prepared(
        settings=settings,
        manifest=manifest,
        preprocessed=preprocessed,
        folder=results_root() / preprocessed.name / EVALUATIONS_FOLDER / name,
        arms=planned,
        reference=reference,
        splits=splits,
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
        folds.ensure_plain_splits(prepared.preprocessed, prepared.splits, prepared.settings.folds)
    subjects = prepared.manifest.subjects()
    done: set[str] = set()
    for run in prepared.runs:
        if run.plans_name in done:
            continue
        done.add(run.plans_name)
        path = run.arm.plans_path
        if run.plans_name != run.arm.name and run.seed is not None:
            splits = folds.subsets_of_folds(prepared.splits, subjects, prepared.num_train, run.seed)[run.num_train]
            path = derive_plans(path, run.plans_name, list(splits), run.seed)
        folds.check_same_settings(run, read_json(path))


def train(
    prepared: Prepared,
    executor: Executor,
    device: str,
    gpus: Sequence[str] = (),
    trainer: training.Trainer = training.train_fold,
) -> None:
    """Trains the runs that are missing. A failing one does not stop the others.

    Raises:
        ValueError: If some failed, with the first reason, after all the others have run.
    """
    missing = prepared.missing
    tasks = {
        run.key: training.TrainingTask(
            dataset=prepared.preprocessed.name,
            plans_name=run.plans_name,
            configuration=prepared.settings.configuration,
            fold=run.fold,
            trainer=run.arm.trainer,
            device=device,
            gpus=tuple(gpus),
            log_file=prepared.folder / "logs" / f"{run.key}.log",
        )
        for run in missing
    }
    logger.info(
        "%d of %d fold runs are finished, %d to do", len(prepared.runs) - len(tasks), len(prepared.runs), len(tasks)
    )
    failed = {}
    for key, error in track(training.train_missing(tasks, executor, trainer), len(tasks), "training folds"):
        if error is None:
            logger.info("trained %s", key)
        else:
            failed[key] = error
            logger.error("%s failed: %s", key, error)
    if failed:
        key, error = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(tasks)} trainings failed, the first is {key}: {error}. See "
            f"{prepared.folder / 'logs'}; the same command goes on with what is missing"
        )


def collect(prepared: Prepared, executor: Executor) -> tuple[list[Run], list[CaseScores]]:
    """Scores every run on whole volumes and reads its learning curves.

    Raises:
        ValueError: If a run did not validate exactly the cases of its fold, or a file cannot be scored.
    """
    ending = prepared.manifest.file_ending
    for run in prepared.runs:
        scoring.check_validated(run.folder, run.val_cases, ending)
    tasks = {run.key: (_scoring_task(prepared, run),) for run in prepared.runs}
    scores: dict[str, dict[str, dict[str, ClassScores]]] = {}
    for result in track(executor.run(scoring.score_run, tasks), len(tasks), "scoring"):
        if result.error is not None:
            raise ValueError(f"{result.key} could not be scored: {result.error}")
        scores[result.key] = result.value
    runs = [_run_record(run) for run in prepared.runs]
    rows = [
        CaseScores(
            arm=run.arm.name,
            num_train=run.num_train,
            seed=run.seed,
            fold=run.fold,
            case=case,
            classes=scores[run.key][case],
        )
        for run in prepared.runs
        for case in run.val_cases
    ]
    return runs, rows


def _scoring_task(prepared: Prepared, run: folds.FoldRun) -> scoring.ScoringTask:
    labels = {case: prepared.manifest.case(case).label for case in run.val_cases}
    unlabelled = sorted(case for case, label in labels.items() if label is None)
    if unlabelled:
        raise ValueError(f"{len(unlabelled)} validation cases have no label file, such as {unlabelled[0]}")
    return scoring.ScoringTask(
        fold_folder=run.folder,
        references={case: label for case, label in labels.items() if label is not None},
        file_ending=prepared.manifest.file_ending,
        classes=prepared.classes,
        ignore_label=prepared.ignore_label,
        tolerance_mm=prepared.settings.tolerance_mm,
        cache=prepared.folder / "scores" / f"{run.key}.json",
    )


def _run_record(run: folds.FoldRun) -> Run:
    return Run(
        arm=run.arm.name,
        num_train=run.num_train,
        seed=run.seed,
        fold=run.fold,
        plans_name=run.plans_name,
        folder=str(run.folder),
        train_cases=run.train_cases,
        val_cases=run.val_cases,
        curve=scoring.read_curve(run.folder),
    )


def conclude(prepared: Prepared, runs: Sequence[Run], scores: Sequence[CaseScores], command: str) -> Evaluation:
    """Statistics, verdicts and warnings for the scores of all runs."""
    settings, classes = prepared.settings, prepared.classes
    names = analysis.class_names(classes)
    described = tuple(
        arms.describe_arm(arm, prepared.reference, find_pretraining_run(arm), recorded_commands(arm))
        for arm in prepared.arms
    )
    summaries = analysis.summarise(scores, names)
    comparisons = analysis.compare(scores, prepared.reference.name, names)
    trends = analysis.judge_convergence(runs)
    evaluation = Evaluation(
        name=prepared.folder.name,
        dataset=prepared.preprocessed.name,
        configuration=settings.configuration,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        folds=settings.folds,
        num_train=prepared.num_train,
        seeds=settings.seeds,
        tolerance_mm=settings.tolerance_mm,
        classes=classes,
        arms=described,
        runs=tuple(runs),
        cases=tuple(scores),
        summaries=tuple(summaries),
        comparisons=tuple(comparisons),
        convergence=tuple(trends),
        verdicts=tuple(verdict.decide(described, summaries, comparisons, trends, len(settings.seeds))),
        warnings=prepared.warnings,
        versions=versions(),
    )
    return replace(evaluation, warnings=(*prepared.warnings, *verdict.warnings_about(evaluation, len(prepared.splits))))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    installed: Mapping[str, str] = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {**installed, "python": platform.python_version(), "system": platform.platform()}


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def evaluate(
    settings: EvaluationSettings,
    executor: Executor,
    *,
    device: str,
    gpus: Sequence[str] = (),
    command: str = "",
    trainer: Callable[[training.TrainingTask], None] = training.train_fold,
) -> tuple[Evaluation, Path]:
    """The whole evaluation; a second start goes on where the first was stopped.

    Args:
        settings: What is compared.
        executor: Where trainings and scorings run.
        device: `cpu`, `cuda` or `mps`.
        gpus: CUDA devices to be shared out among the workers, by number.
        command: The command line, kept in the result.
        trainer: What trains one fold.

    Returns:
        The evaluation and the folder that holds its `evaluation.json`.

    Raises:
        FileNotFoundError: If a dataset or plans are missing.
        ValueError: If the comparison would not be fair, or trainings failed.
    """
    prepared = prepare(settings, executor)
    write_plans(prepared)
    train(prepared, executor, device, gpus, trainer)
    runs, scores = collect(prepared, executor)
    evaluation = conclude(prepared, runs, scores, command)
    save_evaluation(evaluation, prepared.folder)
    return evaluation, prepared.folder
