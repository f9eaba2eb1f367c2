"""Changes of intensity: noise, blur, brightness, contrast, low resolution, gamma.

Each is applied to the samples drawn for it and to no others. Padding enters no mean, no range and no neighbourhood, and
stays 0. Strengths and probabilities are nnU-Net's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.random import SampleRandom

_TINY = 1e-6
_SEEDS = 2**62


@dataclass(frozen=True, kw_only=True)
class IntensityConfig:
    """How intensities may change. A probability is per sample; strengths are drawn for each channel on its own."""

    noise: float = 0.1
    """Probability of additive Gaussian noise."""
    noise_std: tuple[float, float] = (0.0, 0.1)
    """Its standard deviation, of z-scored data."""
    blur: float = 0.2
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    """Its standard deviation in voxels."""
    brightness: float = 0.15
    """Probability of a multiplication."""
    brightness_range: tuple[float, float] = (0.75, 1.25)
    """Its factor."""
    contrast: float = 0.15
    """Probability of a stretch about the mean, within the range of values there were."""
    contrast_range: tuple[float, float] = (0.75, 1.25)
    """Its factor."""
    low_resolution: float = 0.25
    """Probability of being sampled more coarsely (nearest) and brought back (linearly)."""
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    """Coarse samples per voxel and axis."""
    gamma: float = 0.3
    """Probability of a power law on the range of values."""
    inverted_gamma: float = 0.1
    """Probability of a power law on the inverted values."""
    gamma_range: tuple[float, float] = (0.7, 1.5)
    """Its exponent."""

    def __post_init__(self) -> None:
        for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "inverted_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability and must lie in [0, 1].")
        for name in ("blur_sigma", *(name for name in vars(self) if name.endswith("_range"))):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={(low, high)} must be two positive numbers, the smaller one first.")
        if not 0 <= self.noise_std[0] <= self.noise_std[1]:
            raise ValueError(f"noise_std={self.noise_std} must be two numbers of 0 or more, the smaller one first.")
        if self.low_resolution_range[1] > 1:
            raise ValueError(f"low_resolution_range={self.low_resolution_range} must end at 1 or below.")


def intensity_view(data: Tensor, valid: Tensor, random: SampleRandom, config: IntensityConfig) -> Tensor:
    """A copy of the batch with changed intensities.

    Args:
        data: (B, C, *crop), z-scored or alike.
        valid: (B, 1, *crop), bool.
        random: Keyed by sample.
        config: What may happen.

    Returns:
        (B, C, *crop), 0 where invalid.
    """
    data = data.masked_fill(~valid, 0)
    data = _change(data, valid, random, "noise", config.noise, config.noise_std, _noise)
    data = _change(data, valid, random, "blur", config.blur, config.blur_sigma, _blur)
    data = _change(data, valid, random, "brightness", config.brightness, config.brightness_range, _brightness)
    data = _change(data, valid, random, "contrast", config.contrast, config.contrast_range, _contrast)
    low_resolution = (config.low_resolution, config.low_resolution_range, _low_resolution)
    data = _change(data, valid, random, "low_resolution", *low_resolution)
    data = _change(data, valid, random, "inverted_gamma", config.inverted_gamma, config.gamma_range, _inverted_gamma)
    return _change(data, valid, random, "gamma", config.gamma, config.gamma_range, _gamma)


Change = Callable[[Tensor, Tensor, Tensor, SampleRandom], Tensor]
"""(data, valid, strength (N, C, 1, ...), random) of the N samples it applies to -> their new data."""


def _change(
    data: Tensor,
    valid: Tensor,
    random: SampleRandom,
    name: str,
    probability: float,
    strength_range: tuple[float, float],
    change: Change,
) -> Tensor:
    """Applies a change to the samples drawn for it. Which those are is known on the CPU, so no device is waited for."""
    random = random.child(name)
    rows = np.flatnonzero(random.bernoulli("apply", probability))
    if not rows.size:
        return data
    chosen = replace(random, samples=tuple(random.samples[row] for row in rows))
    strength = torch.from_numpy(chosen.uniform("strength", *strength_range, (data.shape[1],))).to(data.device)
    index = torch.from_numpy(rows).to(data.device)
    strength = strength.view(*strength.shape, *[1] * (data.dim() - 2))
    kept = valid[index]
    return data.index_copy(0, index, change(data[index], kept, strength, chosen).masked_fill(~kept, 0))


def _noise(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    noise = torch.empty_like(data)
    for row, seed in zip(noise, random.integers("seed", 0, _SEEDS), strict=True):
        row.normal_(generator=torch.Generator(data.device).manual_seed(int(seed)))
    return torch.addcmul(data, noise, strength)


def _brightness(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    return data * strength


def _contrast(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    mean, _ = _moments(data, valid)
    low, high = _range(data, valid)
    return torch.clamp((data - mean) * strength + mean, low, high)


def _gamma(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    """A power law between the smallest and the largest value; mean and standard deviation are then restored."""
    low, high = _range(data, valid)
    unit = ((data - low) / (high - low).clamp(min=_TINY)).clamp(0, 1)
    bent = unit**strength
    mean, std = _moments(data, valid)
    new_mean, new_std = _moments(bent, valid)
    return (bent - new_mean) * (std / new_std.clamp(min=_TINY)) + mean


def _inverted_gamma(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    return -_gamma(-data, valid, strength, random)


def _blur(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    def weights(size: int) -> Tensor:
        voxel = torch.arange(size, device=data.device)
        distance = (voxel - voxel.unsqueeze(1)).float()
        gauss = torch.exp(-(distance**2) / (2 * strength.flatten(2).unsqueeze(3) ** 2))
        return gauss.where(gauss > _TINY, 0)

    return _filter(data, valid, weights)


def _low_resolution(data: Tensor, valid: Tensor, strength: Tensor, random: SampleRandom) -> Tensor:
    def weights(size: int) -> Tensor:
        coarse = (size * strength.flatten(2)).round().clamp(min=1)
        position = ((torch.arange(size, device=data.device) + 0.5) * coarse / size - 0.5).clamp(min=0)
        first = torch.minimum(position.floor(), coarse - 1)
        second = torch.minimum(first + 1, coarse - 1)
        matrix = data.new_zeros(*data.shape[:2], size, size)
        for sample, weight in ((first, 1 - (position - first)), (second, position - first)):
            voxel = ((sample + 0.5) * size / coarse).long().clamp(max=size - 1)
            matrix.scatter_add_(3, voxel.unsqueeze(3), weight.unsqueeze(3))
        return matrix

    return _filter(data, valid, weights)


def _filter(data: Tensor, valid: Tensor, weights: Callable[[int], Tensor]) -> Tensor:
    """A separable filter, one matrix (N, C, size, size) per axis, normalised over the real voxels it reaches."""
    mass = valid.to(data.dtype).expand_as(data)
    for axis in range(2, data.dim()):
        matrix = weights(data.shape[axis])
        data, mass = _along(data, matrix, axis), _along(mass, matrix, axis)
    return data / mass.clamp(min=_TINY)


def _along(data: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Applies a matrix (N, C, size, size) along one axis, without moving that axis in memory."""
    if axis == data.dim() - 1:
        return (data.flatten(2, -2) @ matrix.transpose(2, 3)).view(data.shape)
    before = data.shape[2:axis].numel()
    return (matrix.unsqueeze(2) @ data.reshape(*data.shape[:2], before, data.shape[axis], -1)).view(data.shape)


def _moments(data: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over real voxels, (N, C, 1, ...)."""
    axes = tuple(range(2, data.dim()))
    count = valid.sum(axes, keepdim=True).clamp(min=1)
    mean = data.masked_fill(~valid, 0).sum(axes, keepdim=True) / count
    variance = ((data - mean) ** 2).masked_fill(~valid, 0).sum(axes, keepdim=True) / count
    return mean, variance.sqrt()


def _range(data: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest real value, (N, C, 1, ...)."""
    axes = tuple(range(2, data.dim()))
    low = data.masked_fill(~valid, torch.inf).amin(axes, keepdim=True)
    high = data.masked_fill(~valid, -torch.inf).amax(axes, keepdim=True)
    return low, high
