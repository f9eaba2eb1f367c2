"""What every command shares: errors that users can act on become one line and exit status 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

USER_ERROR = 2
INTERRUPTED = 130


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Turns a user's mistake (ValueError, FileNotFoundError) into one clear line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(USER_ERROR) from error
        except KeyboardInterrupt:
            print("interrupted; start the same command again to go on", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None

    return wrapped
