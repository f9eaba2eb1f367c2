"""What `comparison.json` holds: the methods, what each cost and learned, their ranking, and what can be said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.records import from_dict, read_json, to_dict, write_json
from nnssl_ext.evaluation.comparison_statistics import RankTest
from nnssl_ext.evaluation.learning import Difference
from nnssl_ext.evaluation.records import Comparison, NumTrain
from nnssl_ext.evaluation.statistics import Interval

COMPARISON_FILE = "comparison.json"
REPORT_FILE = "comparison.html"
TABLE_FILE = "comparison.md"


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of the comparison: a method, a control run of one, or no pretraining at all."""

    label: str
    trainer: str
    """Empty for a network that was not pretrained."""
    sham: bool
    arm: str | None
    """Its arm in `evaluation.json`; None where it was not fine-tuned."""
    network: str
    """`cnn` or `vit`."""
    scratch: str
    """Label of the row without pretraining on the same network."""
    protocol: dict[str, Any]
    """Plans, patch, batch and settings of the pretraining; empty without one."""
    steps: int
    seconds_per_step: float | None
    """Measured once, before the first run."""
    gate: str
    """Whether the pretext metrics beat their chance on held-out cases: the words of `learning.gate`."""
    pretext: str
    """Those metrics beside their chance, as text."""
    probe: dict[int, float]
    """Mean Dice of the linear probe on its frozen features, by seed."""
    over_random: Difference | None
    """Its probe minus that of the network it started from."""
    over_sham: Difference | None
    """Its probe minus that of its own sham run."""
    verdict: str
    """What the difference to the sham run says."""
    commands: tuple[str, ...]
    """What does the same by hand, for the first seed."""

    @property
    def probe_mean(self) -> float | None:
        """Over seeds."""
        return sum(self.probe.values()) / len(self.probe) if self.probe else None


@dataclass(frozen=True, kw_only=True)
class RankedArm:
    """One arm at one training set size."""

    label: str
    mean: float
    """Dice over cases and seeds."""
    interval: Interval
    seed_means: tuple[float, ...]
    probabilities: tuple[float, ...]
    """Of each rank, the first one first: shares of the resamples of seeds and patients."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms on the same cases: the first has the higher mean."""

    first: str
    second: str
    row: Comparison
    """First minus second; Holm's correction is over all pairs and sizes."""
    seeds_in_favour: int
    """Seeds in which the first has the higher mean."""
    decided: bool
    """Whether interval, test and luck of the seeds all speak for the difference."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All fine-tuned arms at one training set size, best first."""

    num_train: NumTrain
    arms: tuple[RankedArm, ...]
    num_cases: int
    pairs: tuple[Pair, ...]
    over_cases: RankTest | None
    """Blocks are patients, averaged over cases and seeds: speaks about the trained networks. In the order of `arms`."""
    over_seeds: RankTest | None
    """Blocks are seeds, averaged over cases: speaks about the methods."""
    sentences: tuple[str, ...]
    """What can be said."""
    reservation: str = ""
    """Who had not finished learning, as the end of a sentence; empty: nobody."""

    def pair(self, first: str, second: str) -> Pair | None:
        """Two arms by label, in either order."""
        return next((p for p in self.pairs if {p.first, p.second} == {first, second}), None)


@dataclass(frozen=True, kw_only=True)
class MethodComparison:
    """Everything that one comparison of methods found."""

    name: str
    dataset: str
    pretrain_dataset: str
    budget: str
    sham: str
    created: str
    """UTC, ISO 8601."""
    command: str
    device: str
    seeds: tuple[int, ...]
    folds: tuple[int, ...]
    num_train: tuple[NumTrain, ...]
    finetuning: dict[str, Any]
    probe: dict[str, Any]
    methods: tuple[MethodResult, ...]
    rankings: tuple[Ranking, ...]
    headline: str
    certainty: str
    conditions: tuple[str, ...]
    """What each kind of statistics is conditional on."""
    warnings: tuple[str, ...]
    versions: dict[str, str]

    def method(self, label: str) -> MethodResult:
        """A row by label."""
        return next(row for row in self.methods if row.label == label)


def save_comparison(comparison: MethodComparison, folder: Path) -> Path:
    """Writes `comparison.json` into a folder, atomically, and returns its path."""
    path = folder / COMPARISON_FILE
    write_json(path, to_dict(comparison))
    return path


def load_comparison(path: Path) -> MethodComparison:
    """Reads a `comparison.json`, or the one in a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a comparison of this version.
    """
    path = path / COMPARISON_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no {COMPARISON_FILE} at {path}. Make one first: nnssl_compare -d DATASET -tr ...")
    return from_dict(MethodComparison, read_json(path), str(path))
