"""Collapse of joint embeddings, seen before the run is wasted: what is measured, when it is alarming, what is done.

A task that pulls views together can fall into giving all cases one embedding, all cases one target, or every target
flat. Its loss shows none of these, so the embeddings themselves are watched: over a queue with one entry per case,
filled by the passes that are made anyway. Projector outputs are looked at, not the encoder's: a randomly initialised
CNN with instance normalisation maps all cases to nearly one pooled feature, and still trains well. For the same reason
alarms are relative to the values that the untrained network has, wherever no floor is known.

What may follow from an alarm is a knob of the task (`PretextTask.respond`), half the learning rate, an earlier state of
the run. All thresholds are settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from nnssl_ext.core.random import generator, seed_of
from nnssl_ext.engine.alarms import Alarm, HealthConfig, judge
from nnssl_ext.engine.distributed import gather
from nnssl_ext.engine.monitors import effective_rank
from nnssl_ext.engine.task import Embeddings

NUM_RESAMPLES = 1000
INTERVAL = (0.025, 0.975)
SHORTEST_PART = 10
"""Times that are given in steps are at most this part of a run: else a short one never leaves its warm-up."""
NEAR_PERFECT = 0.95
"""An untrained network that finds the other view so well leaves nothing to tell an improvement by."""
FIELDS = tuple(field.name for field in fields(Embeddings))


def relative_entropy(targets: torch.Tensor) -> float:
    """Mean entropy of the targets as a share of the largest there is: 0 all sure, 1 all flat.

    Args:
        targets: Probabilities (N, K), K above 1.
    """
    return float(entropy(targets).mean() / math.log(num_open(targets)))


def num_open(targets: torch.Tensor) -> int:
    """Prototypes in use, 2 or more: those out of use have a probability of exactly 0 in all targets (N, K)."""
    return max(2, int(targets.any(0).sum()))


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """In nats, of the last axis."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def mutual_information(targets: torch.Tensor) -> tuple[float, float]:
    """How much a target says about its case: the entropy of the mean target less the mean entropy of the targets.

    Args:
        targets: Probabilities (N, K), one row per case.

    Returns:
        In nats, 0 where all targets are alike; and as a share of the most there can be, ln min(N, prototypes in use).
    """
    nats = max(float(entropy(targets.mean(0)) - entropy(targets).mean()), 0.0)
    most = min(len(targets), num_open(targets))
    return nats, nats / math.log(most) if most > 1 else 0.0


def between_share(first: torch.Tensor, second: torch.Tensor) -> float:
    """Variance between cases as a share of that between cases and between the views of a case, in [0, 1].

    Rank alone misses embeddings that shrink towards one point while their directions stay; here the views' differences
    are the measure.

    Args:
        first: (N, D), one view of each case.
        second: (N, D), another view of each.

    Returns:
        0 where all embeddings are equal.
    """
    first, second = first.double(), second.double()
    within = (first - second).square().sum(1).mean() / 2
    between = ((first + second) / 2).var(0, correction=0).sum()
    return float(between / (between + within).clamp(min=torch.finfo(torch.float64).tiny))


def reciprocal_ranks(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One over the place of each case's second view among those of all cases, by cosine to the first: (N,).

    Equal similarities share the mean of their places, so a collapse to one point is no success.

    Args:
        first: (N, D).
        second: (N, D).
    """
    centre = torch.cat([first, second]).mean(0)
    similarities = functional.normalize(first - centre, dim=1) @ functional.normalize(second - centre, dim=1).T
    own = similarities.diagonal()[:, None]
    ahead, level = (similarities > own).sum(1), (similarities == own).sum(1)
    return 1 / (1 + ahead + (level - 1) / 2)


def chance_of_reciprocal_rank(num_cases: int) -> float:
    """The mean reciprocal rank of random places among so many."""
    return sum(1 / place for place in range(1, num_cases + 1)) / num_cases


def bootstrap_interval(values: torch.Tensor) -> tuple[float, float]:
    """95% percentile bootstrap of the mean over cases; the same for the same values."""
    numbers = values.double().numpy()
    drawn = generator("health", "bootstrap").integers(0, len(numbers), (NUM_RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(1), INTERVAL)
    return float(low), float(high)


class CaseQueue:
    """The newest embeddings of each case, without gradient, as many cases as fit.

    Case names stay out of it, since it goes into checkpoints: cases go by a hash.

    Ranks that train together call `add` equally often, so the number of the call tells what is newest among all.

    Args:
        capacity: Cases that are kept; the one that was seen longest ago makes room.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clock = 0
        self.seen: dict[int, int] = {}
        self.rows: dict[int, dict[str, torch.Tensor]] = {}

    def add(self, cases: Sequence[str], embeddings: Embeddings) -> None:
        """Takes one row per case, where it lies: nothing is copied between devices."""
        values = {name: getattr(embeddings, name) for name in FIELDS}
        present = {name: value.detach().float() for name, value in values.items() if value is not None}
        self.clock += 1
        for row, case in enumerate(cases):
            key = seed_of("health", case)
            self.seen[key], self.rows[key] = self.clock, {name: value[row] for name, value in present.items()}
        self._make_room()

    def take(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes the rows of another queue that are no older than its own, onto that device."""
        values = {name: value.to(device) for name, value in state["rows"].items()}
        for row, (key, seen) in enumerate(zip(state["keys"], state["seen"], strict=True)):
            if seen >= self.seen.get(key, 0):
                self.seen[key], self.rows[key] = seen, {name: value[row] for name, value in values.items()}
        self.clock = max(self.clock, state["clock"])
        self._make_room()

    def _make_room(self) -> None:
        surplus = len(self.rows) - self.capacity
        if surplus > 0:
            for key in sorted(self.rows, key=lambda key: (self.seen[key], key))[:surplus]:
                del self.rows[key], self.seen[key]

    def state(self) -> dict[str, Any]:
        """Builtins and tensors on the CPU, `rows` with one row per case in the order of their keys."""
        keys = sorted(self.rows)
        names = list(self.rows[keys[0]]) if keys else []
        rows = {name: torch.stack([self.rows[key][name] for key in keys]).cpu() for name in names}
        return {"clock": self.clock, "keys": keys, "seen": [self.seen[key] for key in keys], "rows": rows}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes up what `state` gave, on the device that later rows will come from: rows of two cannot be stacked."""
        self.clock, self.seen, self.rows = 0, {}, {}
        self.take(state, device)


def merge(states: Sequence[Mapping[str, Any]], capacity: int) -> dict[str, Any]:
    """The queues of all ranks as the state of one: of each case the newest row, the same however cases are spread."""
    queue = CaseQueue(capacity)
    for state in states:
        queue.take(state, torch.device("cpu"))
    return queue.state()


def finite_rows(queue: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of a merged queue that are finite throughout: a loss may be finite where an embedding is not."""
    if not queue:
        return {}
    finite = torch.stack([value.isfinite().view(len(value), -1).all(1) for value in queue.values()]).all(0)
    return {name: value[finite] for name, value in queue.items()}


def statistics(shown: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The numbers of health of the merged queue; those that cannot be told are absent.

    Rows that are not finite are left out, and counted as `not_finite`.
    """
    if not shown:
        return {}
    queue = finite_rows(shown)
    not_finite = len(shown["first"]) - len(queue["first"])
    found = _of_finite(queue) if len(queue["first"]) else {"num_cases": 0.0}
    return {**found, "not_finite": float(not_finite)} if not_finite else found


def _of_finite(queue: Mapping[str, torch.Tensor]) -> dict[str, float]:
    first, second, targets = queue["first"], queue["second"], queue.get("targets")
    found = {"between_share": between_share(first, second), "num_cases": float(len(first))}
    rank = effective_rank(first)
    if rank is not None:
        found["rank"] = rank
    if "token_spread" in queue:
        found["token_spread"] = float(queue["token_spread"].mean())
    if targets is not None and targets.shape[1] > 1:
        found["target_entropy"] = relative_entropy(targets)
        found["mutual_information"], found["mutual_information_share"] = mutual_information(targets)
    return found


@dataclass(frozen=True)
class Retrieval:
    """How well the views of held-out cases find each other: the mean reciprocal rank, its interval and its chance."""

    mean: float
    low: float
    high: float
    num_cases: int

    @classmethod
    def of(cls, queue: Mapping[str, torch.Tensor]) -> Retrieval:
        """That of the finite rows of the merged queue of a validation; 0 where there are none."""
        rows = finite_rows(queue)
        ranks = reciprocal_ranks(rows["first"], rows["second"])
        if not len(ranks):
            return cls(0.0, 0.0, 0.0, 0)
        return cls(float(ranks.mean()), *bootstrap_interval(ranks), len(ranks))

    def metrics(self) -> dict[str, float]:
        """To be logged."""
        return {"same_case_mrr": self.mean, "same_case_mrr_chance": chance_of_reciprocal_rank(self.num_cases)}


class Monitor:
    """Watches a run; a task that shows no embeddings is never judged.

    Args:
        config: Thresholds.
        total: Optimiser steps of the run.
    """

    def __init__(self, config: HealthConfig, total: int) -> None:
        self.config = config
        self.queue = CaseQueue(config.queue)
        self.warmup = min(config.warmup_steps, total // SHORTEST_PART)
        self.patience = min(config.flat_steps, max(total // SHORTEST_PART, 1))
        self.judged_at = max(total // SHORTEST_PART, config.min_steps_to_stop)
        self.untrained: dict[str, float] = {}
        self.settled: dict[str, float] = {}
        self.retrieval: Retrieval | None = None
        self.flat_since: int | None = None
        self.quiet_until = 0
        self.history: list[dict[str, Any]] = []

    def observe(self, cases: Sequence[str], embeddings: Embeddings) -> None:
        """Takes what a step of training shows."""
        self.queue.add(cases, embeddings)

    def measure(self) -> dict[str, float]:
        """The statistics of the queues of all ranks; none where nothing was shown."""
        return statistics(self._all_ranks()["rows"])

    def _all_ranks(self) -> dict[str, Any]:
        return merge(gather(self.queue.state()), self.queue.capacity)

    def begin(self, retrieval: Retrieval) -> None:
        """The queue holds the untrained network's embeddings now, and this is how they find each other."""
        self.untrained, self.retrieval = self.measure(), retrieval

    def due(self, step: int) -> bool:
        """Whether it is time to look after so many steps."""
        return bool(self.queue.rows) and step % self.config.every == 0 and step > self.warmup

    def look(self, step: int) -> list[Alarm]:
        """What is alarming after so many steps, the gravest first."""
        now = self.measure()
        if now["num_cases"] + now.get("not_finite", 0.0) < self.config.min_cases:
            return []
        if "not_finite" not in now:
            self.settled = self.settled or now
        flat = now.get("target_entropy", 0.0) > self.config.flat_entropy
        self.flat_since = (step if self.flat_since is None else self.flat_since) if flat else None
        flat_steps = 0 if self.flat_since is None else step - self.flat_since
        return judge(now, self.untrained, self.settled, flat_steps, self.patience, self.config)

    def quiet(self, step: int) -> bool:
        """Whether the last intervention still has time to help: alarms are not answered so soon."""
        return step < self.quiet_until

    def intervened(self, step: int, resumed_at: int, record: dict[str, Any]) -> None:
        """Keeps an intervention, and gives it time."""
        self.history.append({"step": step, **record})
        self.quiet_until, self.flat_since = resumed_at + self.patience, None

    @property
    def tried(self) -> int | None:
        """Steps of the state that the run last went back to; None where it never did."""
        steps = (record["resumed_at"] for record in reversed(self.history) if record["resumed_at"] < record["step"])
        return next(steps, None)

    @property
    def may_intervene(self) -> bool:
        """Whether there are interventions left."""
        return self.config.act and len(self.history) < self.config.max_interventions

    def lost(self, now: Retrieval, step: int, last_step: int) -> str:
        """Why the run is not worth going on with, once a tenth is over; empty where it is, or where nobody can tell.

        That views find each other no better than untrained is no proof, since a network may have given up what tells
        crops apart for what they share: they must find each other no better than by chance.

        Args:
            now: Of the validation after `step` steps.
            step: Steps taken.
            last_step: Steps taken at the validation before.
        """
        before = self.retrieval
        if before is None or not last_step < self.judged_at <= step or before.high >= NEAR_PERFECT:
            return ""
        if now.mean > before.high or now.num_cases < self.config.min_cases_to_stop:
            return ""
        chance = chance_of_reciprocal_rank(now.num_cases)
        if now.low > chance:
            return ""
        return (
            f"After {step} steps the views of a held-out case find each other no better than untrained, nor than by "
            f"chance: mean reciprocal rank {now.mean:.3f} [{now.low:.3f}, {now.high:.3f}], chance {chance:.3f}, "
            f"untrained {before.mean:.3f} [{before.low:.3f}, {before.high:.3f}] over {now.num_cases} cases. Look at "
            "the health_ numbers in metrics.jsonl. The usual cure is to train anew, beside it by -tag NAME, with a "
            "lower --set optim.lr or a longer warm-up; --c goes on in spite of it"
        )

    def state(self) -> dict[str, Any]:
        """Builtins and tensors for a checkpoint, of all ranks, which have to ask together."""
        return {
            "queue": self._all_ranks(),
            "untrained": self.untrained,
            "settled": self.settled,
            "retrieval": None if self.retrieval is None else vars(self.retrieval),
            "flat_since": self.flat_since,
            "quiet_until": self.quiet_until,
            "history": self.history,
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes up what `state` gave, on the device of training."""
        self.queue.load_state(state["queue"], device)
        self.untrained, self.settled = dict(state["untrained"]), dict(state["settled"])
        self.retrieval = None if state["retrieval"] is None else Retrieval(**state["retrieval"])
        self.flat_since, self.quiet_until = state["flat_since"], state["quiet_until"]
        self.history = [dict(record) for record in state["history"]]
