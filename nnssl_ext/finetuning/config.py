"""How a fine-tuning run goes: the typed record behind the key `nnssl_finetuning` of a plans file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nnssl_ext.core.records import from_dict, to_dict
from nnssl_ext.dataset.splits import Split
from nnssl_ext.engine.optim import OptimConfig

PLANS_KEY = "nnssl_finetuning"


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Settings that `SSLFinetuneTrainer` reads. The defaults are nnU-Net's recipe for training from scratch.

    Lengths given as `None` scale with the run, by upstream's shares of its 1000 epochs.
    """

    splits: tuple[Split, ...]
    """Training and validation case ids of every fold; a fold beyond the list is refused."""
    seed: int = 0
    """Seed of initialisation, crops and augmentation; together with the fold it decides the run."""
    pretrained_weights: str | None = None
    """Name of the weights file beside the plans file, or None: train from scratch."""
    weights_hash: str | None = None
    """Hash of the tensors in that file, by which other weights under its name are found out."""
    transfer: Literal["encoder", "encoder_decoder"] | None = None
    """What of the checkpoint they hold."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser: `sgd` (with Nesterov momentum) for CNNs, `adamw` for transformers."""
    lr: float = 1e-2
    """Peak learning rate. Usual: SGD 1e-2 from scratch, 1e-3 pretrained; AdamW 3e-4 from scratch, 1e-4 pretrained."""
    momentum: float = 0.99
    """Momentum of SGD, in [0, 1). nnU-Net's value looks back a hundred steps, too far for runs of some hundred."""
    weight_decay: float = 3e-5
    """Weight decay, 0 or more; 5e-2 is usual for AdamW."""
    gradient_clip: float = 12.0
    """Largest norm of the whole gradient; 0 switches clipping off. 12 is nnU-Net's, 1 is usual for transformers."""
    layer_decay: float = 1.0
    """Factor on the learning rate per stage from the decoder down to the stem, in (0, 1]; 1 treats all stages alike."""
    schedule: Literal["poly", "warmup", "sawtooth"] = "poly"
    """`poly`: nnU-Net's decay. `warmup`: a linear rise to the peak, then the decay. `sawtooth`: a rise and a decay with
    only the decoder training, then the same for the whole network."""
    warmup_epochs: float | None = None
    """Epochs of warm-up of the whole network in `warmup` and `sawtooth`; None: 5% of the run (50 of 1000)."""
    decoder_warmup_epochs: float | None = None
    """Epochs of warm-up of the decoder alone in `sawtooth`; None: 2.5% of the run (25 of 1000)."""
    decoder_decay_epochs: float | None = None
    """Epochs of decay of the decoder alone in `sawtooth`, after its warm-up; None: 2.5% of the run (25 of 1000)."""
    frozen_encoder_epochs: float = 0.0
    """Epochs at the start in which the encoder rests, whatever the schedule; the length of the run keeps it frozen."""
    num_epochs: int = 1000
    """Epochs of the run."""
    iterations_per_epoch: int = 250
    """Optimiser steps of an epoch."""
    val_iterations_per_epoch: int = 50
    """Validation batches behind each epoch's loss and pseudo Dice: the same crops in every epoch."""
    precision: Literal["default", "fp32", "bf16"] = "default"
    """Arithmetic of the training steps. `default` is nnU-Net's: fp16 on CUDA, else fp32. `bf16` takes about half the
    time on processors that compute in it. Validation and prediction are nnU-Net's in any case."""
    save_every: int = 25
    """Epochs between two `checkpoint_latest.pth`, from which a killed run goes on."""
    validate_every: int = 0
    """Epochs between two predictions of whole validation volumes during training; 0: only at the end."""
    validation_mirroring: bool = False
    """Whether whole volumes are predicted mirrored too, as `nnUNetv2_predict` does: 8 times as slow in 3D."""
    pretraining_content_hashes: tuple[str, ...] = ()
    """Content hashes of the images that the weights were pretrained on, by which an evaluation finds leaks."""

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits is empty: list at least one fold with its train and val case ids")
        for index, split in enumerate(self.splits):
            both = sorted({*split.train} & {*split.val})
            if both or not split.train or not split.val:
                problem = f"trains and validates on {both[0]}" if both else "has no case to train or to validate on"
                raise ValueError(f"fold {index} {problem}; a case belongs to one side, and both sides need cases")
        self._check_numbers()
        total = self.iterations_per_epoch * self.num_epochs
        spent = self.decoder_steps + self.warmup_steps
        if spent >= total:
            raise ValueError(
                f"schedule {self.schedule!r} spends {spent} of {total} steps before its last decay begins: shorten "
                "warmup_epochs, decoder_warmup_epochs or decoder_decay_epochs, or raise num_epochs"
            )

    def _check_numbers(self) -> None:
        for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        lengths = ("warmup_epochs", "decoder_warmup_epochs", "decoder_decay_epochs", "frozen_encoder_epochs")
        for name in (*lengths, "validate_every", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must lie in (0, 1]")
        _ = self.optim

    @property
    def optim(self) -> OptimConfig:
        """The optimiser's record."""
        return OptimConfig(
            name=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            clip=self.gradient_clip,
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.num_epochs * self.iterations_per_epoch

    def _steps(self, epochs: float | None, share: float) -> int:
        return round(share * self.total_steps if epochs is None else epochs * self.iterations_per_epoch)

    @property
    def warmup_steps(self) -> int:
        """Steps of the whole network's warm-up; 0 for `poly`."""
        return 0 if self.schedule == "poly" else self._steps(self.warmup_epochs, WARMUP_SHARE)

    @property
    def decoder_warmup_steps(self) -> int:
        """Steps of the decoder's own warm-up; 0 unless `sawtooth`."""
        return self._steps(self.decoder_warmup_epochs, DECODER_SHARE) if self.schedule == "sawtooth" else 0

    @property
    def decoder_steps(self) -> int:
        """Steps of the sawtooth's first tooth, in which only the decoder trains; 0 for other schedules."""
        if self.schedule != "sawtooth":
            return 0
        return self.decoder_warmup_steps + self._steps(self.decoder_decay_epochs, DECODER_SHARE)

    @property
    def frozen_steps(self) -> int:
        """Steps at the start in which the encoder rests."""
        return max(self.decoder_steps, round(self.frozen_encoder_epochs * self.iterations_per_epoch))


WARMUP_SHARE = 0.05
"""Share of the run for the whole network's warm-up: upstream's 50 of 1000 epochs."""
DECODER_SHARE = 0.025
"""Share of the run for each half of the decoder's tooth: upstream's 25 of 1000 epochs."""


def read_config(plans: dict[str, Any], where: str = "") -> FinetuningConfig:
    """The fine-tuning settings of a plans file.

    Raises:
        ValueError: If the plans have none, or a setting is unknown or does not fit.
    """
    if PLANS_KEY not in plans:
        raise ValueError(
            f"{where or plans.get('plans_name', 'these plans')}: no {PLANS_KEY!r} in the plans. Make them with "
            "nnssl_plan_finetuning, or train with nnU-Net's own trainer: -tr nnUNetTrainer"
        )
    return from_dict(FinetuningConfig, plans[PLANS_KEY], where or str(plans.get("plans_name", PLANS_KEY)))


def differing_settings(used: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the fine-tuning settings in which two plans differ.

    A setting that plans do not name has its default, so a newer version's additional settings are no difference.

    Args:
        used: Plans that a run was started with.
        now: Its plans now.
    """
    configs = [to_dict(read_config(plans)) if PLANS_KEY in plans else {} for plans in (used, now)]
    return [name for name in sorted({*configs[0], *configs[1]}) if configs[0].get(name) != configs[1].get(name)]
