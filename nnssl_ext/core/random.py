"""Counter-based randomness: every draw is a function of a key, never of what was drawn before.

A generator is a Philox stream keyed by a hash of (seed, what is drawn, which sample). So a resumed run, another number
of workers, or another number of ranks draws the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Key = int | str
_SEED_BITS = 63


def _digest(key: tuple[Key, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def generator(*key: Key) -> np.random.Generator:
    """A Philox generator (Salmon et al. 2011) that is a pure function of its key, such as `(seed, "crop", index)`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key), "little")))


def seed_of(*key: Key) -> int:
    """A non-negative 63-bit seed that is a pure function of its key, for libraries that take an integer."""
    return int.from_bytes(_digest(key)[:8], "little") >> (64 - _SEED_BITS)


@dataclass(frozen=True)
class SampleRandom:
    """Draws for a batch, each row keyed by its global sample index.

    Every method takes a name, unique within the scope: equal names give equal numbers. Results have shape (B, *shape).
    """

    seed: int
    step: int
    """Optimiser step that the samples belong to."""
    samples: tuple[int, ...]
    """Global sample indices, one per row of the batch."""
    scope: str = ""
    """Prefix of every name, so that two users of one batch do not share numbers."""

    def child(self, name: str) -> SampleRandom:
        """The same samples under a narrower scope."""
        return replace(self, scope=f"{self.scope}/{name}")

    def _rows(self, name: str, draw: Callable[[np.random.Generator], np.ndarray | float]) -> np.ndarray:
        where = f"{self.scope}/{name}"
        return np.stack([np.asarray(draw(generator(self.seed, self.step, i, where))) for i in self.samples])

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Uniform float32 in [low, high)."""
        return self._rows(name, lambda g: g.uniform(low, high, shape)).astype(np.float32)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Standard normal float32."""
        return self._rows(name, lambda g: g.standard_normal(shape, dtype=np.float32))

    def integers(self, name: str, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Uniform int64 in [low, high)."""
        return self._rows(name, lambda g: g.integers(low, high, shape))

    def bernoulli(self, name: str, probability: float, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Booleans that are true with the given probability."""
        return self._rows(name, lambda g: g.random(shape) < probability)

    def permutation(self, name: str, size: int) -> np.ndarray:
        """A permutation of 0..size-1 per row, int64."""
        return self._rows(name, lambda g: g.permutation(size))
