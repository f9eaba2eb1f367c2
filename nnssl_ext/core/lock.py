"""One run at a time writes to a folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".nnssl.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that knows no locks, such as Lustre mounted without them."""

logger = logging.getLogger(__name__)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the system releases it also when the process is killed.

    Where the file system has no locks, a warning is logged and the folder is not held.

    Args:
        folder: Made where it is missing; the lock file in it is removed at the end.

    Raises:
        ValueError: If another run holds the folder.
    """
    path = folder / LOCK_FILE
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _locked(path: Path) -> IO[Any]:
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"another run is writing to {path.parent}: wait for its end, or end it, and start this one again"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                file.close()
                raise
            logger.warning("%s cannot be locked (%s): let only one run at a time write to it", path.parent, error)
            return file
        if _is_at(path, file):
            return file
        file.close()  # its last holder removed it in between: lock the new one


def _is_at(path: Path, file: IO[Any]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
