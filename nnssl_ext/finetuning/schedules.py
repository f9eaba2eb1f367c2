"""Learning rates of fine-tuning as pure functions of the optimiser step."""

from __future__ import annotations

from nnssl_ext.engine.optim import Role
from nnssl_ext.engine.schedules import tooth
from nnssl_ext.finetuning.config import FinetuningConfig


def encoder_is_frozen(config: FinetuningConfig, step: int) -> bool:
    """Whether the encoder rests at this step."""
    return step < config.frozen_steps


def rate_factor(config: FinetuningConfig, step: int, role: Role = "rest") -> float:
    """Factor in [0, 1] on the peak learning rate.

    Args:
        config: The run's settings.
        step: Optimiser step in `[0, config.total_steps)`.
        role: `encoder`, or `rest` for the decoder and its heads.

    Returns:
        0 for a resting encoder. A warm-up of `w` steps rises evenly and is followed by exactly 1; the decay after it
        ends just above 0 at the last step of its tooth.

    Raises:
        ValueError: If the step lies outside the run.
    """
    if not 0 <= step < config.total_steps:
        raise ValueError(f"step {step} lies outside the run of {config.total_steps} steps")
    if role == "encoder" and encoder_is_frozen(config, step):
        return 0.0
    first = config.decoder_steps
    if step < first:
        return tooth(step, first, config.decoder_warmup_steps)
    return tooth(step - first, config.total_steps - first, config.warmup_steps)
