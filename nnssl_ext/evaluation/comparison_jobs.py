"""The jobs of a comparison that run in workers: measure a step, pretrain, probe, plan fine-tuning.

Each is a module-level function of plain data, writes one whole output atomically and does nothing where that is there.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from nnssl_ext.core.paths import find_dataset, preprocessed_root, raw_root, run_folder
from nnssl_ext.core.records import file_hash, read_json, write_json
from nnssl_ext.evaluation.training import use_gpu

WARM_UP_STEPS, MEASURED_STEPS = 2, 8
"""Steps of the run that measures a step: those that are not counted, and those that are."""
SHAM_SUFFIX = "-sham"
MADE_OF = "made_of"
"""In the record of a probe: what it was made of."""


@dataclass(frozen=True, kw_only=True)
class PretrainingTask:
    """One pretraining run: what `command` says."""

    dataset: str
    plans: str
    configuration: str
    trainer: str
    settings: tuple[str, ...]
    num_epochs: int
    steps_per_epoch: int
    batch_size: int | None
    sham: bool
    tag: str
    seed: int
    device: str
    precision: str
    num_workers: int
    gpus: tuple[str, ...]
    log_file: Path
    """Receives what is printed."""

    @property
    def folder(self) -> Path:
        """The run's folder, the same as the command's."""
        name = f"{self.trainer}{SHAM_SUFFIX if self.sham else ''}-{self.tag}"
        return run_folder(self.dataset, name, self.plans, self.configuration)

    @property
    def checkpoint(self) -> Path:
        """The finished run's checkpoint."""
        return self.folder / "checkpoint_final.pth"

    @property
    def command(self) -> list[str]:
        """The words of the command that does the same."""
        words = ["nnssl_train", self.dataset, self.configuration, "-tr", self.trainer, "-p", self.plans]
        words += ["--set", *self.settings] if self.settings else []
        words += ["-num_epochs", str(self.num_epochs), "-steps_per_epoch", str(self.steps_per_epoch)]
        words += ["-batch_size", str(self.batch_size)] if self.batch_size is not None else []
        words += ["--sham"] if self.sham else []
        words += ["-tag", self.tag, "--seed", str(self.seed), "--save_every", "1", "--no_tensorboard", "--c"]
        return [
            *words,
            *("-device", self.device, "--precision", self.precision, "-num_workers", str(self.num_workers)),
        ]


def run_spec(task: PretrainingTask) -> Any:
    """The `RunSpec` of a run, the same as its command's."""
    from nnssl_ext.engine.run import RunSettings, RunSpec
    from nnssl_ext.engine.task import TRAINERS
    from nnssl_ext.planners.plan import Plan

    folder = find_dataset(task.dataset, preprocessed_root())
    plan = Plan.load(folder / f"{task.plans}.json")
    configuration = plan.configuration(task.configuration)
    if task.batch_size is not None:
        configuration = replace(configuration, batch_size=task.batch_size)
    length = [f"num_epochs={task.num_epochs}", f"steps_per_epoch={task.steps_per_epoch}", *["sham=true"] * task.sham]
    return RunSpec(
        trainer=TRAINERS.get(task.trainer).configured([*task.settings, *length], configuration.backbone),
        plan=plan,
        configuration=configuration,
        data_folder=folder / configuration.data_identifier,
        folder=task.folder,
        settings=RunSettings(
            seed=task.seed,
            device=task.device,
            precision=task.precision,  # type: ignore[arg-type] # checked by the engine
            num_workers=task.num_workers,
            save_every=1,
            tensorboard=False,
        ),
        resume=True,
    )


def pretrain_method(task: PretrainingTask) -> None:
    """Pretrains, or goes on with it; `config.json` names the command that does the same.

    Raises:
        ValueError: What the engine refuses, or a run that a signal has stopped.
    """
    from nnssl_ext.engine.loop import Outcome, pretrain

    with _worker(task.device, task.gpus, task.log_file), _command_line(task.command):
        if pretrain(run_spec(task)) is Outcome.STOPPED:
            raise ValueError(f"{task.folder} was stopped by a signal; the same command goes on")


def measure_step(task: PretrainingTask) -> float:
    """Seconds of an optimiser step: on a CPU of this process's own time, else of the wall clock.

    One short run in a temporary folder, and the clock after each of its steps: starting, validating and saving lie
    before the first or after the last.

    Raises:
        ValueError: What the engine refuses, or where the clock measured nothing.
    """
    from nnssl_ext.engine.loop import pretrain

    clock = time.process_time if task.device == "cpu" else time.perf_counter
    ends: list[float] = []
    with _worker(task.device, task.gpus, task.log_file), tempfile.TemporaryDirectory(prefix="nnssl_step_") as folder:
        spec = run_spec(replace(task, num_epochs=1, steps_per_epoch=WARM_UP_STEPS + MEASURED_STEPS))
        spec = replace(spec, trainer=replace(spec.trainer, val_steps_per_epoch=1), folder=Path(folder))
        pretrain(spec, lambda: ends.append(clock()))
    return usual_step(ends)


def usual_step(ends: Sequence[float]) -> float:
    """Median duration of the steps after those that warm up, so that one slow step counts like any other.

    Args:
        ends: When each step ended, in seconds.

    Raises:
        ValueError: If it is not above 0, or there are no such steps.
    """
    seconds = [after - before for before, after in pairwise(ends[WARM_UP_STEPS - 1 :])]
    if not seconds or not (usual := median(seconds)) > 0:
        raise ValueError(f"a step cannot be measured: {len(ends)} steps ended at {list(ends)} seconds. Try once more")
    return usual


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """One encoder to be probed."""

    checkpoint: Path | None
    """None: the encoder that a run of that seed starts from."""
    plans_path: Path
    """Plans of the pretraining; used without a checkpoint."""
    configuration: str
    seed: int
    dataset: str
    """Raw dataset with labels."""
    pool: tuple[str, ...]
    """Cases to learn from."""
    test: tuple[str, ...]
    contents: str
    """Code of the files of both."""
    patch_size: tuple[int, ...]
    """Windows of a U-Net."""
    config: dict[str, Any]
    """Of `ProbeConfig`."""
    log_file: Path
    target: Path
    """Receives the record."""

    @property
    def done(self) -> bool:
        """Whether its record is there, and is of the checkpoint and the files that are there now."""
        return self.target.is_file() and read_json(self.target).get(MADE_OF) == self.made_of

    @property
    def made_of(self) -> list[str | None]:
        """Hash of the checkpoint, and the code of the cases' files."""
        return [None if self.checkpoint is None else file_hash(self.checkpoint), self.contents]


def probe_method(task: ProbeTask) -> None:
    """Probes frozen features by labels and writes classes, cases and Dice (subsets, cases, classes)."""
    from nnssl_ext.core.records import from_dict
    from nnssl_ext.dataset.manifest import Manifest
    from nnssl_ext.downstream.frozen import load_frozen, random_frozen
    from nnssl_ext.downstream.probing import ProbeConfig
    from nnssl_ext.evaluation.probes import probe_record
    from nnssl_ext.planners.plan import Plan

    made_of = task.made_of
    with _worker("cpu", (), task.log_file):
        if task.checkpoint is None:
            plan = Plan.load(task.plans_path)
            frozen = random_frozen(plan, plan.configuration(task.configuration), task.seed)
        else:
            frozen = load_frozen(task.checkpoint)
        manifest = Manifest.load(find_dataset(task.dataset, raw_root()))
        config = from_dict(ProbeConfig, task.config)
        record = probe_record(frozen, manifest, task.pool, task.test, patch_size=task.patch_size, config=config)
    write_json(task.target, {**record, MADE_OF: made_of})


@dataclass(frozen=True, kw_only=True)
class FinetuningTask:
    """Plans of one arm, for one seed or, from scratch, for all."""

    dataset: str
    name: str
    """The plans become `ptPlans__NAME`."""
    checkpoint: Path
    from_scratch: bool
    sham: bool
    transfer: str
    mode: str
    patch_size: tuple[int, ...]
    batch_size: int | None
    splits: list[dict[str, Any]]
    splits_file: Path | None
    seed: int
    settings: tuple[str, ...]
    plans_path: Path
    log_file: Path


def plan_arm(task: FinetuningTask) -> None:
    """Writes the plans and adapted weights of an arm, as `nnssl_plan_finetuning` does.

    Nothing where they are, unless the pretraining was done again since.
    """
    from nnssl_ext.core.records import from_dict
    from nnssl_ext.dataset.splits import Split
    from nnssl_ext.engine.checkpoint import load_checkpoint
    from nnssl_ext.finetuning.nnunet_plans import parse_settings, plan_finetuning

    if task.plans_path.is_file():
        made_of = read_json(task.plans_path)["pretrain_info"].get("checkpoint_hash")
        if task.from_scratch or made_of == file_hash(task.checkpoint):
            return
    transfer = task.transfer
    if transfer == "auto":
        trained = not task.from_scratch and load_checkpoint(task.checkpoint)["nnssl_pretraining"]["trains_decoder"]
        transfer = "encoder_decoder" if trained else "encoder"
    with _worker("cpu", (), task.log_file):
        plan_finetuning(
            task.dataset,
            task.checkpoint,
            task.name,
            mode=task.mode,  # type: ignore[arg-type] # checked when the settings were read
            transfer=transfer,  # type: ignore[arg-type]
            patch_size=task.patch_size,
            batch_size=task.batch_size,
            from_scratch=task.from_scratch,
            allow_sham=task.sham,
            splits=[from_dict(Split, split) for split in task.splits],
            command=finetuning_command(task, transfer),
            **parse_settings([*task.settings, f"seed={task.seed}"]),
        )


def finetuning_command(task: FinetuningTask, transfer: str) -> list[str]:
    """The words of the command that makes the same plans."""
    words = ["nnssl_plan_finetuning", "-d", task.dataset, "-pc", str(task.checkpoint), "-n", task.name]
    words += ["-m", task.mode, "-patch_size", *map(str, task.patch_size)]
    words += ["-batch_size", str(task.batch_size)] if task.batch_size is not None else []
    words += ["--from_scratch"] if task.from_scratch else ["-transfer", transfer]
    words += ["--allow_sham"] if task.sham else []
    words += ["--splits", str(task.splits_file)] if task.splits_file else []
    return [*words, "--set", *task.settings, f"seed={task.seed}"]


@contextlib.contextmanager
def _worker(device: str, gpus: Sequence[str], log_file: Path) -> Iterator[None]:
    """One thread on a CPU, a GPU of its own, and what is printed into a file."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    use_gpu(gpus, log_file.parent)
    with log_file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


@contextlib.contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """What a run records as its command, while it goes."""
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before


def as_line(words: Sequence[str]) -> str:
    """The words of a command as one types them."""
    return shlex.join(words)
