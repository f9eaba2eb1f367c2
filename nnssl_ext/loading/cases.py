"""Which cases a sample shows: a pure function of the seed and the sample index, whatever the number of cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from nnssl_ext.core.random import Key, generator
from nnssl_ext.loading.needs import DataNeeds
from nnssl_ext.preprocessing.index import IndexEntry

SamplingWeights = Literal["uniform", "dataset", "modality"] | Mapping[str, float]
"""How often cases are shown: all equally often, all datasets equally often, all modalities equally often, or with a
weight for each dataset or modality that is named; the others weigh 1, and 0 leaves one out."""
ROUND = 10_000
"""Samples after which the groups' shares are met to the last one."""
Entries = Mapping[str, IndexEntry]


class CaseSampler:
    """Draws the cases of samples.

    Args:
        entries: What is known of the cases.
        case_ids: The cases to draw from.
        seed: Decides every draw.
        needs: What a sample is made of.
        weights: How often cases are shown; within a group all equally often.
        crops_per_case: Consecutive samples that show the same cases.
        partners: Where the other images of a sample come from, `case_ids` among them; by default those alone.

    Raises:
        ValueError: If no case has as many others to share a sample with as asked for, or the weights do not fit.
    """

    def __init__(
        self,
        entries: Entries,
        case_ids: Sequence[str],
        seed: int,
        needs: DataNeeds,
        weights: SamplingWeights = "uniform",
        crops_per_case: int = 1,
        partners: Sequence[str] | None = None,
    ) -> None:
        self.seed, self.num_images, self.crops_per_case = seed, needs.images, crops_per_case
        self._groups = _image_groups(entries, partners or case_ids, needs)
        self.case_ids = with_partners(entries, case_ids, needs, partners)
        """The cases that can be shown."""
        self._strata = Strata(entries, self.case_ids, weights)

    def cases(self, sample: int, attempt: int = 0) -> tuple[str, ...]:
        """The cases of a sample, one for each of its images.

        Args:
            sample: Global index.
            attempt: How many of its choices turned out to be unreadable; those are not drawn again.

        Raises:
            IndexError: If there is no other choice.
        """
        visit = sample // self.crops_per_case
        first = self.case_ids[self._strata.position(self.seed, visit, attempt)]
        if self.num_images == 1:
            return (first,)
        group = self._groups[first]
        draws = generator(self.seed, "others", visit, attempt)
        picks = draws.choice(len(group) - 1, self.num_images - 1, replace=False)
        return (first, *(group[-1] if group[pick] == first else group[pick] for pick in picks))


def with_partners(
    entries: Entries, case_ids: Sequence[str], needs: DataNeeds, partners: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The cases that have as many others to share a sample with as a task needs.

    Args:
        entries: What is known of the cases.
        case_ids: The cases to choose from.
        needs: What a sample is made of.
        partners: Where the other images come from, `case_ids` among them; by default those alone.

    Raises:
        ValueError: If there is no such case.
    """
    groups = _image_groups(entries, partners or case_ids, needs)
    found = tuple(case for case in case_ids if needs.images == 1 or len(groups[case]) >= needs.images)
    if not found:
        raise ValueError(_no_partners(case_ids, needs))
    return found


def _image_groups(entries: Entries, case_ids: Sequence[str], needs: DataNeeds) -> dict[str, list[str]]:
    """For every case those that can share a sample with it, itself included; empty where samples are single images."""
    if needs.images == 1:
        return {}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    keys = {case_id: _image_group(entries[case_id], needs) for case_id in sorted(case_ids)}
    for case_id, key in keys.items():
        groups[key].append(case_id)
    return {case_id: groups[key] for case_id, key in keys.items()}


def _image_group(entry: IndexEntry, needs: DataNeeds) -> Hashable:
    if needs.same == "modality":
        return entry.dataset, entry.modalities
    if needs.same == "session":
        known = entry.session and entry.grid
        return (entry.dataset, entry.subject, entry.session, entry.grid) if known else entry.case_id
    return None


def _no_partners(case_ids: Sequence[str], needs: DataNeeds) -> str:
    some = f"{len(case_ids)} case(s), {case_ids[0]} for one"
    if needs.same == "session":
        reason = (
            "none of them shares its session and voxel grid with so many others. Sessions are read from "
            "pretrain_data.json beside dataset.json; after adding them: nnssl_preprocess -d DATASET --overwrite"
        )
        return f"A sample needs {needs.images} co-registered images of one session. Of {some}, {reason}"
    kind = "cases of one dataset and modality" if needs.same == "modality" else "cases"
    reason = "no such group is as large. Add cases, or hold out more of them for validation: --set val_fraction=0.2"
    return f"A sample needs {needs.images} different {kind}. Among {some}, {reason}"


class Strata:
    """Groups of cases that are shown in given shares, each of which goes through its cases in turn.

    Memory grows with the number of cases, not with that of samples.

    Args:
        entries: What is known of the cases.
        case_ids: The cases.
        weights: Of the groups.

    Raises:
        ValueError: If a weight is negative, names neither datasets nor modalities, or leaves no case.
    """

    def __init__(self, entries: Entries, case_ids: Sequence[str], weights: SamplingWeights) -> None:
        names, self._members = _group_cases(entries, case_ids, weights)
        given = weights if isinstance(weights, Mapping) else {}
        wanted = np.array([given.get(name, 1.0) for name in names])
        if not (np.isfinite(wanted).all() and wanted.min() >= 0 and wanted.sum() > 0):
            raise ValueError(f"sampling weights {dict(weights)} must be 0 or more, and some above 0.")  # type: ignore[arg-type]
        self._slots = _apportion(wanted / wanted.sum(), ROUND)
        if ((self._slots == 0) & (wanted > 0)).any():
            raise ValueError(f"sampling weights {given} give a group less than one of {ROUND} samples: leave it out.")
        self._ends = np.cumsum(self._slots)
        self._permutation = lru_cache(maxsize=2 * len(names) + 2)(_permutation)

    def position(self, seed: int, visit: int, attempt: int = 0) -> int:
        """Position in the list of cases of the one that is shown at a visit.

        Args:
            seed: Decides every draw.
            visit: Running number.
            attempt: How many of the visit's choices to pass over.

        Raises:
            IndexError: If the group has no more cases.
        """
        stratum, turn = self._turn(seed, visit)
        members = self._members[stratum]
        round_, place = divmod(turn, len(members))
        chosen = int(self._permutation(seed, f"cases {stratum}", round_, len(members))[place])
        if attempt:
            others = _permutation(seed, "replacements", visit, len(members) - 1)
            pick = int(others[attempt - 1])
            chosen = len(members) - 1 if pick == chosen else pick
        return int(members[chosen])

    def _turn(self, seed: int, visit: int) -> tuple[int, int]:
        """The group of a visit, and a number that no other visit of the group has: 0, 1, ... over all rounds."""
        if len(self._members) == 1:
            return 0, visit
        round_, place = divmod(visit, ROUND)
        slot = int(self._permutation(seed, "groups", round_, ROUND)[place])
        stratum = int(np.searchsorted(self._ends, slot, side="right"))
        slots = int(self._slots[stratum])
        return stratum, round_ * slots + slot - (int(self._ends[stratum]) - slots)


def _permutation(seed: int, what: Key, round_: int, length: int) -> npt.NDArray[np.int64]:
    return generator(seed, what, round_).permutation(length)


def _group_cases(
    entries: Entries, case_ids: Sequence[str], weights: SamplingWeights
) -> tuple[list[str], list[npt.NDArray[np.int64]]]:
    """Names of the groups that weights are about, and the positions of their cases."""
    if weights == "uniform":
        return [""], [np.arange(len(case_ids))]
    datasets, modalities = defaultdict(list), defaultdict(list)
    for position, case_id in enumerate(case_ids):
        datasets[entries[case_id].dataset].append(position)
        modalities["+".join(entries[case_id].modalities)].append(position)
    named = set(weights) if isinstance(weights, Mapping) else set()
    for kind, groups in (("dataset", datasets), ("modality", modalities)):
        if weights == kind or (named and named <= set(groups)):
            names = sorted(groups)
            return names, [np.array(groups[name]) for name in names]
    raise ValueError(
        f"sampling weights {weights} name neither datasets ({', '.join(sorted(datasets))}) nor modalities "
        f"({', '.join(sorted(modalities))}) alone. Use uniform, dataset, modality, or NAME=WEIGHT with such names."
    )


def _apportion(shares: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers in the given shares that add up to the total, by largest remainder."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    short = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[short] += 1
    return counts
