"""The two ways in which a store fails that its users must tell apart from others."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageFullError(OSError):
    """The file system has no room for what is being written."""


class CorruptCaseError(ValueError):
    """A stored case is missing, cut short or altered."""


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns the operating system's errors for a full disk, a used-up quota or a limit into one that names the file.

    Raises:
        StorageFullError: Instead of those.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise StorageFullError(error.errno, error.strerror, str(path)) from error
        raise
