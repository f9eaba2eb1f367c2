"""nnU-Net's trainer with the schedules, the splits and the seed of a plans file made by `nnssl_plan_finetuning`.

Network, loss and augmentation are nnU-Net's own, so a checkpoint says that it was trained by `nnUNetTrainer`, and
`nnUNetv2_predict` needs nothing of this package. What differs: crops and augmentation are seeded per batch, the
learning rate moves with every step, the encoder may rest or learn more slowly, folds are the explicit ones of the plans
file, and whole volumes are validated in this process.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import time
from typing import Any

import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_ext.core.records import atomic_path
from nnssl_ext.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from nnssl_ext.finetuning.batches import IndexedBatches, iterate, seed_everything
from nnssl_ext.finetuning.config import read_config
from nnssl_ext.finetuning.layers import ENCODER_PREFIXES, in_encoder, layer_scales
from nnssl_ext.finetuning.schedules import encoder_is_frozen, rate_factor
from nnssl_ext.finetuning.validation import predict_cases, score_cases
from nnssl_ext.finetuning.weights import load_weights

METRICS_FILE = "finetuning_metrics.jsonl"
WORKERS_VARIABLE = "nnUNet_n_proc_DA"
"""nnU-Net's environment variable for the number of augmentation processes."""
PLOT_INTERVAL = 60.0
"""Seconds between two drawings of progress.png, which takes about one."""
_COMPILE_PREFIX = "_orig_mod."
_CUDA = torch.device("cuda")


class SSLFinetuneTrainer(nnUNetTrainer):
    """Fine-tunes a pretrained network, or trains its baseline from scratch, as the plans' `nnssl_finetuning` says.

    The arguments are nnU-Net's. The pretrained weights named in the plans are loaded when the network is built, so
    `-pretrained_weights` is not needed. Per epoch, a line goes to `finetuning_metrics.jsonl` in the fold's folder.
    """

    network: Any
    current_epoch: int
    _best_ema: float | None

    def __init__(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = _CUDA
    ) -> None:
        self.config = read_config(plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.config.lr
        self.weight_decay = self.config.weight_decay
        self.num_epochs = self.config.num_epochs
        self.num_iterations_per_epoch = self.config.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.config.val_iterations_per_epoch
        self.save_every = self.config.save_every
        self.step = 0
        self._plotted = time()

    @property
    def metrics_file(self) -> Path:
        """One JSON line per epoch: losses, pseudo Dice, learning rate, seconds; Dice of early validations."""
        return Path(self.output_folder) / METRICS_FILE

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return getattr(network, "_orig_mod", network)

    def initialize(self) -> None:
        """Builds the seeded network and loads the pretrained weights that the plans name.

        On a CPU the channels are innermost in memory, which takes a quarter off a training step.

        Raises:
            FileNotFoundError: If the weights are not beside the plans.
            ValueError: If they do not fit the network, or are not those of the plans.
        """
        seed_everything(self.config.seed, str(self.fold), "network")
        super().initialize()
        if self.device.type == "cpu":
            layout = torch.channels_last_3d if len(self.configuration_manager.patch_size) == 3 else torch.channels_last
            self.network.to(memory_format=layout)
        if self.config.pretrained_weights is not None:
            file = Path(self.preprocessed_dataset_folder_base) / self.config.pretrained_weights
            load_weights(self.bare_network, file, self.config.weights_hash)
            self.print_to_log_file(f"Pretrained weights: {file}")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        """The plans' optimiser over groups by part and depth. There is no scheduler: rates are set at every step."""
        named = [(name.removeprefix(_COMPILE_PREFIX), value) for name, value in self.network.named_parameters()]
        scales = layer_scales((name for name, _ in named), self.config.layer_decay)
        groups = parameter_groups(named, self.config.optim, scales.__getitem__, ENCODER_PREFIXES)
        return build_optimizer(groups, self.config.optim), None

    def do_split(self) -> tuple[list[str], list[str]]:
        """Training and validation ids of this fold, from the plans; fold `all` trains and validates on every case.

        Raises:
            ValueError: If the plans do not have this fold.
            FileNotFoundError: If a case has not been preprocessed.
        """
        present = set(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        if self.fold == "all":
            return sorted(present), sorted(present)
        splits = self.config.splits
        if not 0 <= int(self.fold) < len(splits):
            raise ValueError(f"fold {self.fold} is not in the plans: they list 0 to {len(splits) - 1}; or use 'all'")
        split = splits[int(self.fold)]
        missing = sorted({*split.train, *split.val} - present)
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} cases of fold {self.fold} are not in {self.preprocessed_dataset_folder}, such as "
                f"{missing[0]}. Preprocess them: nnssl_plan_finetuning with the same name"
            )
        return list(split.train), list(split.val)

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """nnU-Net's augmentation, whose blur here does not time two implementations and take the faster one.

        Their numbers differ a little, so that a run would depend on the load of the machine.
        """
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            if isinstance(transform, RandomTransform) and isinstance(transform.transform, GaussianBlurTransform):
                transform.transform.benchmark = False
        return transforms

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        """Training batches from the current epoch on, and the same validation batches in every epoch."""
        with _environment(WORKERS_VARIABLE, "0"):  # in this process, nnU-Net's augmenters hand out their loaders
            train, val = (augmenter.data_loader for augmenter in super().get_dataloaders())
        key = (self.config.seed, str(self.fold), self.local_rank)
        workers, pin = _num_workers(self.device), self.device.type == "cuda"
        steps = range(self.current_epoch * self.num_iterations_per_epoch, self.config.total_steps)
        val_steps = itertools.cycle(range(self.num_val_iterations_per_epoch))
        return (
            iterate(IndexedBatches(train, *key, "train"), steps, workers, pin),
            iterate(IndexedBatches(val, *key, "val"), val_steps, (workers + 1) // 2, pin),
        )

    def plot_network_architecture(self) -> None:
        """Draws nothing: nnU-Net's drawing needs a package that no longer works."""

    def on_train_start(self) -> None:
        """Prepares data and folders as nnU-Net does, and cuts the metrics back to where the run goes on."""
        super().on_train_start()
        if self.local_rank == 0:
            lines = self.metrics_file.read_text().splitlines() if self.metrics_file.is_file() else []
            kept = [line for line in lines if json.loads(line)["epoch"] < self.current_epoch]
            self.metrics_file.write_text("".join(f"{line}\n" for line in kept))

    def on_train_end(self) -> None:
        """Writes the final checkpoint and lets go of the loaders, whose workers then end."""
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None

    def on_train_epoch_start(self) -> None:
        """Seeds what the network itself draws in this epoch and logs the learning rate of its first step."""
        self.network.train()
        self.step = self.current_epoch * self.num_iterations_per_epoch
        seed_everything(self.config.seed, str(self.fold), self.local_rank, "epoch", self.current_epoch)
        rate = self._prepare_step()
        self.print_to_log_file(f"Epoch {self.current_epoch}, learning rate {rate:.3g}")
        self.logger.log("lrs", rate, self.current_epoch)

    def _prepare_step(self) -> float:
        """Sets the learning rates of this step and wakes or freezes the encoder; returns the largest rate."""
        frozen = encoder_is_frozen(self.config, self.step)
        parameters = [value for name, value in self.bare_network.named_parameters() if in_encoder(name)]
        if parameters[0].requires_grad == frozen:
            for parameter in parameters:
                parameter.requires_grad_(not frozen)
                parameter.grad = None
            if self.is_ddp:  # DDP fixes at construction which gradients it waits for
                self.network = DistributedDataParallel(self.network.module, device_ids=[self.local_rank])
        return set_learning_rate(self.optimizer, self.config.lr, lambda role: rate_factor(self.config, self.step, role))

    def train_step(self, batch: dict) -> dict:
        """One optimiser step at the learning rate of its place in the run."""
        self._prepare_step()
        data = batch["data"].to(self.device, non_blocking=True)
        target = [level.to(self.device, non_blocking=True) for level in batch["target"]]
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self.network(data)
        loss = self.loss([level.float() for level in output], target)
        self._descend(loss)
        self.step += 1
        return {"loss": loss.detach().cpu().numpy()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        if self.config.precision == "default" and self.device.type == "cuda":
            return torch.autocast("cuda", torch.float16)
        return nullcontext()

    def _descend(self, loss: torch.Tensor) -> None:
        limit = self.config.gradient_clip or math.inf
        if self.grad_scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), limit)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self.grad_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def on_epoch_end(self) -> None:
        """Logs the epoch, draws the curves now and then, predicts whole volumes where due, and writes checkpoints."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        done = self.current_epoch + 1
        last, saves = done == self.num_epochs, done % self.save_every == 0
        record = self._epoch_record()
        if self.config.validate_every and done % self.config.validate_every == 0 and not last:
            record["validation_dice"] = self.validate(f"validation_epoch_{done}")
        self.print_to_log_file(record)
        if self.local_rank == 0:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if last or time() - self._plotted > PLOT_INTERVAL:
                self.logger.plot_progress_png(self.output_folder)
                self._plotted = time()
        ema = self.logger.get_value("ema_fg_dice", step=-1)
        if self._best_ema is None or ema > self._best_ema:
            self._best_ema = ema
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_best.pth"))
        if saves and not last:
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        self.current_epoch = done

    def _epoch_record(self) -> dict[str, Any]:
        def last(name: str) -> Any:
            return self.logger.get_value(name, step=-1)

        return {
            "epoch": self.current_epoch,
            "lr": float(last("lrs")),
            "train_loss": _finite(last("train_losses")),
            "val_loss": _finite(last("val_losses")),
            "pseudo_dice": _finite(last("mean_fg_dice")),
            "pseudo_dice_per_class": [_finite(dice) for dice in last("dice_per_class_or_region")],
            "seconds": round(last("epoch_end_timestamps") - last("epoch_start_timestamps"), 3),
        }

    def save_checkpoint(self, filename: str) -> None:
        """Writes nnU-Net's checkpoint atomically, under the stock trainer's name: its network is the stock one."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        checkpoint = {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": nnUNetTrainer.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }
        with atomic_path(Path(filename)) as temporary:
            torch.save(checkpoint, temporary)

    def validate(self, folder_name: str, save_probabilities: bool = False) -> float:
        """Predicts the fold's validation cases into a folder of the fold and scores them there.

        Returns:
            Mean foreground Dice; NaN on ranks other than 0, and where no case has foreground.
        """
        folder = Path(self.output_folder) / folder_name
        _, case_ids = self.do_split()
        self.network.eval()
        self.set_deep_supervision_enabled(False)
        mine = case_ids
        if self.is_ddp:
            mine = case_ids[self.local_rank :: torch.distributed.get_world_size()]
        predict_cases(self, mine, folder, self.config.validation_mirroring, save_probabilities)
        if self.is_ddp:
            torch.distributed.barrier()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        compute_gaussian.cache_clear()
        if self.local_rank != 0:
            return math.nan
        return float(score_cases(self, case_ids, folder)["foreground_mean"]["Dice"])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's final validation, in this process; from mirrored copies too where the plans ask for it."""
        dice = self.validate("validation", save_probabilities)
        self.print_to_log_file(f"Mean Validation Dice: {dice}")


def _num_workers(device: torch.device) -> int:
    """nnU-Net's number of augmentation processes; on a CPU none unless its variable asks for them."""
    if device.type == "cpu" and WORKERS_VARIABLE not in os.environ:
        return 0
    return int(get_allowed_n_proc_DA())


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    saved = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if saved is not None:
            os.environ[name] = saved


def _finite(value: Any) -> float | None:
    """A number that JSON can hold; None where there was nothing to measure."""
    return float(value) if math.isfinite(value) else None
