"""What `evaluation.json` holds: arms, runs, scores of every case, and what was concluded from them.

Everything that the report shows is in here or in a file named here, so a report can be drawn again without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nnssl_ext.core.records import from_dict, read_json, to_dict, write_json
from nnssl_ext.evaluation.convergence import Trend
from nnssl_ext.evaluation.metrics import ClassScores
from nnssl_ext.evaluation.statistics import Interval

NumTrain = int | Literal["all"]
Role = Literal["reference", "arm", "plain"]
Outcome = Literal["helped", "hurt", "undecided", "unfair"]

EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"
MEAN_CLASS = "mean"
"""Name under which the mean over a case's foreground classes stands beside the classes."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training that is compared."""

    name: str
    """Its `plans_name`, such as `ptPlans__mae`."""
    role: Role
    """`reference` (what the others are compared with), `arm`, or `plain` (stock nnU-Net: unseeded, all labels only)."""
    trainer: str
    pretrained: bool
    images_known: bool = False
    """Whether all its checkpoints say which images they were pretrained on, so that leaks could be looked for."""
    baseline: str = ""
    """Name of the arm that it is compared with; empty: the reference, or it is that itself."""
    other_network: bool = False
    """Whether its network is another than its baseline's."""
    label: str = ""
    """Short name for tables and figures."""
    weights: str | None = None
    """File name of the adapted pretrained weights."""
    pretraining_run: str | None = None
    """Folder of the pretraining run (of the first seed's), where it is on this machine."""
    pretrained_per_seed: bool = False
    """Whether every seed has a pretraining of its own."""
    training: dict[str, str] = field(default_factory=dict)
    """Fine-tuning settings as text, for the report's table."""
    commands: tuple[str, ...] = ()
    """The commands that made this arm, as far as they are recorded."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fold run's learning curves, one entry per epoch."""

    train_loss: tuple[float | None, ...] = ()
    val_loss: tuple[float | None, ...] = ()
    dice: tuple[float | None, ...] = ()
    """Mean foreground Dice on validation patches (nnU-Net's pseudo Dice), not the whole-volume result."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: an arm, a training set size, a seed and a fold."""

    arm: str
    num_train: NumTrain
    seed: int | None
    fold: int
    plans_name: str
    folder: str
    train_cases: tuple[str, ...]
    val_cases: tuple[str, ...]
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class CaseScores:
    """Scores of one validation case by one run."""

    arm: str
    num_train: NumTrain
    seed: int | None
    fold: int
    case: str
    classes: dict[str, ClassScores]
    patient: str | None = None
    """None: the case is a patient of its own."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean of one metric over all validated cases, for one arm, size and class."""

    arm: str
    num_train: NumTrain
    metric: str
    class_name: str
    mean: float | None
    interval: Interval | None
    num_cases: int
    num_seeds: int
    fold_means: dict[int, float]
    """Mean over the cases and seeds of each fold."""
    seed_means: dict[int, float]
    """Mean over all cases for each seed."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against its baseline on the same cases: difference = arm minus baseline."""

    arm: str
    num_train: NumTrain
    metric: str
    class_name: str
    difference: float | None
    interval: Interval | None
    """Bootstrap over seeds and patients."""
    p_value: float | None
    """Wilcoxon's signed-rank test over patients, whose cases and seeds are averaged."""
    p_holm: float | None
    """Corrected over the family of tests that this one belongs to."""
    num_pairs: int
    """Patients."""
    num_better: int
    num_worse: int
    undecidable_below: float | None
    """Smaller differences are within the luck of the trainings; None where a single training tells nothing of it."""


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """The verdict of the still-rising rule for one arm and size."""

    arm: str
    num_train: NumTrain
    trend: Trend
    num_runs: int


@dataclass(frozen=True, kw_only=True)
class SizeVerdict:
    """What can be said about one arm at one training set size."""

    num_train: NumTrain
    outcome: Outcome
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What can be said about one arm."""

    arm: str
    outcome: Outcome
    headline: str
    sizes: tuple[SizeVerdict, ...]
    certainty: str
    """How sure that is: seeds, cases, and what they cannot decide."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that one evaluation found."""

    name: str
    dataset: str
    configuration: str
    created: str
    """UTC, ISO 8601."""
    command: str
    folds: tuple[int, ...]
    num_train: tuple[NumTrain, ...]
    seeds: tuple[int, ...]
    tolerance_mm: float
    classes: dict[str, tuple[int, ...]]
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    cases: tuple[CaseScores, ...]
    summaries: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    convergence: tuple[Convergence, ...]
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str]
    absent: dict[str, int] = field(default_factory=dict)
    """Cases whose reference lacks a class."""

    @property
    def reference(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.arms if arm.role == "reference")

    def arm(self, name: str) -> Arm:
        """An arm by name."""
        return next(arm for arm in self.arms if arm.name == name)

    def baseline(self, name: str) -> Arm:
        """The arm that an arm is compared with."""
        return self.arm(self.arm(name).baseline or self.reference.name)

    def summary(self, arm: str, num_train: NumTrain, metric: str, class_name: str = MEAN_CLASS) -> Summary | None:
        """The summary of an arm at a size, or None where the arm was not run at it."""
        key = (arm, num_train, metric, class_name)
        found = (s for s in self.summaries if (s.arm, s.num_train, s.metric, s.class_name) == key)
        return next(found, None)

    def comparison(self, arm: str, num_train: NumTrain, metric: str, class_name: str = MEAN_CLASS) -> Comparison | None:
        """The comparison of an arm at a size, or None for the reference and for sizes that were not run."""
        key = (arm, num_train, metric, class_name)
        found = (c for c in self.comparisons if (c.arm, c.num_train, c.metric, c.class_name) == key)
        return next(found, None)


def save_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Writes `evaluation.json` into a folder, atomically, and returns its path."""
    path = folder / EVALUATION_FILE
    write_json(path, to_dict(evaluation))
    return path


def load_evaluation(path: Path) -> Evaluation:
    """Reads an `evaluation.json`, or the one in a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not an evaluation of this version.
    """
    path = path / EVALUATION_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no {EVALUATION_FILE} at {path}. Make one first: nnssl_evaluate -d DATASET -p PLANS ..."
        )
    return from_dict(Evaluation, read_json(path), str(path))
