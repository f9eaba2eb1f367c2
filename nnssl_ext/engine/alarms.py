"""When the health of joint embeddings is alarming, and what is to be done about it: pure functions of the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nnssl_ext.core.checks import at_least, within

Response = Literal["sharpen", "soften", "spread", "anchor"]
"""What the monitor may ask of a task: `sharpen` flat targets (a slower centre, the teacher's first temperature, at last
fewer prototypes); `soften` targets that are all the same (centre momentum .99, a temperature .01 higher); `spread` the
embeddings (twice the KoLeo weight); `anchor` the tokens (Gram) to the weights as they are when it is asked."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When the collapse monitor of joint-embedding tasks sounds, and what it may do; see `engine.health`."""

    act: bool = True
    """Whether it turns knobs and rolls back; if not, it warns."""
    every: int = 50
    """Steps between two looks, 1 or more."""
    queue: int = 512
    """Most cases that are looked at, 8 or more."""
    min_cases: int = 8
    """With fewer cases nothing is judged, 3 or more."""
    warmup_steps: int = 1500
    """Steps without alarms at the start; at most a tenth of the run."""
    flat_entropy: float = 0.98
    """Targets whose entropy exceeds this share of ln K are flat, in (0, 1]."""
    flat_steps: int = 1000
    """Steps of flat targets that are alarming; at most a tenth of the run."""
    high_entropy: float = 0.5
    """Targets that say nothing are sharpened where their entropy exceeds this share of ln K, else softened."""
    information: float = 0.1
    """Least mutual information of targets and cases, in nats."""
    information_share: float = 0.02
    """Least mutual information as a share of ln min(prototypes, cases)."""
    rank_warn: float = 0.1
    """Least effective rank as a share of the untrained network's. Learning four kinds of texture took it to .15, and to
    .08 at ten times the rate."""
    rank_fail: float = 0.07
    """The same, where the run goes back."""
    between: float = 0.5
    """Least share of variance between cases, as a multiple of the untrained network's. Learning textures raised it, or
    left it at .9 (`VoCoTrainer`)."""
    between_fail: float = 0.2
    """The same, where the run goes back."""
    token_spread: float = 0.25
    """Least spread of a volume's tokens as a share of that after the warm-up."""
    min_cases_to_stop: int = 16
    """Held-out cases that it takes to stop a run whose views of a case do not find each other."""
    min_steps_to_stop: int = 1000
    """Steps that it takes, 0 or more; at least a tenth of the run. Descriptors first lose what tells crops apart."""
    max_interventions: int = 3
    """Most automatic interventions of a run, 0 or more."""

    def __post_init__(self) -> None:
        at_least(self, "health.", every=1, queue=8, min_cases=3, max_interventions=0, flat_steps=1, min_steps_to_stop=0)
        at_least(self, "health.", high_entropy=0, information=0, information_share=0, token_spread=0)
        within(self, "(0, 1]", "health.flat_entropy")
        for fail, warn in (("rank_fail", "rank_warn"), ("between_fail", "between")):
            if not getattr(self, fail) <= getattr(self, warn):
                raise ValueError(
                    f"health.{fail}={getattr(self, fail)} must not exceed health.{warn}={getattr(self, warn)}: a run "
                    "goes back only after the warning."
                )


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something is wrong."""

    name: str
    """The statistic."""
    value: float
    limit: float
    """What it crossed."""
    diagnosis: str
    """In words."""
    responses: tuple[Response, ...] = ()
    """Knobs to ask the task for."""
    slower: bool = False
    """Whether the learning rate is halved."""
    warning: bool = False
    """Whether it is a first sign, by which a run is not yet ill."""
    roll_back: bool = False
    """Whether the run goes back to an earlier state. Where no knob turns there, the learning rate is halved."""


def judge(
    now: Mapping[str, float],
    untrained: Mapping[str, float],
    settled: Mapping[str, float],
    flat_steps: int,
    patience: int,
    config: HealthConfig,
) -> list[Alarm]:
    """What is alarming, the gravest first: what sends the run back, what slows it down, the rest, and then warnings.

    Args:
        now: The statistics after the warm-up.
        untrained: Those of the network at step 0.
        settled: The first ones after the warm-up.
        flat_steps: Steps for which the targets have been flat.
        patience: Steps after which flat targets are alarming.
        config: The thresholds.
    """
    if "not_finite" in now:
        return [_broken(now["not_finite"])]
    alarms = [*_spreads(now, untrained, settled, config), *_targets(now, flat_steps, patience, config)]
    return sorted(alarms, key=lambda alarm: (not alarm.roll_back, not alarm.slower, alarm.warning))


def _broken(number: float) -> Alarm:
    words = f"embeddings of {number:.0f} cases are not finite, though the loss is"
    return Alarm(name="not_finite", value=number, limit=0.0, diagnosis=words, slower=True, roll_back=True)


def _fallen(
    name: str, words: str, now: Mapping[str, float], untrained: Mapping[str, float], warn: float, fail: float
) -> list[Alarm]:
    """An alarm where a statistic is below shares of the untrained network's: to warn, or to go back."""
    if name not in now or name not in untrained:
        return []
    value, before = now[name], untrained[name]
    grave = value < fail * before
    limit = (fail if grave else warn) * before
    if not value < limit:
        return []
    return [
        Alarm(
            name=name,
            value=value,
            limit=limit,
            diagnosis=f"{words} {value:.3f}, untrained {before:.3f}",
            responses=("spread",),
            slower=grave,
            warning=not grave,
            roll_back=grave,
        )
    ]


def _spreads(
    now: Mapping[str, float], untrained: Mapping[str, float], settled: Mapping[str, float], config: HealthConfig
) -> list[Alarm]:
    words = "embeddings use few directions: effective rank"
    alarms = _fallen("rank", words, now, untrained, config.rank_warn, config.rank_fail)
    words = "cases differ less, beside their views, than untrained:"
    alarms += _fallen("between_share", words, now, untrained, config.between, config.between_fail)
    if "token_spread" in now and "token_spread" in settled:
        value, limit = now["token_spread"], config.token_spread * settled["token_spread"]
        if value < limit:
            words = f"the tokens of a volume become one: {value:.3f}, after the warm-up {settled['token_spread']:.3f}"
            alarms.append(
                Alarm(
                    name="token_spread",
                    value=value,
                    limit=limit,
                    diagnosis=words,
                    responses=("anchor",),
                    roll_back=True,
                )
            )
    return alarms


def _targets(now: Mapping[str, float], flat_steps: int, patience: int, config: HealthConfig) -> list[Alarm]:
    if "target_entropy" not in now:
        return []
    flat = now["target_entropy"]
    if flat_steps >= patience:
        words = f"targets are flat: entropy {flat:.3f} of ln K for {flat_steps} steps"
        limit = config.flat_entropy
        return [Alarm(name="target_entropy", value=flat, limit=limit, diagnosis=words, responses=("sharpen",))]
    nats, share = now["mutual_information"], now["mutual_information_share"]
    if nats >= config.information and share >= config.information_share:
        return []
    words = f"targets say nothing about their case: {nats:.3f} nat, {share:.3f} of the most possible"
    high = flat > config.high_entropy
    response: Response = "sharpen" if high else "soften"
    return [
        Alarm(
            name="mutual_information",
            value=nats,
            limit=config.information,
            diagnosis=words,
            responses=(response,),
            slower=not high,
            roll_back=not high,
        )
    ]
