"""One fold of fine-tuning in this process: trained, or continued, or only validated, whichever is left to do."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.core.paths import find_dataset, plans_in, run_name
from nnssl_ext.core.records import read_json
from nnssl_ext.finetuning.config import differing_settings
from nnssl_ext.finetuning.environment import nnunet_root
from nnssl_ext.finetuning.sources import write_record

if TYPE_CHECKING:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

logger = logging.getLogger(__name__)
DEFAULT_TRAINER = "SSLFinetuneTrainer"


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """Where the results of a fold lie."""

    folder: Path
    """`$nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_K`."""

    @property
    def summary(self) -> Path:
        """nnU-Net's `summary.json` of the final validation, beside the predicted segmentations."""
        return self.folder / "validation" / "summary.json"

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint."""
        return self.folder / "checkpoint_final.pth"

    @property
    def complete(self) -> bool:
        """Whether training and validation have ended."""
        return self.checkpoint.is_file() and self.summary.is_file()


def fold_result(
    dataset: int | str, plans_name: str, configuration: str, fold: int | str, trainer: str = DEFAULT_TRAINER
) -> FoldResult:
    """Where the results of a fold lie or will lie.

    Raises:
        FileNotFoundError: If the dataset has not been preprocessed.
    """
    dataset_name = find_dataset(dataset, nnunet_root("preprocessed")).name
    run = run_name(trainer, plans_name, configuration)
    return FoldResult(folder=nnunet_root("results") / dataset_name / run / f"fold_{fold}")


def run_fold(
    dataset: int | str,
    plans_name: str,
    configuration: str,
    fold: int | str,
    *,
    device: str = "cuda",
    trainer: str = DEFAULT_TRAINER,
    num_threads: int | None = None,
    verbose: bool = False,
) -> FoldResult:
    """Trains and validates one fold; does nothing where both are done, goes on from the last checkpoint where one is.

    May be called repeatedly in one process, and in spawned ones.

    Args:
        dataset: Id or name.
        plans_name: Plans in the dataset's preprocessed folder, without `.json`.
        configuration: Such as `3d_fullres`.
        fold: Fold of the plans, or `all`.
        device: `cpu`, `cuda` or `mps`.
        trainer: `SSLFinetuneTrainer`, or any trainer that nnU-Net finds by name.
        num_threads: Threads of torch; None leaves them.
        verbose: Whether nnU-Net prints to stdout; its log file has everything in any case.

    Raises:
        FileNotFoundError: If the dataset, the plans, or preprocessed cases are missing.
        ValueError: If the plans do not have the fold, or the run in progress was started from other settings.
    """
    import torch

    result = fold_result(dataset, plans_name, configuration, fold, trainer)
    if result.complete:
        logger.info("fold %s of %s is complete", fold, plans_name)
        return result
    torch.backends.cudnn.benchmark = torch.device(device).type == "cuda"
    with _threads(num_threads), _quiet(verbose):
        runner = _build(dataset, plans_name, configuration, fold, torch.device(device), trainer)
        if not _continue(runner, result):
            write_record(result.folder, Path(runner.preprocessed_dataset_folder))
        if not result.checkpoint.is_file():
            runner.run_training()
        runner.perform_actual_validation()
    return result


def _build(
    dataset: int | str, plans_name: str, configuration: str, fold: int | str, device: torch.device, trainer: str
) -> nnUNetTrainer:
    folder = find_dataset(dataset, nnunet_root("preprocessed"))
    file = folder / f"{plans_name}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no plans {plans_name} in {folder} (there: {plans_in(folder)}). Write them: nnssl_plan_finetuning"
        )
    plans = read_json(file)
    if configuration not in plans["configurations"]:
        raise ValueError(
            f"{plans_name} has no configuration {configuration!r}, only: {', '.join(plans['configurations'])}"
        )
    plans["continue_training"] = False
    return _trainer_class(trainer)(
        plans=plans,
        configuration=configuration,
        fold=fold if fold == "all" else int(fold),
        dataset_json=read_json(folder / "dataset.json"),
        device=device,
    )


def _trainer_class(name: str) -> Any:
    if name == DEFAULT_TRAINER:
        from nnssl_ext.finetuning.nnunet_trainers import SSLFinetuneTrainer

        return SSLFinetuneTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    return recursive_find_trainer_class_by_name(name)


def _continue(runner: nnUNetTrainer, result: FoldResult) -> bool:
    """Loads the final or the latest checkpoint, where there is one and its settings are those of the plans now."""
    for file in (result.checkpoint, result.folder / "checkpoint_latest.pth"):
        if file.is_file():
            runner.load_checkpoint(str(file))
            names = differing_settings(runner.my_init_kwargs["plans"], runner.plans_manager.plans)
            if names:
                raise ValueError(
                    f"{result.folder} was trained with other settings than {runner.plans_manager.plans_name} has now "
                    f"(they differ in {', '.join(names)}). Remove the folder, or give the new settings a name of their "
                    "own: nnssl_plan_finetuning -n NAME"
                )
            logger.info("going on from %s", file)
            return True
    return False


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not verbose:
            sink = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
        yield
