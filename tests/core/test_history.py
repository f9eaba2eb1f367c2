from pathlib import Path

from nnssl_ext.core.history import record_command, recorded_commands


def test_commands_come_back_once_each_in_the_order_of_their_last_use(tmp_path: Path) -> None:
    for words in (["1", "a b"], ["2"], ["1", "a b"]):
        record_command(tmp_path, "nnssl_x", words)
    assert recorded_commands(tmp_path) == ("nnssl_x 2", "nnssl_x 1 'a b'")
    assert recorded_commands(tmp_path / "nothing") == ()
