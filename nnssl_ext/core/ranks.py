"""The processes that train together: how many they are, and which of them this one is.

Torch is imported when they are asked for, so that commands that do not train start without it.
"""

from __future__ import annotations


def num_ranks() -> int:
    """Processes that train together; 1 where this one trains alone."""
    from torch import distributed

    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """The place of this process among them, from 0."""
    from torch import distributed

    return distributed.get_rank() if num_ranks() > 1 else 0
