"""The tasks that a comparison consists of, from what was planned: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnssl_ext.core.records import to_dict
from nnssl_ext.evaluation import comparison_jobs as jobs
from nnssl_ext.evaluation.comparison_plan import Method, Planned, code_of
from nnssl_ext.evaluation.comparison_settings import epochs_of


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where runs are carried out."""

    device: str = "cpu"
    precision: str = "auto"
    num_workers: int = 0
    """Processes that read crops, for each run."""
    gpus: tuple[str, ...] = ()
    """CUDA devices that workers share out among themselves."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A pretraining run with what is made of it."""

    method: Method
    seed: int
    task: jobs.PretrainingTask

    @property
    def key(self) -> str:
        """Unique within the comparison."""
        return f"{self.method.short}-{self.task.tag}"


def pretraining_jobs(planned: Planned, costs: Mapping[str, Mapping[str, float]], machine: Machine) -> list[Job]:
    """Every pretraining run, seed by seed, so that an interrupted comparison has whole seeds."""
    rows = []
    for seed in planned.settings.seeds:
        for method in planned.methods:
            steps = method.protocol.steps or int(costs[method.code]["steps"])
            task = pretraining_task(planned, method, steps, seed, machine)
            rows.append(Job(method=method, seed=seed, task=task))
    return rows


def pretraining_task(planned: Planned, method: Method, steps: int, seed: int, machine: Machine) -> jobs.PretrainingTask:
    """A run of a method for a seed."""
    num_epochs, steps_per_epoch = epochs_of(steps)
    code = code_of(method.code, num_epochs, steps_per_epoch, machine.device, machine.precision)
    tag = f"{code}-s{seed}"
    return jobs.PretrainingTask(
        dataset=planned.pretrain_dataset,
        plans=method.plan.plans_name,
        configuration=method.configuration.name,
        trainer=method.trainer,
        settings=method.protocol.settings,
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=method.protocol.batch_size,
        sham=method.sham,
        tag=tag,
        seed=seed,
        device=machine.device,
        precision=machine.precision,
        num_workers=machine.num_workers,
        gpus=machine.gpus,
        log_file=planned.folder / "logs" / f"pretraining-{method.short}-{tag}.log",
    )


def probe_tasks(planned: Planned, runs: Sequence[Job]) -> dict[str, jobs.ProbeTask]:
    """Probes of every run, and of what each started from, by name."""
    probe = planned.settings.probe
    pool, test = planned.probe_cases()
    windows = probe.patch_size or planned.patch_size
    code = code_of(to_dict(probe), pool, test, windows)
    contents = code_of([planned.made_of[case] for case in (*pool, *test)])
    tasks = {}
    for job in runs:
        for name, checkpoint in ((job.key, job.task.checkpoint), (random_key(job.method, job.seed), None)):
            key = f"{name}-{code}"
            tasks[key] = jobs.ProbeTask(
                checkpoint=checkpoint,
                plans_path=planned.plans_path(job.method),
                configuration=job.method.configuration.name,
                seed=job.seed,
                dataset=planned.dataset,
                pool=pool,
                test=test,
                contents=contents,
                patch_size=windows,
                config=to_dict(probe.config),
                log_file=planned.folder / "logs" / f"probe-{key}.log",
                target=planned.folder / "probes" / f"{key}.json",
            )
    return tasks


def random_key(method: Method, seed: int) -> str:
    """Name of the probe of the encoder that a run starts from, which methods on the same network share."""
    return f"random-{code_of(method.configuration.architecture, method.preparation)}-s{seed}"


def arm_pattern(planned: Planned, job: Job) -> str:
    """Plans name of a method's arm, with a field for the seed."""
    return planned.arm_pattern(job.method, job.task.tag.removesuffix(f"-s{job.seed}"))


def finetuning_task(planned: Planned, job: Job, name: str, *, from_scratch: bool) -> jobs.FinetuningTask:
    """The plans of an arm: of a run's checkpoint, or of its network without weights."""
    settings = planned.settings.finetuning
    return jobs.FinetuningTask(
        dataset=planned.dataset,
        name=name,
        checkpoint=job.task.checkpoint,
        from_scratch=from_scratch,
        sham=job.method.sham,
        transfer=job.method.protocol.transfer,
        mode=settings.mode,
        patch_size=planned.patch_size,
        batch_size=settings.batch_size,
        splits=[to_dict(split) for split in planned.splits],
        splits_file=planned.settings.splits,
        seed=job.seed,
        settings=settings.settings,
        plans_path=planned.preprocessed / f"{name}.json",
        log_file=planned.folder / "logs" / f"plan-{name}.log",
    )
