"""`nnssl_plan_experiment`: from the fingerprint and the memory of the device to `nnsslPlans.json`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnssl_ext.cli.common import command, record

if TYPE_CHECKING:
    from nnssl_ext.planners.planner import PlanningOptions
    from nnssl_ext.planners.rules import StepCost


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(prog="nnssl_plan_experiment", description=__doc__, allow_abbrev=False)
    result.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="ids or full names of datasets")
    add_arguments(result)
    return result


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Arguments shared with `nnssl_plan_and_preprocess`."""
    target.add_argument(
        "-pl",
        default="nnsslPlanner",
        metavar="PLANNER",
        help="nnsslPlanner (a residual U-Net, memory decides; the default), nnsslPlannerResEncXS, M, L, XL (U-Nets of "
        "a size) or nnsslPlannerPrimusXS, S, M, L (transformers)",
    )
    target.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="memory that a training step may fill (default: the GPU's; without one, the planner's own)",
    )
    target.add_argument(
        "-spacing",
        nargs="+",
        default=["iso"],
        metavar="RULE",
        help="iso (default), median, noresample, or the voxel size in mm as z y x",
    )
    target.add_argument("-tr", metavar="TRAINER", help="plan for the memory of this trainer's step (default: as MAE's)")
    target.add_argument(
        "-normalization",
        default="auto",
        metavar="SCHEME",
        help="auto (by channel name; the default), zscore, ct, rescale, none, percentile",
    )
    target.add_argument(
        "-overwrite_plans_name",
        "--plans_name",
        dest="plans_name",
        default="nnsslPlans",
        metavar="NAME",
        help="name of the plans (default: nnsslPlans)",
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parser().parse_args(argv)
    for dataset in arguments.d:
        run(dataset, arguments)
        record(dataset, "nnssl_plan_experiment", argv)


def run(dataset: str, arguments: argparse.Namespace) -> None:
    """Plans one dataset and prints the decisions.

    Args:
        dataset: Id or full name.
        arguments: Those of `add_arguments`.

    Raises:
        FileNotFoundError: If there is no fingerprint.
        ValueError: If a planner, trainer or rule is unknown, or the memory does not suffice.
    """
    from nnssl_ext.core.paths import find_dataset, preprocessed_root, raw_root
    from nnssl_ext.dataset.manifest import Manifest
    from nnssl_ext.fingerprint.record import FINGERPRINT_FILE, Fingerprint
    from nnssl_ext.planners.planner import plan_experiment, save_plan

    options = options_of(arguments)
    manifest = Manifest.load(find_dataset(dataset, raw_root()))
    folder = preprocessed_root() / manifest.dataset_name
    plan = plan_experiment(Fingerprint.load(folder / FINGERPRINT_FILE), manifest, arguments.pl, options)
    path = save_plan(plan, manifest, folder)
    for name in plan.configuration_names:
        chosen = plan.configuration(name)
        print(f"{manifest.dataset_name} {name}: patch {_by(chosen.patch_size)}, batch {chosen.batch_size}")
        print(f"  spacing {_by(chosen.spacing)} mm, {', '.join(chosen.normalization_schemes)}")
    planning = plan.raw["nnssl_planning"]
    print(f"  a step needs about {planning['estimated_memory_gb']} of {planning['memory_target_gb']:.4g} GB")
    print(f"  written to {path}")


def options_of(arguments: argparse.Namespace) -> PlanningOptions:
    """The user's decisions, checked as far as they can be without data.

    Raises:
        ValueError: If a planner, trainer or rule is unknown, or a number is out of range.
    """
    from nnssl_ext.planners.planner import PLANNERS, PlanningOptions
    from nnssl_ext.planners.rules import FULL_PRECISION_BYTES, MIXED_PRECISION_BYTES, StepCost

    PLANNERS.get(arguments.pl)
    memory = device_memory() if arguments.gpu_memory_target is None else arguments.gpu_memory_target
    return PlanningOptions(
        memory_target=memory,
        spacing=_spacing(arguments.spacing),
        cost=_cost_of(arguments.tr) if arguments.tr else StepCost(),
        bytes_per_value=FULL_PRECISION_BYTES if memory is None else MIXED_PRECISION_BYTES,
        normalization=arguments.normalization,
        plans_name=arguments.plans_name,
    )


def device_memory() -> float | None:
    """GB of the first CUDA device, or None where there is none."""
    import torch

    from nnssl_ext.planners.rules import GIBIBYTE

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIBIBYTE


def _cost_of(trainer: str) -> StepCost:
    from nnssl_ext.engine.task import TRAINERS

    return TRAINERS.get(trainer).cost


def _spacing(values: list[str]) -> str | tuple[float, ...]:
    if len(values) == 1:
        return values[0]
    try:
        return tuple(float(value) for value in values)
    except ValueError as error:
        raise ValueError(
            f"-spacing {' '.join(values)} is not possible: give iso, median, noresample, or mm as z y x, "
            "for example: -spacing 1.5 1.5 1.5"
        ) from error


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
