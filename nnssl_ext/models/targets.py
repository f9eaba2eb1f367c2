"""From a teacher's scores to the probabilities that a student has to predict, and what keeps them from collapsing.

Two things go wrong with such targets: they are flat (each crop belongs to every prototype alike), or all the same
(every crop belongs to one). The teacher's temperature works against the first, centring or balance against the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from nnssl_ext.models.centre import Centre

Balance = Callable[..., torch.Tensor]
"""From scores (N, K), a temperature and, as `counted`, which rows count (N,) to probabilities (N, K): `sinkhorn`."""
CLOSED = -1e4
"""Score of a prototype out of use: its probability is exactly 0."""
FEWEST_OPEN = 16
"""Prototypes in use are not halved below this."""
SOFT_STEP, SOFT_LIMIT = 0.01, 0.02
"""By how much a request raises the temperature, and by how much all together do."""
SOFT_HORIZON = 100.0
"""Steps that the centre looks back at most once targets were softened: a momentum of .99."""
SHARP_FACTOR = 2.0
"""By how much the centre looks back further once targets were sharpened."""


def prototypes_for(num_cases: int) -> int:
    """The power of two at or above 4 per case, from 256 to 8192."""
    return min(8192, max(256, 1 << (4 * num_cases - 1).bit_length()))


def check_balance(setting: str, num_samples: int, num_prototypes: int, share: float) -> None:
    """Refuses balanced targets where they would be flat: with N samples no probability exceeds N / K by much.

    Args:
        setting: What to change, for the message.
        num_samples: That are balanced together.
        num_prototypes: Among so many prototypes.
        share: Fewest samples per prototype.

    Raises:
        ValueError: With the numbers and the ways out.
    """
    if num_samples < share * num_prototypes:
        entropy = math.log(num_prototypes / num_samples) / math.log(num_prototypes)
        raise ValueError(
            f"{setting}=sinkhorn balances {num_samples} samples over {num_prototypes} prototypes: its targets would be "
            f"flat (an entropy of at least {entropy:.0%} of the largest). It takes {math.ceil(share * num_prototypes)} "
            f"samples: use --set {setting}=softmax, a larger -batch_size, or prototypes={int(num_samples / share)}"
        )


class Targets(nn.Module):
    """Turns scores into probabilities; its state lies in buffers.

    Args:
        num_prototypes: Scores of a sample.
        temperature: The teacher's at the start, above 0.
        balance: Balances prototypes over the samples; None takes off a running centre instead.
    """

    temperature: torch.Tensor
    """Of the next step."""
    shift: torch.Tensor
    cap: torch.Tensor
    """What `soften` and `sharpen` changed: added to the scheduled temperature, and its upper bound."""
    factor: torch.Tensor
    limit: torch.Tensor
    """The same for the steps that the centre looks back: a factor, and their upper bound."""
    open: torch.Tensor
    """(K,), False on prototypes out of use."""

    def __init__(self, num_prototypes: int, temperature: float, balance: Balance | None = None) -> None:
        super().__init__()
        self.coldest, self.balance = temperature, balance
        self.centre = Centre(num_prototypes)
        start = {"temperature": temperature, "shift": 0.0, "cap": math.inf, "factor": 1.0, "limit": math.inf}
        for name, value in start.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("open", torch.ones(num_prototypes, dtype=torch.bool))

    def forward(
        self,
        scores: torch.Tensor,
        counted: torch.Tensor | None = None,
        others: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Probabilities of scores.

        Args:
            scores: (..., K).
            counted: (...), bool; False on rows that take no part in the balance.
            others: Scores (Q, K) that take part in the balance besides, and whether each does, (Q,), bool.

        Returns:
            (..., K), float32.
        """
        if self.balance is None:
            return (self.close(scores.float() - self.centre()) / self.temperature).softmax(-1)
        rows = scores.flatten(0, -2)
        taking_part = rows.new_ones(len(rows), dtype=torch.bool) if counted is None else counted.flatten()
        if others is not None:
            rows, taking_part = torch.cat([rows, others[0]]), torch.cat([taking_part, others[1]])
        return self.balance(rows, self.temperature, counted=taking_part)[: scores[..., 0].numel()].view_as(scores)

    def close(self, scores: torch.Tensor) -> torch.Tensor:
        """Takes prototypes out of use, in scores of a student as of a teacher."""
        return scores.masked_fill(~self.open, CLOSED)

    def update(self, momentum: float, temperature: float) -> None:
        """Once per optimiser step.

        Args:
            momentum: Of the centre.
            temperature: Of the next step, as scheduled.
        """
        horizon = torch.minimum(self.factor / (1 - momentum), self.limit)
        self.centre.update(1 - 1 / horizon)
        self.temperature.copy_(torch.minimum(self.shift + temperature, self.cap))

    def sharpen(self) -> str:
        """Against flat targets: the first temperature again and a slower centre; then half the prototypes.

        Returns:
            What was changed, in words; empty at the end of the means.
        """
        if self.cap > self.coldest:
            self.cap.fill_(self.coldest)
            self.temperature.fill_(self.coldest)
            self.factor.fill_(SHARP_FACTOR)
            self.limit.fill_(math.inf)
            return f"teacher temperature back to {self.coldest:g}, centre over {SHARP_FACTOR:g} times as many steps"
        left = int(self.open.sum()) // 2
        if left < FEWEST_OPEN or self.balance is not None:
            return ""
        self.open[left:] = False
        return f"prototypes in use halved to {left}"

    def soften(self) -> str:
        """Against targets that are all the same: a higher temperature and a faster centre.

        Returns:
            What was changed, in words; empty at the end of the means.
        """
        if self.shift > SOFT_LIMIT - SOFT_STEP / 2:
            return ""
        self.cap.fill_(math.inf)
        self.shift += SOFT_STEP
        self.temperature += SOFT_STEP
        self.factor.fill_(1.0)
        self.limit.fill_(SOFT_HORIZON)
        return f"teacher temperature raised by {SOFT_STEP:g}, centre over at most {SOFT_HORIZON:g} steps"
