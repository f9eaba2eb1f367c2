import errno
import os

import pytest

from nnssl_ext.cli.common import command


def refusing(number: int):
    @command
    def main(argv=None) -> None:
        raise OSError(number, os.strerror(number), "/results/checkpoint_latest.pth")

    return main


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EACCES, "permission denied")],
)
def test_a_place_that_cannot_be_written_to_is_one_line_with_its_path(number, words, capsys) -> None:
    """Catches the traceback that a full disk ended a training with."""
    with pytest.raises(SystemExit) as stopped:
        refusing(number)([])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: /results/checkpoint_latest.pth: ")
    assert words in told
    assert told.count("\n") == 1


def test_other_system_errors_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        refusing(errno.EIO)([])
