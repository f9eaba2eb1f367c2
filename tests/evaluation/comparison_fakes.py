"""Scores of made-up arms, and a comparison made of them."""

from types import SimpleNamespace

import numpy as np

from nnssl_ext.core.random import generator
from nnssl_ext.core.records import to_dict
from nnssl_ext.evaluation import comparison_verdict
from nnssl_ext.evaluation.comparison_records import MethodComparison, MethodResult
from nnssl_ext.evaluation.comparison_settings import FinetuningProtocol, ProbeProtocol
from nnssl_ext.evaluation.learning import Difference
from nnssl_ext.evaluation.metrics import ClassScores
from nnssl_ext.evaluation.records import CaseScores

LEVELS = {"scratch": 0.70, "MAE": 0.76, "Spark": 0.75, "DINOv2": 0.69, "MAE sham": 0.71}
SEEDS = (0, 1, 2)


def case_scores(levels=LEVELS, sizes=(5, 20), num_cases=24, seeds=SEEDS, luck=0.008) -> list[CaseScores]:
    """Dice around a level for every arm: hard and easy cases, lucky and unlucky seeds."""
    rows = []
    for size in sizes:
        hard = generator("cases", str(size)).normal(0, 0.04, num_cases)
        for arm, level in levels.items():
            random = generator(arm, str(size))
            shifts = random.normal(0, luck, len(seeds))
            for seed, shift in zip(seeds, shifts, strict=True):
                values = level + shift + hard + random.normal(0, 0.01, num_cases) + 0.001 * (size == 20)
                rows += [
                    CaseScores(
                        arm=f"ptPlans__{arm}",
                        num_train=size,
                        seed=seed,
                        fold=case % 2,
                        case=f"case_{case:02d}",
                        classes={
                            "organ": ClassScores(
                                dice=float(value), nsd=None, hd95=None, reference_voxels=9, predicted_voxels=9
                            )
                        },
                    )
                    for case, value in enumerate(values)
                ]
    return rows


def method(label: str, seeds=SEEDS) -> MethodResult:
    sham, scratch = label.endswith("sham"), label == "scratch"
    level = {"scratch": 0.35, "MAE": 0.55, "Spark": 0.46, "DINOv2": 0.40}.get(label, 0.45)
    difference = Difference(level - 0.35, level - 0.37, level - 0.33, 0.03, len(seeds))
    return MethodResult(
        label=label,
        trainer="" if scratch else f"{label.removesuffix(' sham')}Trainer",
        sham=sham,
        arm=f"ptPlans__{label}",
        network="cnn",
        scratch="scratch",
        protocol={}
        if scratch
        else {
            "plans": "nnsslPlans",
            "configuration": "3d_fullres",
            "patch_size": [32, 40, 24],
            "batch_size": 2,
            "settings": ["optim.lr=1e-3", "val_steps_per_epoch=10"],
            "transfer": "auto",
        },
        steps=0 if scratch else 500,
        seconds_per_step=None if scratch else 0.2345,
        gate="-" if scratch else "passed",
        pretext="-" if scratch else "mse 0.512 (chance 0.998)",
        probe={seed: level + 0.01 * seed for seed in seeds},
        over_random=None if scratch else difference,
        over_sham=None if scratch or sham else Difference(level - 0.45, level - 0.5, level - 0.4, 0.03, len(seeds)),
        verdict="-" if scratch or sham else "no gain over sham shown",
        commands=() if scratch else (f"nnssl_train 1 3d_fullres -tr {label}Trainer", "nnssl_plan_finetuning -d 4"),
    )


def make_comparison(levels=LEVELS, sizes=(5, 20), seeds=SEEDS, **scores) -> MethodComparison:
    rows = case_scores(levels, sizes, seeds=seeds, **scores)
    rankings = comparison_verdict.rank_arms(rows, {f"ptPlans__{label}": label for label in levels}, sizes)
    return MethodComparison(
        name="compare-10min",
        dataset="Dataset004_Balls",
        pretrain_dataset="Dataset001_Unlabelled",
        budget="10min",
        sham="finetune" if any(label.endswith("sham") for label in levels) else "no",
        created="2026-01-02T03:04:05+00:00",
        command="nnssl_compare -d 4 -tr MAETrainer SparkTrainer DINOv2Trainer --budget 10min --sham finetune",
        device="cpu",
        seeds=seeds,
        folds=(0, 1),
        num_train=sizes,
        finetuning=to_dict(FinetuningProtocol(patch_size=(32, 40, 24))),
        probe=to_dict(ProbeProtocol()),
        methods=tuple(method(label, seeds) for label in levels),
        rankings=rankings,
        headline=comparison_verdict.headline(rankings),
        certainty=comparison_verdict.certainty(rankings, len(seeds)),
        conditions=comparison_verdict.CONDITIONS,
        warnings=("scratch was still rising with 5 training cases.",),
        versions={"nnssl_ext": "0.1"},
    )


def evaluation(*rising: tuple[str, int]) -> SimpleNamespace:
    """What the report asks of an evaluation: which arms were still rising, at which size."""
    trend = SimpleNamespace(state="rising")
    return SimpleNamespace(convergence=[SimpleNamespace(arm=arm, num_train=size, trend=trend) for arm, size in rising])


def cases_of(rows: list[CaseScores], arm: str, size: int) -> np.ndarray:
    """(seeds, cases)."""
    chosen = [row for row in rows if (row.arm, row.num_train) == (f"ptPlans__{arm}", size)]
    return np.array([[r.classes["organ"].dice for r in chosen if r.seed == seed] for seed in SEEDS])
