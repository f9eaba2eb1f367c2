"""Changes of intensity: noise, blur, brightness, contrast, low resolution, gamma.

Each is applied to the samples drawn for it and to no others. Padding enters no mean, no range and no neighbourhood, and
stays 0. Strengths and probabilities are nnU-Net's.

The batch is copied once and then changed in place, one channel of a sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.checks import rising, within
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.transform import SpatialView

MEASURED = "CTNormalization"
"""The normalisation of images whose numbers are physical."""
_TINY = 1e-6
_SEEDS = 2**62
_BLOCK = 32
"""Positions along an axis that a filter computes at once: few of a block's weights are 0, and its matrices stay large
enough for a fast product."""


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
        probabilities = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "inverted_gamma")
        within(self, "[0, 1]", *probabilities, note=": it is a probability")
        rising(self, "(0, inf)", "blur_sigma", "brightness_range", "contrast_range", "gamma_range")
        rising(self, "[0, inf)", "noise_std")
        rising(self, "(0, 1]", "low_resolution_range")

    def suited_to(self, normalization_schemes: Sequence[str]) -> IntensityConfig:
        """Without brightness, contrast and gamma where a channel's numbers are measured, as those of CT are."""
        measured = MEASURED in normalization_schemes
        return replace(self, brightness=0, contrast=0, gamma=0, inverted_gamma=0) if measured else self


def intensity_view(
    data: Tensor, valid: Tensor, random: SampleRandom, config: IntensityConfig, *, inplace: bool = False
) -> Tensor:
    """The batch with changed intensities.

    Args:
        data: (B, C, *crop), z-scored or alike.
        valid: (B, 1, *crop), bool.
        random: Keyed by sample.
        config: What may happen.
        inplace: Whether the data are no longer needed as they were, so that their memory is used.

    Returns:
        (B, C, *crop), 0 where invalid.
    """
    changed = data if inplace and data.is_contiguous() else data.clone(memory_format=torch.contiguous_format)
    scratch = changed.new_empty(2, *data.shape[2:])
    samples = [_volumes(row, real, scratch) for row, real in zip(changed, valid[:, 0], strict=True)]
    changes = _changes(config)
    applied = random.uniform("apply", shape=(len(changes),)) < [change.probability for change in changes]
    for number, change in enumerate(changes):
        rows = np.flatnonzero(applied[:, number])
        if rows.size:
            chosen = replace(random.child(change.name), samples=tuple(random.samples[row] for row in rows))
            strengths = chosen.uniform("strength", *change.strengths, (data.shape[1],))
            seeds = chosen.integers("seed", 0, _SEEDS, (data.shape[1],))
            for row, *draws in zip(rows, strengths.tolist(), seeds.tolist(), strict=True):
                for volume, strength, seed in zip(samples[row], *draws, strict=True):
                    change.apply(volume, strength, seed)
    return changed


def recoloured(
    first: SpatialView, second: SpatialView, random: SampleRandom, config: IntensityConfig
) -> tuple[SpatialView, SpatialView]:
    """Two views with changed intensities, each on its own; the memory of what they were is used."""
    first, second = (
        replace(view, data=intensity_view(view.data, view.valid, random.child(name), config, inplace=True))
        for name, view in (("first", first), ("second", second))
    )
    return first, second


@dataclass(frozen=True)
class _Volume:
    """One channel of a sample, which is changed in place; its padding is 0 before and after every change."""

    data: Tensor
    """(*crop)."""
    padding: Tensor | None
    """(*crop), bool; None where there is known to be none."""
    count: Tensor | int
    """Voxels that are no padding, 1 or more."""
    scratch: Tensor
    """(2, *crop): memory to compute in, of no meaning."""

    def clear(self) -> None:
        """Sets padding back to 0."""
        if self.padding is not None:
            self.data.masked_fill_(self.padding, 0)

    def centre(self) -> Tensor:
        """Subtracts the mean over real voxels, and returns it; so padding is 0 on the new scale, too."""
        mean = self.data.sum() / self.count
        self.data.sub_(mean)
        self.clear()
        return mean

    def spread(self) -> Tensor:
        """The standard deviation over real voxels of what was centred."""
        return torch.linalg.vector_norm(self.data) / self.count**0.5


def _volumes(sample: Tensor, real: Tensor, scratch: Tensor) -> list[_Volume]:
    """The channels of a sample (C, *crop), cleared. A GPU is not asked whether there is padding: that means waiting."""
    padding: Tensor | None = None
    count: Tensor | int = real.numel()
    if real.device.type != "cpu" or not real.view(torch.uint8).amin():  # of bytes it is ten times as fast as of bools
        padding, count = ~real, real.count_nonzero().clamp(min=1)
        sample.masked_fill_(padding, 0)
    return [_Volume(channel, padding, count, scratch) for channel in sample]


@dataclass(frozen=True)
class _Change:
    """A change, how likely it is and how strong."""

    name: str
    probability: float
    strengths: tuple[float, float]
    apply: Callable[[_Volume, float, int], None]
    """Changes a volume in place, given a strength and a seed."""


def _changes(config: IntensityConfig) -> tuple[_Change, ...]:
    """All changes in the order of their application."""
    return (
        _Change("noise", config.noise, config.noise_std, _noise),
        _Change("blur", config.blur, config.blur_sigma, _blur),
        _Change("brightness", config.brightness, config.brightness_range, _brightness),
        _Change("contrast", config.contrast, config.contrast_range, _contrast),
        _Change("low_resolution", config.low_resolution, config.low_resolution_range, _low_resolution),
        _Change("inverted_gamma", config.inverted_gamma, config.gamma_range, _inverted_gamma),
        _Change("gamma", config.gamma, config.gamma_range, _gamma),
    )


def _noise(volume: _Volume, strength: float, seed: int) -> None:
    noise = volume.scratch[0].normal_(generator=torch.Generator(volume.data.device).manual_seed(seed))
    volume.data.add_(noise, alpha=strength)
    volume.clear()


def _brightness(volume: _Volume, strength: float, seed: int) -> None:
    volume.data.mul_(strength)


def _contrast(volume: _Volume, strength: float, seed: int) -> None:
    mean = volume.centre()
    low, high = torch.aminmax(volume.data)
    values = volume.data.mul_(strength)
    torch.maximum(values, low, out=values)  # clamp with tensors takes four times as long
    torch.minimum(values, high, out=values).add_(mean)
    volume.clear()


def _gamma(volume: _Volume, strength: float, seed: int) -> None:
    _bend(volume, strength, inverted=False)


def _inverted_gamma(volume: _Volume, strength: float, seed: int) -> None:
    _bend(volume, strength, inverted=True)


def _bend(volume: _Volume, exponent: float, inverted: bool) -> None:
    """A power law between the smallest and the largest value; mean and standard deviation are then restored."""
    mean, spread = volume.centre(), volume.spread()
    low, high = torch.aminmax(volume.data)
    start, span = (high, low - high) if inverted else (low, high - low)
    sign = -1 if inverted else 1
    unit = volume.data.sub_(start).div_(sign * (sign * span).clamp(min=_TINY))
    unit.log_().mul_(exponent).exp_()  # a power in a quarter of the time; 0 stays 0, by way of minus infinity
    volume.clear()
    volume.centre()
    volume.data.mul_(sign * spread / volume.spread().clamp(min=_TINY)).add_(mean)
    volume.clear()


def _blur(volume: _Volume, strength: float, seed: int) -> None:
    reach = math.floor(strength * math.sqrt(-2 * math.log(_TINY)))

    def weights(size: int) -> tuple[Tensor, int]:
        voxel = torch.arange(size, device=volume.data.device)
        distance = (voxel - voxel.unsqueeze(1)).float()
        gauss = torch.exp(-(distance**2) / (2 * strength**2))
        return gauss.where(distance.abs() <= reach, 0), reach

    _filter(volume, weights)


def _low_resolution(volume: _Volume, strength: float, seed: int) -> None:
    def weights(size: int) -> tuple[Tensor, int]:
        coarse = max(round(size * strength), 1)
        voxel = torch.arange(size, device=volume.data.device)
        position = ((voxel + 0.5) * coarse / size - 0.5).clamp(min=0)
        first = position.floor().clamp(max=coarse - 1)
        second = (first + 1).clamp(max=coarse - 1)
        matrix = volume.data.new_zeros(size, size)
        for sample, weight in ((first, 1 - (position - first)), (second, position - first)):
            nearest = ((sample + 0.5) * size / coarse).long().clamp(max=size - 1)
            matrix.scatter_add_(1, nearest.unsqueeze(1), weight.unsqueeze(1))
        return matrix, math.ceil(size / coarse) + 1

    _filter(volume, weights)


def _filter(volume: _Volume, weights: Callable[[int], tuple[Tensor, int]]) -> None:
    """A separable filter, normalised over the real voxels it reaches.

    Args:
        volume: What is filtered.
        weights: Of an axis of so many voxels: a matrix (size, size), and how far from its diagonal it is not 0.
    """
    bands = {}
    for size in set(volume.data.shape):
        matrix, reach = weights(size)
        bands[size] = matrix / matrix.sum(1, keepdim=True), reach
    _along_all_axes(volume.data, bands, volume.scratch)
    if volume.padding is not None:
        mass = (~volume.padding).to(volume.data.dtype)
        _along_all_axes(mass, bands, volume.scratch)
        volume.data.div_(mass.clamp_(min=_TINY))
        volume.clear()


def _along_all_axes(values: Tensor, bands: Mapping[int, tuple[Tensor, int]], scratch: Tensor) -> None:
    """Filters in place, with each axis' matrix of rows that sum to 1; `scratch` holds what is half done."""
    source = values
    for axis, target in enumerate((*scratch, values)[-values.dim() :]):
        _along(source, *bands[source.shape[axis]], axis, target)
        source = target


def _along(source: Tensor, matrix: Tensor, reach: int, axis: int, target: Tensor) -> None:
    """Applies a banded matrix along one axis, block by block and without moving that axis in memory."""
    size, before = source.shape[axis], source.shape[:axis].numel()
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        low, high = max(start - reach, 0), min(stop + reach, size)
        weights = matrix[start:stop, low:high]
        if axis == source.dim() - 1:
            part, result = source.view(-1, size)[:, low:high], target.view(-1, size)[:, start:stop]
            torch.mm(part, weights.T, out=result)
        else:
            part, result = (each.view(before, size, -1) for each in (source, target))
            torch.bmm(weights.expand(before, -1, -1), part[:, low:high], out=result[:, start:stop])
