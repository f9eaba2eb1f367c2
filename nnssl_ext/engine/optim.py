"""Optimisers and their parameter groups, made from a plain record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from nnssl_ext.core.checks import above_zero, at_least, within

Role = Literal["encoder", "rest"]
GroupKey = tuple[Role, bool, float]
MOST_BY_SIZE = 10.0
"""Largest factor on the learning rate of a small network."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser of a recipe. The defaults are nnU-Net's SGD, which the CNN recipes of this project share."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Kind of optimiser: `sgd` or `adamw`."""
    lr: float = 1e-2
    """Peak learning rate, above 0. The schedule multiplies it by a factor in [0, 1]."""
    lr_size: float | None = None
    """Parameters, above 0, of the encoder that `lr` is meant for: other sizes take the root of the ratio times as much,
    ten times at most. None: the same for all sizes."""
    weight_decay: float = 3e-5
    """Weight decay, 0 or more: coupled (L2) in SGD, decoupled in AdamW."""
    final_weight_decay: float | None = None
    """Weight decay at the end of the run, 0 or more, reached by half a cosine; none: it stays as it is."""
    momentum: float = 0.99
    """Momentum of SGD, in [0, 1). AdamW ignores it."""
    nesterov: bool = True
    """Whether SGD uses Nesterov's momentum."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's running moments, each in [0, 1). SGD ignores them."""
    eps: float = 1e-8
    """Added to AdamW's denominator, above 0."""
    clip: float = 12.0
    """Largest allowed norm of the whole gradient; 0 switches clipping off. nnU-Net's value."""
    decay_vectors: bool = True
    """Whether one-dimensional parameters (biases, normalisation) decay as well. nnU-Net: yes; ViT recipes: no."""

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"optim.name={self.name!r} is unknown: use 'sgd' or 'adamw'.")
        above_zero(self, "optim.lr", "optim.eps")
        within(self, "(0, inf)", "optim.lr_size", note=", or be None")
        at_least(self, "optim.", weight_decay=0, clip=0, final_weight_decay=0)
        within(self, "[0, 1)", "optim.momentum", "optim.betas")
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov=True needs optim.momentum above 0; set optim.nesterov=False to use none.")


def size_factor(config: OptimConfig, num_parameters: int) -> float:
    """By how much the learning rate of an encoder of so many parameters exceeds `lr`."""
    return 1.0 if config.lr_size is None else min((config.lr_size / num_parameters) ** 0.5, MOST_BY_SIZE)


def no_scaling(name: str) -> float:
    """Give every parameter the whole learning rate."""
    return 1.0


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    lr_scale: Callable[[str], float] = no_scaling,
    encoder_prefix: str | tuple[str, ...] = "encoder.",
) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups that share role, weight decay and learning-rate scale.

    Args:
        parameters: Names and parameters of a task, as `named_parameters()` gives them.
        config: The optimiser's record.
        lr_scale: Factor on the learning rate of the parameter of that name (layer-wise decay, slow patch embedding).
        encoder_prefix: Names that begin so belong to the encoder, which some schedules treat apart from the rest.

    Returns:
        Groups for a torch optimiser, with the extra keys `role`, `lr_scale` and `decays`, in the order of first
        appearance.

    Raises:
        ValueError: Where no parameter is trainable, or a scale is negative.
    """
    groups: dict[GroupKey, dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = lr_scale(name)
        if scale < 0:
            raise ValueError(f"The learning-rate scale of {name} is {scale}; it must be 0 or more.")
        role: Role = "encoder" if name.startswith(encoder_prefix) else "rest"
        decays = config.decay_vectors or parameter.ndim > 1
        group = groups.setdefault(
            (role, decays, scale),
            {
                "params": [],
                "role": role,
                "lr_scale": scale,
                "lr": config.lr * scale,
                "decays": decays,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("The task has no trainable parameter: there is nothing to optimise.")
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimiser that `config` names over the groups of `parameter_groups`.

    It is fused: one pass over each parameter and no temporary copies of them, on a CPU as on a GPU.
    """
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, factor_of: Callable[[Role], float]) -> float:
    """Set every group's learning rate to `peak` times its role's factor times its scale.

    Args:
        optimizer: Made by `build_optimizer`.
        peak: Peak learning rate.
        factor_of: Schedule factor of a role at this step.

    Returns:
        The largest rate that was set.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak * factor_of(group["role"]) * group["lr_scale"]
    return max(group["lr"] for group in optimizer.param_groups)


def weight_decay_at(config: OptimConfig, share: float) -> float:
    """The weight decay after a share of the run, in [0, 1]."""
    start, end = config.weight_decay, config.final_weight_decay
    return start if end is None else end - (end - start) * (1 + math.cos(math.pi * share)) / 2


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Sets that of every group that decays.

    Args:
        optimizer: Made by `build_optimizer`.
        weight_decay: 0 or more.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
