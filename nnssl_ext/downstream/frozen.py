"""Encoders as they are: out of a checkpoint, or freshly initialised as a yardstick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.random import seed_of
from nnssl_ext.engine.checkpoint import load_checkpoint
from nnssl_ext.models.backbone import build_encoder
from nnssl_ext.models.encoder import Encoder
from nnssl_ext.planners.plan import Configuration, Plan


@dataclass(frozen=True)
class Frozen:
    """An encoder in eval mode, without gradients, and how its images are prepared."""

    encoder: Encoder
    plan: Plan
    configuration: Configuration


def load_frozen(checkpoint: Path) -> Frozen:
    """The encoder of a checkpoint of `nnssl_train`, on the CPU.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged, or not of `nnssl_train`, whose checkpoints alone hold their plans.
    """
    return frozen_encoder(load_checkpoint(checkpoint), checkpoint)


def frozen_encoder(content: Mapping[str, Any], path: Path) -> Frozen:
    """The encoder of a checkpoint that was read.

    Args:
        content: Of `load_checkpoint`.
        path: Where it lies, for messages.

    Raises:
        ValueError: If it is not of `nnssl_train`.
    """
    if "nnssl_plans" not in content:
        raise ValueError(f"{path} has no nnssl_plans: only checkpoints of nnssl_train say how to prepare images")
    plan = Plan(content["nnssl_plans"])
    (name,) = plan.configuration_names
    configuration = plan.configuration(name)
    encoder = build_encoder(configuration)
    prefix = "" if encoder.kind == "vit" else "encoder."
    own = encoder.state_dict()
    weights = content["network_weights"]
    encoder.load_state_dict({key: weights[prefix + key.removeprefix("module.")] for key in own})
    return freeze(encoder, plan, configuration)


def random_frozen(plan: Plan, configuration: Configuration, seed: int) -> Frozen:
    """A plan's encoder as a pretraining run of that seed would initialise it, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "torch", "initialisation"))
        return freeze(build_encoder(configuration), plan, configuration)


def freeze(encoder: Encoder, plan: Plan, configuration: Configuration) -> Frozen:
    """That very encoder, put into eval mode, its parameters without gradients."""
    return Frozen(encoder.eval().requires_grad_(False), plan, configuration)
