"""The pretraining loop: it runs any task, and a run that is killed and resumed gives the same numbers.

An epoch is a number of optimiser steps, then a pass over fixed validation crops of held-out patients, then records and,
now and then, a checkpoint. Everything random is a function of the seed and the step, so a checkpoint needs no generator
states: the states of task, optimiser and scaler, the step, and the sums of the unfinished epoch are all there is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.lock import sole_writer
from nnssl_ext.core.random import seed_of
from nnssl_ext.core.records import write_json
from nnssl_ext.engine.checkpoint import build_checkpoint, load_resume, save_checkpoint
from nnssl_ext.engine.device import cpu_has_bf16, kernels
from nnssl_ext.engine.distributed import World, any_rank, current_world, gather, process_group
from nnssl_ext.engine.guard import Guard, RollBackError
from nnssl_ext.engine.prepare import Prepared, prepare
from nnssl_ext.engine.run import (
    RunSpec,
    content_hashes,
    log_file,
    validation_cases,
    write_config,
)
from nnssl_ext.engine.signals import StopRequest
from nnssl_ext.engine.steps import DivergedError, Meter, Stepper, Validation
from nnssl_ext.engine.timing import Stopwatch
from nnssl_ext.engine.tracking import Bar, Tracker
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.cases import with_partners
from nnssl_ext.loading.failures import FailedCases
from nnssl_ext.loading.loader import PatchLoader

logger = logging.getLogger(__name__)

MAX_VALIDATION_WORKERS = 2
PICTURE_EVERY = 10
"""Epochs between two pictures of reconstructions; the first and the last epoch always get one."""
MILLION = 1e6


class Outcome(Enum):
    """How a call of `pretrain` ended."""

    FINISHED = "finished"
    """The run is complete and `checkpoint_final.pth` is there."""
    STOPPED = "stopped"
    """A signal asked it to stop; a checkpoint to go on from is there."""


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Finished epochs: trained, validated and recorded."""
    step: int = 0
    """Optimiser steps taken."""
    best_loss: float = math.inf
    """Lowest validation loss so far."""
    meter: Meter = field(default_factory=Meter)
    """Sums of the epoch in hand."""

    def state(self) -> dict[str, Any]:
        """Builtins for a checkpoint."""
        sums, counts = dict(self.meter.sums), dict(self.meter.counts)
        return {"epoch": self.epoch, "step": self.step, "best_loss": self.best_loss, "sums": sums, "counts": counts}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What `state` gave."""
        meter = Meter(dict(state["sums"]), dict(state["counts"]))
        return cls(state["epoch"], state["step"], state["best_loss"], meter)


def pretrain(spec: RunSpec, after_step: Callable[[], object] = lambda: None) -> Outcome:
    """Pretrain as `spec` says, from the start or from the last checkpoint.

    Args:
        spec: The run.
        after_step: Called after every optimiser step of this call.

    Returns:
        How it ended.

    Raises:
        ValueError: What `prepare` refuses, another process that trains in this folder, a step that runs out of memory,
            or training that diverged.
        FileNotFoundError: Where the data is not preprocessed.
    """
    world = current_world()
    prepared = prepare(spec, world)
    if prepared.finished:
        logger.info("The run in %s is finished; there is nothing to go on with.", spec.folder)
        return Outcome.FINISHED
    device = prepared.device
    with ExitStack() as stack:
        if world.main:
            stack.enter_context(sole_writer(spec.folder))
        stack.enter_context(kernels(spec.settings.deterministic, device))
        stack.enter_context(process_group(world, device))
        stop = stack.enter_context(StopRequest())
        if world.main:
            stack.enter_context(log_file(prepared.folder.log))
        try:
            return _Run(spec, prepared, world, stop, after_step).run()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{device} is out of memory at patch {list(spec.configuration.patch_size)}, batch "
                f"{spec.configuration.batch_size}, {prepared.precision}. Use a smaller -batch_size with "
                f"--set accumulate=2, or plan with a lower -gpu_memory_target. {error}"
            ) from error


def _refuse_idle(metrics: Mapping[str, float]) -> None:
    """Refuses to train with a loss that asks for nothing, and so is 0 whatever the network does."""
    for name, share in metrics.items():
        if name.endswith("asked_share") and share == 0:
            raise ValueError(
                f"{name} is 0: no voxel of the validation crops is asked for, as all hidden blocks vary by less than "
                "target.background_std. Nothing can be learned: choose a smaller one, in the units of the images"
            )


def _judged(loss: float, best: float, validation: Validation) -> tuple[float, bool]:
    """The lowest loss so far, and whether this is it.

    Losses against a teacher's targets say nothing of each other, since the targets move: none of them is the best.
    """
    return min(best, loss), loss < best and "targets" not in validation.queue


class _Run:
    """One call of `pretrain` after the refusals."""

    def __init__(
        self, spec: RunSpec, prepared: Prepared, world: World, stop: StopRequest, after_step: Callable[[], object]
    ) -> None:
        self.spec, self.world, self.stop, self.after_step = spec, world, stop, after_step
        self.folder, self.store, self.split = prepared.folder, prepared.store, prepared.split
        self.device, self.precision = prepared.device, prepared.precision
        self.probe = prepared.probe
        self.trainer, self.settings = spec.trainer, spec.settings
        self.hashes = content_hashes(self.store, self.split)
        torch.manual_seed(seed_of(self.settings.seed, "torch", "initialisation"))
        task = self.trainer.build_task(spec.configuration, len(self.split.train)).to(self.device)
        self.stepper = Stepper(
            task,
            self.trainer,
            device=self.device,
            world=world,
            seed=self.settings.seed,
            precision=self.precision,
            compile_task=self.settings.compile,
            channels_last=self._channels_last(),
        )
        self.failed = FailedCases(len(self.split.train) + len(self.split.val))
        self.train, self.val = self._loader("training"), self._loader("validation")
        self.guard = Guard(self.stepper, self.folder.path, self.folder.latest, world.main)
        self.progress = self._resume()
        self.watch = Stopwatch(self.device)
        self.speed = self.watch.speed(0.0)

    def _channels_last(self) -> bool:
        wanted = self.settings.channels_last
        return self.device.type == "cpu" if wanted is None else wanted

    def _resume(self) -> Progress:
        if not self.spec.resume:
            return Progress()
        if not self.folder.latest.exists():
            logger.info("No checkpoint in %s yet: starting at the beginning.", self.folder.path)
            return Progress()
        progress = self._take_up(self.folder.latest)
        logger.info("Going on from epoch %d, step %d.", progress.epoch, progress.step)
        return progress

    def _take_up(self, path: Path) -> Progress:
        resume = load_resume(path)
        self.stepper.task.load_state_dict(resume["task"])
        self.stepper.load_state(resume)
        self.guard.load_state(resume["health"])
        return Progress.from_state(resume["progress"])

    def run(self) -> Outcome:
        """Train to the end, or until a signal."""
        if self.world.main:
            self._describe()
        with ExitStack() as stack:
            train, val = stack.enter_context(self.train), stack.enter_context(self.val)
            tracker = stack.enter_context(self._tracker()) if self.world.main else None
            bar = stack.enter_context(Bar(self.trainer.total_steps, self.progress.step, self.world.main))
            if not self._begin(train, val):
                logger.info("Stopped before the first step; begin again with --c.")
                return Outcome.STOPPED
            batches = train.batches(self.progress.step, self.trainer.total_steps)
            while self.progress.epoch < self.trainer.num_epochs:
                self.watch.restart(train.wait_seconds)
                try:
                    validation = self._train_epoch(batches, train, bar) and self._validate(val)
                except (RollBackError, DivergedError) as reason:
                    self._go_back(reason, tracker, bar)
                    batches = train.batches(self.progress.step, self.trainer.total_steps)
                    continue
                if not validation:
                    self._save_latest()
                    logger.info("Stopped after step %d; go on with --c.", self.progress.step)
                    return Outcome.STOPPED
                self._finish_epoch(validation, tracker, train)
        return Outcome.FINISHED

    def _begin(self, train: PatchLoader, val: PatchLoader) -> bool:
        """Let task and guard see what they ask for before the first step; False where a signal asked to stop."""
        if self.progress.step or self.guard.begun:
            return True
        num_cases = len(self.split.train)
        self.stepper.begin(train.batches, num_cases)
        return self.guard.begin(
            train.batches, num_cases, lambda: self._validate(val), self._stopping, self._resume_state
        )

    def _go_back(self, reason: RollBackError | DivergedError, tracker: Tracker | None, bar: Bar) -> None:
        """Take up an earlier state, and see to it that a run that is killed from now on does so too."""

        def restore(path: Path) -> int:
            self.progress = self._take_up(path)
            return self.progress.step

        self.guard.go_back(reason, self.progress.step, restore)
        self._save_latest()
        bar.rewind(self.progress.step)
        if tracker is not None:
            tracker.rewind(self.progress.epoch)

    def _train_epoch(self, batches: Iterator[Batch], loader: PatchLoader, bar: Bar) -> bool:
        """The steps that are left of the epoch in hand; False where a signal asked to stop."""
        self.speed = self.watch.speed(loader.wait_seconds)
        end = (self.progress.epoch + 1) * self.trainer.steps_per_epoch
        while self.progress.step < end:
            values = self.stepper.train_step(islice(batches, self.trainer.accumulate), self.progress.step)
            self.progress.step += 1
            self.progress.meter.add(values)
            self.guard.after_step(self.progress.step, self._resume_state)
            self.speed = self.watch.step(loader.wait_seconds)
            bar.step(values["loss"], self.speed)
            self.after_step()
            if self._stopping():
                return False
        return True

    def _validate(self, loader: PatchLoader) -> Validation | None:
        validation = self.stepper.validate(loader.batches(0, self.trainer.val_steps_per_epoch), self._stopping)
        if validation:
            _refuse_idle(validation.metrics)
        return validation

    def _stopping(self) -> bool:
        return any_rank(self.stop.requested, self.device)

    def _finish_epoch(self, validation: Validation, tracker: Tracker | None, loader: PatchLoader) -> None:
        self.failed.unite(gather(self.failed.reasons))
        progress, epoch = self.progress, self.progress.epoch
        means = progress.meter.means()
        rate = means.pop("lr")
        train = {f"train_{name}": value for name, value in means.items()}
        health = self.guard.after_epoch(validation)
        metrics = {"epoch": epoch, "step": progress.step, "lr": rate, **train, **validation.metrics, **health}
        progress.epoch, progress.meter = epoch + 1, Meter()
        progress.best_loss, improved = _judged(metrics["val_loss"], progress.best_loss, validation)
        last = progress.epoch == self.trainer.num_epochs
        verdict = "" if last else self.guard.verdict(validation, progress.step)
        if tracker is not None:
            timing = {"epoch": epoch, **self.speed, **self._times(loader)}
            tracker.epoch({**metrics, **({} if verdict else self._probed(last))}, timing)
            if validation.images is not None and (epoch == 0 or last or progress.epoch % PICTURE_EVERY == 0):
                tracker.reconstruction(epoch, validation.images, self.spec.configuration.spacing)
        if last:
            self.guard.end(progress.step)
        self._save_epoch(improved, last, stopped=bool(verdict))
        if verdict:
            raise ValueError(verdict)

    def _probed(self, last: bool) -> Mapping[str, float]:
        """The numbers of a probe, where one is due: before the checkpoint, so that a killed run makes it again."""
        if self.probe is None or not (last or self.progress.epoch % self.settings.probe_every == 0):
            return {}
        return self.probe(self.stepper.task.exported_encoder.eval())

    def _save_epoch(self, improved: bool, last: bool, stopped: bool) -> None:
        if improved and self.world.main:
            save_checkpoint(self.folder.best, self._checkpoint())
        if not last:
            if stopped or self.progress.epoch % self.settings.save_every == 0:
                self._save_latest()
        elif self.world.main:
            save_checkpoint(self.folder.final, self._checkpoint())
            self.folder.latest.unlink(missing_ok=True)
            self.guard.ring.remove()

    def _times(self, loader: PatchLoader) -> dict[str, float]:
        statistics = loader.statistics()
        degraded = statistics.num_degraded / max(statistics.num_crops, 1)
        times = self.watch.epoch(self.trainer.total_steps - self.progress.step)
        return {
            **times,
            "degraded_crop_share": degraded,
            "mean_foreground": statistics.mean_foreground,
            "unreadable_cases": len(self.failed.reasons),
            "replaced_samples": statistics.num_replaced,
        }

    def _save_latest(self) -> None:
        resume = self._resume_state()
        if self.world.main:
            save_checkpoint(self.folder.latest, self._checkpoint(resume))

    def _resume_state(self) -> dict[str, Any]:
        """All that going on needs; all ranks have to ask together."""
        return {
            "task": self.stepper.task.state_dict(),
            "progress": self.progress.state(),
            "health": self.guard.state(),
            **self.stepper.state(),
        }

    def _checkpoint(self, resume: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return build_checkpoint(
            self.stepper.task, self.trainer, self.spec.plan, content_hashes=self.hashes, resume=resume
        )

    def _loader(self, part: str) -> PatchLoader:
        train = part == "training"
        configuration, trainer, needs = self.spec.configuration, self.trainer, self.stepper.task.needs
        num_samples = trainer.val_steps_per_epoch * configuration.batch_size * self.world.size
        seed, workers = self.settings.seed, self.settings.num_workers
        cases = self.split.train if train else with_partners(self.store.entries, self.split.val, needs)
        return PatchLoader(
            self.store,
            cases if train else validation_cases(cases, num_samples, seed),
            configuration.patch_size,
            configuration.batch_size,
            seed=seed_of(seed, "loader", "train" if train else "val"),
            num_workers=workers if train else min(workers, MAX_VALIDATION_WORKERS),
            min_foreground=trainer.min_foreground,
            rank=self.world.rank,
            world_size=self.world.size,
            accumulate=trainer.accumulate if train else 1,
            parent_scale=self.stepper.task.parent_scale,
            needs=needs,
            partners=cases,
            name=part,
            failed=self.failed,
            device=self.device,
            weights=trainer.sampling_weights if train else "uniform",
            crops_per_case=trainer.crops_per_case if train else 1,
        )

    def _tracker(self) -> Tracker:
        return Tracker(
            self.folder.path,
            self.spec.title,
            self.trainer.num_epochs,
            self.progress.epoch,
            tensorboard=self.settings.tensorboard,
        )

    def _describe(self) -> None:
        """Write what the run is before it starts, and remove what a killed run left half written."""
        for leftover in self.folder.path.rglob(".tmp-*"):
            leftover.unlink()
        self.guard.forget_after(self.progress.step)
        write_config(self.folder, self.spec, self.world.size, self.precision)
        write_json(self.folder.splits, {"train": list(self.split.train), "val": list(self.split.val)})
        write_json(self.folder.hashes, {"content_hashes": self.hashes})
        configuration, trainer = self.spec.configuration, self.trainer
        batch = f"{configuration.batch_size} x {self.world.size} ranks x {trainer.accumulate} accumulated"
        parameters = sum(parameter.numel() for parameter in self.stepper.parameters) / MILLION
        logger.info("%s, in %s", self.spec.title, self.folder.path)
        logger.info("%d training and %d validation cases; batch %s", len(self.split.train), len(self.split.val), batch)
        logger.info(
            "Patch %s; %.1f M parameters; %s on %s",
            "x".join(map(str, configuration.patch_size)),
            parameters,
            self.precision,
            self.device,
        )
        if self.device.type == "cpu" and self.settings.precision == "auto" and cpu_has_bf16():
            logger.info("This processor computes in bf16: --precision bf16 takes about half the time.")
