"""The states of a run that are kept to go back to."""

from nnssl_ext.engine.recovery import Ring


def test_states_are_an_epoch_apart_or_more():
    assert Ring.interval(250_000, 250, 50) == 5000
    assert Ring.interval(2500, 250, 50) == 250
    assert Ring.interval(100, 1, 30) == 60  # a state between two looks would be one that nobody judged


def test_the_ring_keeps_the_newest_and_forgets_a_future_that_was_given_up(tmp_path):
    ring = Ring(tmp_path / "ring")
    assert ring.newest() is None
    for step in (2, 4, 6, 8, 4):
        ring.save(step, {})
    assert sorted(path.name for path in ring.folder.iterdir()) == ["step_000000004.pth"]
    for step in (6, 8, 10):
        ring.save(step, {})
    assert [int(path.stem[5:]) for path in sorted(ring.folder.iterdir())] == [6, 8, 10]
    assert ring.newest() == ring.path(10)
    ring.remove()
    assert ring.newest() is None
