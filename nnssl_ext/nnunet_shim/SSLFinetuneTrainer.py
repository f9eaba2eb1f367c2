"""Makes `nnUNetv2_train ... -tr SSLFinetuneTrainer` find the trainer."""

from nnssl_ext.finetuning.nnunet_trainers import SSLFinetuneTrainer

__all__ = ["SSLFinetuneTrainer"]
