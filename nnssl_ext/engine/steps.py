"""One optimiser step and one pass over the validation crops."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.core.random import SampleRandom, seed_of
from nnssl_ext.engine.device import autocast, loss_scaler
from nnssl_ext.engine.distributed import World, gather, mean_over_ranks
from nnssl_ext.engine.health import CaseQueue, merge
from nnssl_ext.engine.monitors import FeatureMonitor, summarise
from nnssl_ext.engine.optim import (
    build_optimizer,
    parameter_groups,
    set_learning_rate,
    set_weight_decay,
    size_factor,
    weight_decay_at,
)
from nnssl_ext.engine.schedules import schedule_factor
from nnssl_ext.engine.task import Embeddings, PretextTask, PretrainTrainer, StepOutput, Views
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.centre import Centre

logger = logging.getLogger(__name__)

Shown = tuple[Sequence[str], Embeddings | None]
"""The cases of a batch and what the task shows of them."""
MAX_SKIPPED_STEPS = 3
"""Steps in a row whose loss or gradient may be non-finite before the run gives up."""


@dataclass
class Meter:
    """Sums of named numbers over the steps of an epoch, exact enough to be saved and gone on with."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Adds one step's numbers; a name may be missing in some steps, a number that is not finite is left out."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each name over the steps that had it."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


class DivergedError(ValueError):
    """Loss or gradient were not finite so often that training has to begin again further back."""


@dataclass(frozen=True)
class Validation:
    """What a pass over the validation crops found."""

    metrics: dict[str, float]
    """Means of `val_loss` and `val_*`, and the feature monitors."""
    images: Mapping[str, torch.Tensor] | None
    """Pictures of the first batch, on this rank."""
    queue: Mapping[str, torch.Tensor]
    """The embeddings that the task showed, one row per case of all ranks; empty where it showed none."""


class Stepper:
    """A task with its optimiser, on a device, in a precision, in a world.

    Args:
        task: Already on its device.
        trainer: The resolved recipe.
        device: Where it trains.
        world: This process among the others.
        seed: Of the run.
        precision: A resolved precision.
        compile_task: Whether torch.compile compiles the forward pass.
        channels_last: Whether tensors lie in memory with the channels last.
    """

    def __init__(
        self,
        task: PretextTask,
        trainer: PretrainTrainer,
        *,
        device: torch.device,
        world: World,
        seed: int,
        precision: str,
        compile_task: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.task, self.trainer, self.device, self.world, self.seed = task, trainer, device, world, seed
        self.precision = precision
        self.memory_format = _memory_format(task.configuration.dims, channels_last)
        for parameter in task.parameters():
            parameter.data = self._laid_out(parameter.data)
        groups = parameter_groups(task.named_parameters(), trainer.optim, task.lr_scale)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(groups, trainer.optim)
        self.peak = trainer.optim.lr * size_factor(trainer.optim, sum(p.numel() for p in task.encoder.parameters()))
        self.scaler = loss_scaler(precision, device)
        self.plain: nn.Module = torch.compile(task) if compile_task else task  # type: ignore[assignment]
        self.module = self.plain if world.size == 1 else _distributed(self.plain, device)
        self.skipped_in_a_row = 0
        self.skipped_cases: list[list[str]] = []
        self.lr_factor = 1.0
        self.observe: Callable[[Sequence[str], Embeddings], None] = _look_away

    @torch.no_grad()
    def begin(self, batches: Callable[[int, int], Iterator[Batch]], num_cases: int) -> None:
        """Shows the task what it asks to see before the first step.

        Args:
            batches: Those of training, from one step up to another.
            num_cases: Cases trained on.
        """
        wanted = min(self.task.first_look, num_cases)
        if not wanted:
            return
        logger.info("Looking at %d training cases before the first step.", wanted)
        rows = self.task.configuration.batch_size * self.task.needs.images * self.trainer.accumulate * self.world.size
        read = (batch.to(self.device) for batch in batches(0, -(-wanted * self.trainer.crops_per_case // rows)))
        self.task.begin((batch, SampleRandom(self.seed, 0, batch.samples).child("begin")) for batch in read)

    def train_step(self, batches: Iterable[Batch], step: int) -> dict[str, float]:
        """One optimiser step over `accumulate` batches.

        Args:
            batches: The micro-batches of this step, of equal size.
            step: Optimiser step from 0.

        Returns:
            `loss`, the task's metrics, `gradient_norm` and `lr`, averaged over micro-batches and ranks.

        Raises:
            DivergedError: Where loss or gradient were not finite `MAX_SKIPPED_STEPS` times in a row.
        """
        self.task.train()
        self._reseed("train", step)
        total = self.trainer.total_steps
        peak, schedule = self.lr_factor * self.peak, self.trainer.schedule
        rate = set_learning_rate(self.optimizer, peak, lambda role: schedule_factor(schedule, step, total, role))
        set_weight_decay(self.optimizer, weight_decay_at(self.trainer.optim, step / total))
        self.optimizer.zero_grad(set_to_none=True)
        values, seen = self._backward(list(batches), step)
        norm = self._update()
        values = {**values, "gradient_norm": norm, "lr": rate}
        if self._is_finite(values, step, [case for cases, _ in seen for case in cases]):
            for cases, shown in seen:
                if shown is not None:
                    self.observe(cases, shown)
        with torch.no_grad():
            self.task.after_step(step, total)
        return values

    def _backward(self, batches: Sequence[Batch], step: int) -> tuple[dict[str, float], list[Shown]]:
        outputs: list[dict[str, torch.Tensor]] = []
        seen: list[Shown] = []
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            random = SampleRandom(self.seed, step, batch.samples).child("train")
            with nullcontext() if last else self._no_sync():
                output = self._forward(batch, random, train=True)
                self.scaler.scale(output.loss.float() / len(batches)).backward()
            outputs.append(_scalars(output))
            seen.append((batch.cases, output.embeddings))
        return self._average(outputs), seen

    def _forward(self, batch: Batch, random: SampleRandom, train: bool) -> StepOutput:
        views = self._views(batch, random, train)
        with autocast(self.precision, self.device):
            return (self.module if train else self.plain)(views)

    @torch.no_grad()
    def _views(self, batch: Batch, random: SampleRandom, train: bool) -> Views:
        views = self.task.views(batch.to(self.device), random, train)
        if self.trainer.sham:
            views = self.task.sham(views, random.child("sham"))
        return {name: self._laid_out(view) for name, view in views.items()}

    def _update(self) -> float:
        clip = self.trainer.optim.clip or math.inf
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _is_finite(self, values: Mapping[str, float], step: int, cases: Sequence[str]) -> bool:
        numbers = [values["loss"]] if self.scaler.is_enabled() else [values["loss"], values["gradient_norm"]]
        if all(map(math.isfinite, numbers)):
            self.skipped_in_a_row, self.skipped_cases = 0, []
            return True
        self.skipped_in_a_row += 1
        self.skipped_cases.append(list(cases))
        logger.warning("Step %d skipped: loss or gradient is not finite on cases %s.", step, ", ".join(cases))
        if self.skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"The loss or its gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row, up to step {step}: "
                f"training diverged. Lower the learning rate (now {values['lr']:.3g}), for example "
                f"--set optim.lr={self.trainer.optim.lr / 2:.3g}, or train with --precision fp32."
            )
        return False

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], stop: Callable[[], bool]) -> Validation | None:
        """Evaluate the task on validation crops in eval mode, without augmentation, with the same draws every epoch.

        Args:
            batches: Of the validation loader.
            stop: Asked after every batch; the same on every rank.

        Returns:
            Means over all batches and ranks with the feature monitors; None where it was stopped.
        """
        self.task.eval()
        self._reseed("validation", 0)
        meter, monitor, images = Meter(), FeatureMonitor(), None
        queue = CaseQueue(self.trainer.health.queue)
        for batch in batches:
            batch = batch.to(self.device)
            random = SampleRandom(self.seed, 0, batch.samples).child("validation")
            output = self._forward(batch, random, train=False)
            meter.add(self._average([_scalars(output)]))
            if output.embeddings is not None:
                queue.add(batch.cases, output.embeddings)
            size, each = self.task.configuration.patch_size, self.task.needs.images
            with autocast(self.precision, self.device):  # of every sample its first image
                data, valid = self._laid_out(centre(batch.data[::each], size)), centre(batch.valid[::each], size)
                monitor.add(self.task.encoder, data, valid, batch.cases[::each])
            images = output.images if images is None else images
            if stop():
                return None
        metrics = {f"val_{name}": value for name, value in meter.means().items()}
        shown = merge(gather(queue.state()), queue.capacity)["rows"]
        return Validation(metrics | summarise(gather(monitor.state())), images, shown)

    @torch.no_grad()
    def show(self, batch: Batch) -> Embeddings | None:
        """What the task shows of a batch of training views as it is now; it learns nothing of it."""
        self.task.eval()
        self._reseed("health", 0)
        views = self._views(batch, SampleRandom(self.seed, 0, batch.samples).child("health"), train=True)
        with autocast(self.precision, self.device):
            return self.plain(views).embeddings

    @contextmanager
    def filled(self, batches: Iterable[Batch]) -> Iterator[None]:
        """Within it, running moments and centres are those of these batches, as the task is now; then all is as it was.

        An untrained network has none, and what it shows without them says nothing of what it shows from step 2 on.
        """
        before = {name: buffer.clone() for name, buffer in self.task.named_buffers()}
        with torch.no_grad():
            for batch in batches:
                self.task.train()
                self._reseed("health", 0)
                views = self._views(batch, SampleRandom(self.seed, 0, batch.samples).child("moments"), train=True)
                with autocast(self.precision, self.device):
                    self.task(views)
            for module in self.task.modules():
                if isinstance(module, Centre):
                    module.update(0.0)
            try:
                yield
            finally:
                for name, buffer in self.task.named_buffers():
                    buffer.copy_(before[name])

    def _average(self, outputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        names = sorted(outputs[0])
        rows = torch.stack([torch.stack([output[name] for name in names]) for output in outputs])
        return dict(zip(names, mean_over_ranks(rows.mean(0)).tolist(), strict=True))

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != self.task.configuration.dims + 2 or not tensor.is_floating_point():
            return tensor
        return tensor.contiguous(memory_format=self.memory_format)

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def _reseed(self, purpose: str, step: int) -> None:
        torch.manual_seed(seed_of(self.seed, "torch", purpose, step, self.world.rank))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of the optimiser and the scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "lr_factor": self.lr_factor,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped_in_a_row, self.skipped_cases = state["skipped_in_a_row"], []
        self.lr_factor = state["lr_factor"]


def _look_away(cases: Sequence[str], embeddings: Embeddings) -> None:
    """Nobody watches."""


def centre(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle of a tensor (B, C, *shape), of that size: what a patch sees of a larger crop."""
    for axis, edge in enumerate(size, start=2):
        tensor = tensor.narrow(axis, (tensor.shape[axis] - edge) // 2, edge)
    return tensor


def _memory_format(dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last_3d if dims == 3 else torch.channels_last


def _distributed(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def _scalars(output: StepOutput) -> dict[str, torch.Tensor]:
    return {"loss": output.loss.detach().float(), **{n: v.detach().float() for n, v in output.metrics.items()}}
