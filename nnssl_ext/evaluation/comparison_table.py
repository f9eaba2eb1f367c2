"""What all runs of a comparison left behind, as the rows of its table and its conclusions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

import numpy as np

from nnssl_ext.core.records import read_json, to_dict
from nnssl_ext.evaluation import comparison_jobs as jobs
from nnssl_ext.evaluation import comparison_verdict, learning
from nnssl_ext.evaluation.comparison_plan import Method, Planned
from nnssl_ext.evaluation.comparison_records import MethodComparison, MethodResult
from nnssl_ext.evaluation.comparison_tasks import Job, Machine, arm_pattern, random_key
from nnssl_ext.evaluation.provenance import versions
from nnssl_ext.evaluation.records import Evaluation
from nnssl_ext.evaluation.statistics import Array, mean_over_patients
from nnssl_ext.evaluation.verdict import listed


def conclude(
    planned: Planned,
    runs: Sequence[Job],
    probes: Mapping[str, jobs.ProbeTask],
    costs: Mapping[str, Mapping[str, float]],
    evaluation: Evaluation,
    command: str,
    machine: Machine,
) -> MethodComparison:
    """Ranking, sentences and the table, from what all runs left behind."""
    settings = planned.settings
    methods = tuple(_Table(planned, runs, probes, costs, evaluation).rows())
    rankings = comparison_verdict.rank_arms(
        evaluation.cases,
        {arm.name: arm.label for arm in evaluation.arms},
        planned.num_train,
        comparison_verdict.reservations_about(evaluation),
    )
    return MethodComparison(
        name=planned.folder.name,
        dataset=planned.dataset,
        pretrain_dataset=planned.pretrain_dataset,
        budget=settings.budget.text,
        sham=settings.sham,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        device=machine.device,
        seeds=settings.seeds,
        folds=planned.folds,
        num_train=planned.num_train,
        finetuning={**to_dict(settings.finetuning), "patch_size": list(planned.patch_size)},
        probe=to_dict(settings.probe),
        methods=methods,
        rankings=rankings,
        headline=comparison_verdict.headline(rankings),
        certainty=comparison_verdict.certainty(rankings, len(settings.seeds)),
        conditions=comparison_verdict.CONDITIONS,
        warnings=(*planned.warnings, *_not_learned(methods), *evaluation.warnings),
        versions=versions(),
    )


class _Table:
    """The rows of the methods, from the records of their runs."""

    def __init__(
        self,
        planned: Planned,
        runs: Sequence[Job],
        probes: Mapping[str, jobs.ProbeTask],
        costs: Mapping[str, Mapping[str, float]],
        evaluation: Evaluation,
    ) -> None:
        self.planned, self.runs, self.costs = planned, runs, costs
        self.arms = {arm.label: arm.name for arm in evaluation.arms}
        self.probes = {key.rpartition("-")[0]: task.target for key, task in probes.items()}

    def rows(self) -> list[MethodResult]:
        """Without pretraining first, then the methods, then their sham runs."""
        own = [method for method in self.planned.methods if not method.sham]
        self.luck = {
            control: learning.luck((self._own(method), scores(method)) for method in own)
            for control, scores in (("sham", self._of_sham), ("random", self._random))
        }
        return [self._scratch(*pair) for pair in self.planned.networks.items()] + [
            self._method(method) for method in self.planned.methods
        ]

    def _dice(self, keys: Mapping[int, str]) -> dict[int, Array]:
        patients = self.planned.manifest.subjects()
        records = {seed: read_json(self.probes[key]) for seed, key in keys.items()}
        return {
            seed: mean_over_patients(learning.case_dice(row["dice"]), [patients[case] for case in row["cases"]])
            for seed, row in records.items()
        }

    def _random(self, method: Method) -> dict[int, Array]:
        return self._dice({seed: random_key(method, seed) for seed in self.planned.settings.seeds})

    def _own(self, method: Method) -> dict[int, Array]:
        return self._dice({job.seed: job.key for job in self._runs_of(method)})

    def _of_sham(self, method: Method) -> dict[int, Array]:
        """Of a method's sham run; nothing for one that is a sham run itself, or has none."""
        controls = (m for m in self.planned.methods if m.sham and not method.sham and m.trainer == method.trainer)
        return next((self._own(control) for control in controls), {})

    def _runs_of(self, method: Method) -> list[Job]:
        return [job for job in self.runs if job.method == method]

    def _scratch(self, network: str, method: Method) -> MethodResult:
        label = self.planned.scratch_label(network)
        return MethodResult(
            label=label,
            trainer="",
            sham=False,
            arm=self.arms[label],
            network=method.configuration.backbone,
            scratch=label,
            protocol={},
            steps=0,
            seconds_per_step=None,
            gate="-",
            pretext="-",
            probe=_means(self._random(method)),
            over_random=None,
            over_sham=None,
            verdict="-",
            commands=self._commands(self.arms[label]),
        )

    def _method(self, method: Method) -> MethodResult:
        mine = self._runs_of(method)
        dice = self._own(method)
        control = next((m for m in self.planned.methods if m.sham and m.trainer == method.trainer), None)
        blind = self._runs_of(control) if control is not None and not method.sham else []
        over_sham = learning.compare(dice, self._of_sham(method), f"{method.label} sham", self.luck["sham"])
        gate, pretext = learning.gate([_pretext(job) for job in mine], [_pretext(job) for job in blind])
        cost = self.costs[method.code]
        task = mine[0].task
        pattern = self.arms.get(method.label)
        commands = (jobs.as_line(task.command), *(self._commands(self._plans_of(method)) if pattern else ()))
        return MethodResult(
            label=method.label,
            trainer=method.trainer,
            sham=method.sham,
            arm=pattern,
            network=method.configuration.backbone,
            scratch=self.planned.scratch_label(method.network),
            protocol={
                "plans": method.plan.plans_name,
                "configuration": method.configuration.name,
                "patch_size": list(method.configuration.patch_size),
                "batch_size": method.batch_size,
                "settings": list(method.protocol.settings),
                "transfer": method.protocol.transfer,
            },
            steps=task.num_epochs * task.steps_per_epoch,
            seconds_per_step=float(cost["seconds_per_step"]),
            gate=gate,
            pretext=pretext,
            probe=_means(dice),
            over_random=learning.compare(dice, self._random(method), f"{method.label} random", self.luck["random"]),
            over_sham=over_sham,
            verdict="-" if method.sham else learning.verdict(over_sham, gate),
            commands=commands,
        )

    def _plans_of(self, method: Method) -> str:
        job = self._runs_of(method)[0]
        return arm_pattern(self.planned, job).format(seed=job.seed)

    def _commands(self, plans_name: str) -> tuple[str, ...]:
        report = read_json(self.planned.preprocessed / f"{plans_name}_report.json")
        return (jobs.as_line(report["command"]),)


def _not_learned(methods: Sequence[MethodResult]) -> list[str]:
    """A warning that names the methods that are not shown to beat chance, where there are any."""
    failed = [row.label for row in methods if row.gate in (learning.FAILED, learning.NOT_SHOWN) and not row.sham]
    if not failed:
        return []
    return [
        f"Not shown to beat chance at their own task on held-out cases: {listed(failed)}. What such "
        "weights add may not be what the method is meant to teach."
    ]


def _means(dice: Mapping[int, Array]) -> dict[int, float]:
    return {seed: float(np.nanmean(values)) for seed, values in dice.items()}


def _pretext(job: Job) -> dict[str, list[float]]:
    """Metrics of a run's last epoch on held-out cases, beside what they should beat."""
    lines = (job.task.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return learning.pretext_metrics(json.loads(lines[-1]))
