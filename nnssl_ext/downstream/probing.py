"""What a frozen encoder knows about anatomy: a linear probe and nearest neighbours on its features, by Dice.

The features of a voxel are those of every map of the encoder at its place, interpolated linearly, one after another,
standardised over the sampled training voxels; a transformer has one map. So labels stay as they are, and Dice is that
of voxels. A volume runs through the network in windows of the pretraining's patch (`windows`).

- Linear: multinomial logistic regression with an L2 penalty. Voxels are sampled equally from every class and weighted
  back to their true frequencies, so that rare classes are learned and not overestimated. A linear map commutes with
  interpolation, hence whole volumes are predicted map by map at the maps' own size.
- Nearest neighbours: cosine, votes weighted by exp(similarity / .07) (Wu et al. 2018, arXiv:1805.01978) and by the same
  frequencies, on every second voxel along each axis.

Few labels decide much: a probe is fitted on several subsets of the labelled cases, the same ones for every encoder.
Everything is a function of the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from nnssl_ext.core.random import generator
from nnssl_ext.downstream.frozen import Frozen
from nnssl_ext.downstream.labelled import LabelledCase
from nnssl_ext.downstream.windows import INTERPOLATION, features_at, owned, pick, relative, scan, window_size

TEMPERATURE = 0.07
"""Of the votes of neighbours. Wu et al. 2018."""
MIN_STD = 1e-6
"""Features that vary less than this are only centred."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How features are probed."""

    num_labelled: int = 5
    """Labelled cases that a probe learns from, 1 or more."""
    subset_seeds: tuple[int, ...] = (0, 1, 2, 3)
    """One subset of the labelled cases is drawn for each."""
    voxels_per_case: int = 1000
    """Voxels of a case that the linear probe learns from, spread equally over its classes."""
    penalty: float = 1e-3
    """Weight of the squared coefficients beside the mean log-likelihood, above 0."""
    neighbours: int = 20
    """Neighbours that vote; 0 leaves nearest neighbours out."""
    bank_voxels_per_case: int = 200
    """Voxels of a case that can be neighbours, up to `voxels_per_case`."""
    stride: int = 2
    """Every how many voxels along each axis neighbours are asked."""

    def __post_init__(self) -> None:
        for name, least in (("num_labelled", 1), ("voxels_per_case", 1), ("neighbours", 0), ("stride", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if not self.penalty > 0:
            raise ValueError(f"penalty={self.penalty} must be above 0.")
        if not 1 <= self.bank_voxels_per_case <= self.voxels_per_case:
            raise ValueError(f"bank_voxels_per_case={self.bank_voxels_per_case} must lie in [1, voxels_per_case].")
        if not self.subset_seeds:
            raise ValueError("subset_seeds must hold one seed or more.")


@dataclass(frozen=True)
class ProbeResult:
    """Dice of the test cases."""

    classes: tuple[int, ...]
    """The foreground classes."""
    cases: tuple[str, ...]
    """The test cases."""
    linear: npt.NDArray[np.float64]
    """(subsets, cases, classes), NaN for a class that no test case holds."""
    knn: npt.NDArray[np.float64] | None
    """The same for nearest neighbours; None where they were left out."""


@dataclass(frozen=True)
class Samples:
    """Voxels of a labelled case with their features."""

    features: torch.Tensor
    """(n, D), float32."""
    labels: torch.Tensor
    """(n,), int64."""
    weights: torch.Tensor
    """(n,), float32: voxels of the case that each stands for."""


@dataclass(frozen=True)
class LinearProbe:
    """Logits as a linear function of features; the standardisation is part of it."""

    weight: torch.Tensor
    """(classes, D)."""
    bias: torch.Tensor
    """(classes,)."""


def probe(
    frozen: Frozen, labelled: Sequence[LabelledCase], test: Sequence[LabelledCase], config: ProbeConfig
) -> ProbeResult:
    """Fits probes on subsets of the labelled cases and scores them on the test cases.

    Args:
        frozen: The encoder.
        labelled: The pool that subsets are drawn from.
        test: Cases that are none of these.
        config: How.

    Raises:
        ValueError: If a case is in both lists, there are too few labelled cases, or they show no foreground.
    """
    _check_cases(labelled, test, config.num_labelled)
    classes = sorted(set(torch.cat([case.labels[case.labels >= 0].unique() for case in labelled]).tolist()))
    if len(classes) < 2:
        raise ValueError(f"the labelled cases show nothing but {classes}: a probe needs two classes or more")
    samples = [_sample(frozen, case, config) for case in labelled]
    subsets = [draw_subset(len(labelled), config.num_labelled, seed) for seed in config.subset_seeds]
    linear = [fit_linear(join(samples, subset), classes, config.penalty) for subset in subsets]
    banks = [_bank(join(samples, subset, config.bank_voxels_per_case)) for subset in subsets]
    rows = [_score(frozen, case, classes, linear, banks, config) for case in test]
    held = np.array([any(bool((case.labels == value).any()) for case in test) for value in classes[1:]])
    scores = [np.where(held, np.stack(found, axis=1), np.nan) for found in zip(*rows, strict=True)]
    return ProbeResult(
        classes=tuple(classes[1:]),
        cases=tuple(case.case_id for case in test),
        linear=scores[0],
        knn=scores[1] if config.neighbours else None,
    )


def _check_cases(labelled: Sequence[LabelledCase], test: Sequence[LabelledCase], num_labelled: int) -> None:
    both = sorted({case.case_id for case in labelled} & {case.case_id for case in test})
    if both:
        raise ValueError(f"{len(both)} test cases are among the labelled ones, such as {both[0]}: keep them apart")
    if len(labelled) < num_labelled or not test:
        raise ValueError(
            f"{len(labelled)} labelled and {len(test)} test cases do not do: {num_labelled} and 1 are needed at least"
        )


def draw_subset(num_cases: int, size: int, seed: int) -> tuple[int, ...]:
    """Which of the labelled cases a probe learns from, in ascending order."""
    chosen = generator(seed, "label subset").permutation(num_cases)[:size]
    return tuple(sorted(int(index) for index in chosen))


def draw_voxels(labels: torch.Tensor, number: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels of a label map, drawn without replacement and as equally from its classes as they have voxels.

    Args:
        labels: (Z, Y, X), int64; voxels of -1 are never drawn.
        number: How many; fewer where a class has not enough.
        rng: Source of the draws.

    Returns:
        Places (n, 3) in random order, and how many voxels of its class each stands for, (n,).
    """
    flat = labels.flatten().numpy()
    present = np.unique(flat[flat >= 0])
    indices, weights = [], []
    for value in present:
        among = np.flatnonzero(flat == value)
        drawn = rng.permutation(among)[: -(-number // len(present))]
        indices.append(drawn)
        weights.append(np.full(len(drawn), len(among) / len(drawn), dtype=np.float32))
    order = rng.permutation(sum(map(len, indices)))
    places = np.stack(np.unravel_index(np.concatenate(indices)[order], labels.shape), axis=1)
    return torch.from_numpy(places), torch.from_numpy(np.concatenate(weights)[order])


def join(samples: Sequence[Samples], subset: Sequence[int], per_case: int | None = None) -> Samples:
    """The samples of some cases one after another, of each the first `per_case` (None: all)."""
    parts = [samples[index] for index in subset]
    return Samples(*(torch.cat([getattr(part, name)[:per_case] for part in parts]) for name in Samples.__annotations__))


def _sample(frozen: Frozen, case: LabelledCase, config: ProbeConfig) -> Samples:
    rng = generator("probe voxels", case.case_id)
    places, weights = draw_voxels(case.labels, config.voxels_per_case, rng)
    return Samples(features_at(frozen, case.data, places), case.labels[tuple(places.T)], weights)


def fit_linear(samples: Samples, classes: Sequence[int], penalty: float) -> LinearProbe:
    """Weighted multinomial logistic regression on standardised features.

    Minimises the weighted mean of the negative log-likelihood plus `penalty` times half the squared coefficients.

    Args:
        samples: What to learn from.
        classes: Every class in ascending order; one that the samples lack is never predicted.
        penalty: See there.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = _moments(samples)
    weights = (samples.weights / samples.weights.sum()).double().numpy()
    present = samples.labels.unique().tolist()
    weight = torch.zeros(len(classes), len(mean))
    bias = torch.full((len(classes),), -torch.inf)
    rows = [classes.index(value) for value in present]
    bias[rows] = 0
    if len(present) > 1:
        model = LogisticRegression(C=1 / penalty, max_iter=200, tol=1e-4)
        model.fit(((samples.features - mean) / scale).numpy(), samples.labels.numpy(), weights)
        coefficients = torch.from_numpy(model.coef_).float()
        intercepts = torch.from_numpy(model.intercept_).float()
        if len(present) == 2:  # scikit-learn gives the second class's log-odds alone
            coefficients, intercepts = (torch.cat([-half, half]) for half in (coefficients / 2, intercepts / 2))
        weight[rows], bias[rows] = coefficients / scale, intercepts - (coefficients / scale) @ mean
    return LinearProbe(weight, bias)


def _moments(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = samples.features.mean(0), samples.features.std(0, correction=0)
    return mean, torch.where(std > MIN_STD, std, 1)


def linear_logits(maps: Sequence[torch.Tensor], probes: Sequence[LinearProbe], size: Sequence[int]) -> torch.Tensor:
    """The logits of several probes at every voxel of a window, computed map by map before interpolation.

    Args:
        maps: (1, channels, *size of the map), finest first.
        probes: On the features of all maps.
        size: Voxels of the window along the maps' axes.

    Returns:
        (probes, classes, *size).
    """
    weight = torch.cat([probe.weight for probe in probes]).to(maps[0])
    bias = torch.stack([probe.bias for probe in probes]).to(maps[0])
    total, first = torch.zeros(len(weight), *size, device=maps[0].device), 0
    for features in maps:
        part = weight[:, first : first + features.shape[1]]
        first += features.shape[1]
        logits = torch.einsum("kc,bc...->bk...", part, features)
        total += functional.interpolate(logits, size=list(size), mode=INTERPOLATION[len(size)])[0]
    return total.unflatten(0, bias.shape) + bias.view(*bias.shape, *[1] * len(size))


@dataclass(frozen=True)
class _Bank:
    """Standardised unit-length features that can be neighbours."""

    features: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor


def _bank(samples: Samples) -> _Bank:
    mean, scale = _moments(samples)
    unit = functional.normalize((samples.features - mean) / scale, dim=1)
    return _Bank(unit, samples.labels, samples.weights, mean, scale)


def vote(
    similarities: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, classes: Sequence[int], neighbours: int
) -> torch.Tensor:
    """The class that the nearest neighbours of each query vote for, (queries,).

    Args:
        similarities: Cosines (queries, bank).
        labels: (bank,).
        weights: (bank,): voxels that each stands for.
        classes: Every class in ascending order.
        neighbours: How many vote, or the whole bank where it is smaller.
    """
    nearest, index = similarities.topk(min(neighbours, len(labels)), dim=1)
    votes = ((nearest - 1) / TEMPERATURE).exp() * weights[index]
    totals = torch.stack([(votes * (labels[index] == value)).sum(1) for value in classes], dim=1)
    return torch.tensor(classes)[totals.argmax(1)]


def dice(prediction: torch.Tensor, reference: torch.Tensor, classes: Sequence[int]) -> list[float]:
    """Dice of each class where the reference knows (>= 0); 1 where neither side has the class."""
    known = reference >= 0
    scores = []
    for value in classes:
        found, wanted = (prediction == value) & known, reference == value
        size = int(found.sum() + wanted.sum())
        scores.append(2 * int((found & wanted).sum()) / size if size else 1.0)
    return scores


def _score(
    frozen: Frozen,
    case: LabelledCase,
    classes: Sequence[int],
    probes: Sequence[LinearProbe],
    banks: Sequence[_Bank],
    config: ProbeConfig,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Dice (subsets, classes) of the linear probes and of nearest neighbours."""
    shape, values = case.labels.shape, torch.tensor(classes)
    predicted = torch.zeros(len(probes), *shape, dtype=torch.int64)
    places = torch.stack(torch.meshgrid(*(torch.arange(0, n, config.stride) for n in shape), indexing="ij"), -1)
    places = places.flatten(0, -2)
    neighbours = torch.zeros(len(banks), len(places), dtype=torch.int64)
    for window, maps in scan(frozen, case.data):
        logits = linear_logits(maps, probes, frozen.configuration.patch_size)
        best = values[logits.argmax(1).cpu()].view(len(probes), *window_size(frozen))
        inside = tuple(slice(s.start - low, s.stop - low) for s, low in zip(window.own, window.lower, strict=True))
        predicted[(slice(None), *window.own)] = best[(slice(None), *inside)]
        mine = owned(window, places)
        if config.neighbours and mine.any():
            queries = pick(maps, relative(window, places[mine], frozen)).cpu()
            for number, bank in enumerate(banks):
                unit = functional.normalize((queries - bank.mean) / bank.scale, dim=1)
                found = vote(unit @ bank.features.T, bank.labels, bank.weights, classes, config.neighbours)
                neighbours[number, mine] = found
    asked = case.labels[tuple(places.T)]
    linear = [dice(prediction, case.labels, classes[1:]) for prediction in predicted]
    return np.array(linear), np.array([dice(found, asked, classes[1:]) for found in neighbours])
