"""What every command shares: errors that users can act on become one line and exit status 2."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USER_ERROR = 2
INTERRUPTED = 130
_NO_PLACE = {
    errno.ENOSPC: "the disk is full. Free space, or point nnssl_preprocessed and nnssl_results to another disk",
    errno.EDQUOT: "the disk quota is used up. Free space, or point nnssl_preprocessed and nnssl_results elsewhere",
    errno.EROFS: "the disk cannot be written to. Name another place",
    errno.EACCES: "permission denied. Make it accessible, or name another place",
    errno.EEXIST: "a file is where a folder should be. Remove it, or name another place",
    errno.ENOTDIR: "a file is where a folder should be. Remove it, or name another place",
    errno.EISDIR: "a folder is where a file should be. Name a file",
}
"""What of the system's errors a user can act on."""


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Turns what a user can mend into one clear line on stderr and exit status 2.

    That is a mistake (ValueError, FileNotFoundError), or a place that cannot be written to.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(USER_ERROR) from error
        except OSError as error:
            if error.errno not in _NO_PLACE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{_NO_PLACE[error.errno]}, then start the same command again", file=sys.stderr)
            raise SystemExit(USER_ERROR) from error
        except KeyboardInterrupt:
            print("interrupted; start the same command again to go on (nnssl_train with --c)", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None

    return wrapped


def image_name(file: Path) -> str:
    """What an image is called: its file without ending and channel number."""
    from nnssl_ext.imageio import file_ending_of

    return file.name.removesuffix(file_ending_of(file)).removesuffix("_0000")


def image_names(images: Sequence[Sequence[Path]], clash: str) -> list[str]:
    """What each image is called, by the file of its first channel.

    Args:
        images: The files of each.
        clash: What becomes of images of one name, for the message.

    Raises:
        ValueError: If two have one name.
    """
    names = [image_name(files[0]) for files in images]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several images are called {twice[0]}: {clash}; rename one")
    return names


def record(dataset: str, program: str, argv: Sequence[str] | None) -> None:
    """Writes a command into the preprocessed folder of a dataset that it has made something of."""
    from nnssl_ext.core.history import record_command
    from nnssl_ext.core.paths import find_dataset, preprocessed_root

    record_command(find_dataset(dataset, preprocessed_root()), program, argv)
