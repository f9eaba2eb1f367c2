"""Acts on alarms while a run goes on: turns a knob, slows down, or goes back to a state that was well."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.engine.alarms import Alarm, Response
from nnssl_ext.engine.distributed import gather
from nnssl_ext.engine.health import Monitor, Retrieval
from nnssl_ext.engine.recovery import Ring, keep_interventions, write_intervention
from nnssl_ext.engine.steps import DivergedError, Stepper, Validation
from nnssl_ext.loading.batch import Batch

logger = logging.getLogger(__name__)

SLOWER = 0.5
"""Factor on the learning rate where the answer is to slow down."""


class RollBackError(Exception):
    """An alarm whose answer is an earlier state of the run.

    Args:
        alarm: The one that is answered.
        diagnosis: Of all alarms.
    """

    def __init__(self, alarm: Alarm, diagnosis: str) -> None:
        super().__init__(diagnosis)
        self.alarm = alarm


class Guard:
    """Watches a run and intervenes, a few times at most; every intervention is a line of `interventions.jsonl`.

    Every rank sees the same statistics and does the same; rank 0 writes.

    Args:
        stepper: Of the run.
        folder: Of the run.
        latest: Its checkpoint to go on from: what a task that shows no embeddings goes back to.
        main: Whether this process writes files.
    """

    def __init__(self, stepper: Stepper, folder: Path, latest: Path, main: bool) -> None:
        self.stepper, self.folder, self.latest, self.main = stepper, folder, latest, main
        trainer = stepper.trainer
        self.monitor = Monitor(trainer.health, trainer.total_steps)
        self.ring = Ring(folder / "ring")
        self.interval = Ring.interval(trainer.total_steps, trainer.steps_per_epoch, trainer.health.every)
        self.num_records = 0
        stepper.observe = self.monitor.observe

    def state(self) -> dict[str, Any]:
        """Builtins and tensors for a checkpoint; all ranks have to ask together."""
        return {"monitor": self.monitor.state(), "num_records": self.num_records}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.monitor.load_state(state["monitor"], self.stepper.device)
        self.num_records = state["num_records"]

    def forget_after(self, step: int) -> None:
        """Removes states and records that a run killed after so many steps will make again, perhaps otherwise."""
        self.ring.forget_after(step)
        keep_interventions(self.folder, self.num_records)

    @property
    def begun(self) -> bool:
        """Whether the untrained network was measured: the run may have gone back to it."""
        return bool(self.monitor.untrained)

    def begin(
        self,
        batches: Callable[[int, int], Iterator[Batch]],
        num_cases: int,
        validate: Callable[[], Validation | None],
        stop: Callable[[], bool],
        resume: Callable[[], dict[str, Any]],
    ) -> bool:
        """Measures the untrained network, if its task shows embeddings, and keeps it to go back to.

        It is measured with running moments and centres of its own: an embedding without them is another one.

        Args:
            batches: Those of training, from one step up to another.
            num_cases: Cases trained on.
            validate: One pass over the validation crops; None where it was stopped.
            stop: Asked before every batch; the same on every rank.
            resume: Makes a state to go on from; all ranks call it together.

        Returns:
            False where it was stopped.
        """
        shown = [(len(batch.cases), self.stepper.show(batch)) for batch in batches(0, 1)]
        if any(each is None for _, each in shown):
            return True
        wanted = min(self.monitor.config.queue, num_cases)
        end = -(-wanted // (sum(rows for rows, _ in shown) * self.stepper.world.size))
        logger.info("Looking at the untrained network: up to %d training cases, then the validation crops.", wanted)

        def until_stopped() -> Iterator[Batch]:
            return takewhile(lambda _: not stop(), batches(0, end))

        with self.stepper.filled(until_stopped()):
            for batch in until_stopped():
                self._see(batch)
            validation = None if stop() else validate()
        if validation is None:
            return False
        self.monitor.begin(Retrieval.of(validation.queue))
        self._keep(0, resume)
        return True

    def _see(self, batch: Batch) -> None:
        shown = self.stepper.show(batch)
        if shown is not None:
            self.monitor.observe(batch.cases, shown)

    def after_step(self, step: int, resume: Callable[[], dict[str, Any]]) -> None:
        """Looks, answers, and keeps states that gave no alarm.

        Args:
            step: Steps taken.
            resume: Makes a state to go on from; all ranks call it together.

        Raises:
            RollBackError: Where the run has to go back; `go_back` does it.
        """
        if self.stepper.skipped_in_a_row:
            self._write({"step": step, "event": "skipped", "cases": self.stepper.skipped_cases[-1]})
            return
        if not self.monitor.due(step):
            return
        alarms = self.monitor.look(step)
        if alarms and not self.monitor.quiet(step):
            self._answer(alarms, step)
        elif not alarms and step % self.interval == 0:
            self._keep(step, resume)

    def _keep(self, step: int, resume: Callable[[], dict[str, Any]]) -> None:
        """Keeps the state after so many steps, where the run may still go back to it."""
        if self.monitor.may_intervene:
            state = resume()
            if self.main:
                self.ring.save(step, state)

    def _earlier(self) -> Path | None:
        """The state to go back to; None where there is none."""
        return self.ring.newest(self.monitor.tried) or (self.latest if self.latest.exists() else None)

    def _answer(self, alarms: Sequence[Alarm], step: int) -> None:
        """Tries one alarm after the other until something changes."""
        words = _diagnosis(alarms)
        logger.warning("Step %d: %s.", step, words)
        if not self.monitor.may_intervene:
            return
        for alarm in alarms:
            if alarm.roll_back and self.ring.newest() is not None:
                raise RollBackError(alarm, words)
            changes, turned = self._turn(alarm)
            if changes:
                self._record(step, step, alarm, words, changes, turned)
                return

    def _turn(self, alarm: Alarm) -> tuple[list[str], list[Response]]:
        """What was changed, in words, and the responses that the task knew."""
        said = {response: self._respond(response) for response in alarm.responses}
        turned = [response for response, words in said.items() if words]
        changes = [said[response] for response in turned]
        if alarm.slower or (alarm.roll_back and not turned):  # else the run would repeat what it did, bit for bit
            self.stepper.lr_factor *= SLOWER
            changes.insert(0, f"learning rate {self.stepper.lr_factor:g} times the recipe's")
        return changes, turned

    @torch.no_grad()
    def _respond(self, response: Response) -> str:
        return self.stepper.task.respond(response)

    def _record(
        self, step: int, resumed_at: int, alarm: Alarm, words: str, changes: list[str], turned: list[Response]
    ) -> None:
        record = {
            "event": "intervention",
            "statistic": alarm.name,
            "value": alarm.value if math.isfinite(alarm.value) else None,
            "limit": alarm.limit,
            "diagnosis": words,
            "changes": changes,
            "responses": turned,
            "lr_factor": self.stepper.lr_factor,
            "resumed_at": resumed_at,
        }
        self.monitor.intervened(step, resumed_at, record)
        logger.warning("Intervened: %s; going on after step %d.", "; ".join(changes), resumed_at)
        self._write({"step": step, **record})

    def _write(self, record: dict[str, Any]) -> None:
        self.num_records += 1
        if self.main:
            write_intervention(self.folder, record)

    def go_back(
        self,
        reason: RollBackError | DivergedError,
        step: int,
        restore: Callable[[Path], int],
    ) -> None:
        """Goes back to a state that was well, with the knobs turned since, and turns those of the alarm.

        That is the newest, or the one before it where the newest did not help. All ranks have read it when this
        returns on any.

        Args:
            reason: Why.
            step: Steps taken.
            restore: Takes up a checkpoint; gives the steps taken there.

        Raises:
            DivergedError: The reason itself, where nothing can be done any more.
        """
        path = self._earlier()
        if path is None or not self.monitor.may_intervene:
            raise reason
        if isinstance(reason, DivergedError):
            cases = self.stepper.skipped_cases[-1]
            self._write({"step": step + 1, "event": "skipped", "cases": cases})
            alarm = Alarm(name="loss", value=math.nan, limit=0.0, diagnosis=str(reason), slower=True, roll_back=True)
        else:
            alarm = reason.alarm
        tried = self.monitor.tried
        history, factor, num_records = self.monitor.history, self.stepper.lr_factor, self.num_records
        resumed_at = restore(path)
        gather("restored")  # what every rank has read, rank 0 may write anew
        if self.main:
            self.ring.forget_after(resumed_at)
        for past in history[len(self.monitor.history) :]:
            for response in past["responses"]:
                self._respond(response)
        self.monitor.history, self.stepper.lr_factor, self.num_records = history, factor, num_records
        changes, turned = self._turn(replace(alarm, slower=alarm.slower or resumed_at == tried))
        self._record(step, resumed_at, alarm, str(reason), [f"back to step {resumed_at}", *changes], turned)

    def after_epoch(self, validation: Validation) -> dict[str, float]:
        """The numbers of health to log; none of a task that shows no embeddings."""
        if not validation.queue:
            return {}
        measured = {f"health_{name}": value for name, value in self.monitor.measure().items()}
        return {**measured, **Retrieval.of(validation.queue).metrics()}

    def verdict(self, validation: Validation, step: int) -> str:
        """Why the run is to be stopped after so many steps, an epoch's last; empty where it goes on.

        It is asked once: a run that is resumed after it goes on.
        """
        if not validation.queue or not self.monitor.config.act:
            return ""
        last_step = step - self.stepper.trainer.steps_per_epoch
        diagnosis = self.monitor.lost(Retrieval.of(validation.queue), step, last_step)
        if diagnosis:
            self._write({"step": step, "event": "stopped", "diagnosis": diagnosis})
        return diagnosis

    def end(self, step: int) -> None:
        """Says so where an alarm, more than a warning, sounds after the last step, and nothing was left to try."""
        if not self.monitor.queue.rows or not self.monitor.config.act or self.monitor.may_intervene:
            return
        alarms = self.monitor.look(step)
        if not all(alarm.warning for alarm in alarms):
            words = _diagnosis(alarms)
            self._write({"step": step, "event": "gave up", "diagnosis": words})
            logger.warning("The run ends ill, after %d interventions: %s.", len(self.monitor.history), words)


def _diagnosis(alarms: Sequence[Alarm]) -> str:
    return "; ".join(alarm.diagnosis for alarm in alarms)
