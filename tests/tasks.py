"""Tasks as the trainers' tests need them, and networks whose weights are no longer the initial ones."""

from __future__ import annotations

import torch


def task_on(kind, plan, **settings):
    """The task of that class on a plan's only configuration, with these settings; seed 0 draws its weights."""
    torch.manual_seed(0)
    (name,) = plan.configuration_names
    return kind(kind.Config(**settings), plan.configuration(name), num_cases=4)


def disturb(module):
    """Moves every parameter away from its initial value, which biases and norms share among networks."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return module
