"""Do features of a pretrained network bring hippocampi onto each other? Beside none, MIND and random weights.

    python benchmarks/registration.py --checkpoint CKPT --source Task04_Hippocampus --used IMAGES

Pairs of cases that the checkpoint was not pretrained on are registered, each case in one pair, with the same settings
for all features: the images' centres on each other (`none`), MIND-SSC, and joint principal components of the network's
features and of the same network as it was initialised, at each level that is asked for. The overlap (Dice, mean over
anterior and posterior part) of the moved labels tells how well; folding and the SD of the log Jacobian at what price.
Intervals are bootstrapped over pairs, of differences to MIND and to random weights pair by pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """One pair under one kind of features."""

    dice: float
    folding: float
    sd_log_jacobian: float
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--checkpoint", type=Path, required=True, help="of nnssl_train, on this dataset")
    result.add_argument("--source", type=Path, required=True, help="the extracted Task04_Hippocampus")
    result.add_argument("--used", type=Path, required=True, help="folder with the images that it was pretrained on")
    result.add_argument("--pairs", type=int, default=15, help="how many (default: 15)")
    result.add_argument("--levels", type=int, nargs="+", default=[2], help="feature maps (default: 2)")
    result.add_argument("--json", type=Path, help="where to write every score")
    return result


def draw_pairs(source: Path, used: Path, number: int) -> list[tuple[str, str]]:
    """Pairs (moving, fixed) of cases that were not pretrained on, each case at most once."""
    from nnssl_ext.core.random import generator

    seen = {file.name.split(".")[0].removesuffix("_0000") for file in used.glob("*.nii.gz")}
    cases = sorted({file.name.split(".")[0] for file in (source / "labelsTr").glob("[!.]*.nii.gz")} - seen)
    order = [cases[index] for index in generator(0, "registration pairs").permutation(len(cases))]
    return list(zip(order[0 : 2 * number : 2], order[1 : 2 * number : 2], strict=True))


def score_pair(source: Path, pair: tuple[str, str], arms: dict[str, Any], spacing: float) -> dict[str, Score]:
    """Registers one pair with every kind of features."""
    from nnssl_ext.downstream.registration import moved_labels, overlaps, read, register
    from nnssl_ext.imageio import read_segmentation

    (moving, moving_labels), (fixed, fixed_labels) = (
        (read([source / "imagesTr" / f"{case}.nii.gz"]), read_segmentation(source / "labelsTr" / f"{case}.nii.gz")[0])
        for case in pair
    )
    scores = {}
    for name, describe in arms.items():
        found = register(moving, fixed, describe, spacing, "centre")
        moved = moved_labels(moving_labels, moving.geometry, found.field, fixed.geometry)
        dice = float(np.mean(list(overlaps(moved, fixed_labels).values())))
        scores[name] = Score(dice, found.deformation.folding, found.deformation.sd_log_jacobian, found.seconds)
    return scores


def interval(values: Sequence[float]) -> str:
    """Mean and bootstrapped 95% interval over pairs, as text."""
    from nnssl_ext.core.random import generator
    from nnssl_ext.evaluation.statistics import bootstrap_interval

    found = bootstrap_interval(np.array([values]), [0] * len(values), generator(0, "registration bootstrap"))
    span = f" ({found.low:+.3f} to {found.high:+.3f})" if found else ""
    return f"{np.mean(values):+.3f}{span}"


def main() -> None:
    """Runs the benchmark and prints its table."""
    args = parser().parse_args()
    import torch

    from nnssl_ext.downstream.frozen import load_frozen, random_frozen
    from nnssl_ext.downstream.registration import mean_spacing, mind_features, network_features

    frozen = load_frozen(args.checkpoint)
    untrained = random_frozen(frozen.plan, frozen.configuration, 0)
    arms: dict[str, Any] = {"none": None, "mind": mind_features(torch.device("cpu"))}
    for level in args.levels:
        arms |= {f"network, level {level}": network_features(frozen, level)}
        arms |= {f"random, level {level}": network_features(untrained, level)}
    pairs = draw_pairs(args.source, args.used, args.pairs)
    rows = []
    for number, pair in enumerate(pairs, start=1):
        rows.append(score_pair(args.source, pair, arms, mean_spacing(frozen.configuration.spacing)))
        print(
            f"pair {number}: " + ", ".join(f"{name} {score.dice:.3f}" for name, score in rows[-1].items()), flush=True
        )
        if args.json:
            args.json.write_text(json.dumps([{k: vars(v) for k, v in row.items()} for row in rows], indent=1) + "\n")
    print_table(rows)


def print_table(rows: Sequence[dict[str, Score]]) -> None:
    """The table, in Markdown."""
    print(f"\n{len(rows)} pairs\n\n| features | Dice | minus none | minus MIND | folding | SD log J | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name in rows[0]:
        dice = np.array([row[name].dice for row in rows])
        against = [interval(dice - [row[other].dice for row in rows]) for other in ("none", "mind")]
        means = [
            np.mean([vars(row[name])[field] for row in rows]) for field in ("folding", "sd_log_jacobian", "seconds")
        ]
        print(
            f"| {name} | {dice.mean():.3f} | {' | '.join(against)} | {means[0]:.2%} | {means[1]:.2f} | {means[2]:.1f} |"
        )
    for name in (name for name in rows[0] if name.startswith("network")):
        other = name.replace("network", "random")
        print(f"\n{name} minus {other}: {interval([row[name].dice - row[other].dice for row in rows])}")


if __name__ == "__main__":
    main()
