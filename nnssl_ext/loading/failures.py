"""Cases that turned out to be unreadable while training, and how many of them are too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from nnssl_ext.preprocessing.errors import CorruptCaseError

logger = logging.getLogger(__name__)
MAX_FAILED_SHARE = 0.01
"""Share of the cases that may be unreadable: a bad sector is survived, a disk that is gone is not."""
MAX_LISTED = 5


class FailedCases:
    """The unreadable cases of a run.

    Args:
        num_cases: Cases of the run, of which they are a share.
    """

    def __init__(self, num_cases: int) -> None:
        self.num_cases = num_cases
        self.reasons: dict[str, str] = {}

    def add(self, case_id: str, reason: str) -> None:
        """Notes that a case could not be read, and warns the first time.

        Raises:
            CorruptCaseError: If more than `MAX_FAILED_SHARE` of the cases have failed; the message names them.
        """
        if case_id in self.reasons:
            return
        self.reasons[case_id] = reason
        self._check()
        logger.warning("%s; others take the place of this one: %s", self._count, reason)

    def unite(self, reasons: Iterable[Mapping[str, str]]) -> None:
        """Takes in what every process that trains found: each reads its share of the cases only.

        Args:
            reasons: Of each process, its own included, in an order that is the same everywhere.

        Raises:
            CorruptCaseError: See `add`; in every process.
        """
        self.reasons = {case_id: reason for found in reasons for case_id, reason in found.items()}
        self._check()

    @property
    def _count(self) -> str:
        return f"{len(self.reasons)} of {self.num_cases} cases cannot be read"

    def _check(self) -> None:
        if len(self.reasons) > MAX_FAILED_SHARE * self.num_cases:
            listed = "; ".join(list(self.reasons.values())[:MAX_LISTED])
            raise CorruptCaseError(f"{self._count}, which is more than {MAX_FAILED_SHARE:.0%}: {listed}")
