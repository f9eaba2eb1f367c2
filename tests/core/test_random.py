import numpy as np

from nnssl_ext.core.random import SampleRandom, generator, seed_of


def test_a_sample_draws_the_same_alone_and_in_a_batch():
    whole = SampleRandom(seed=1, step=5, samples=(10, 11, 12, 13))
    half = SampleRandom(seed=1, step=5, samples=(12, 13))
    np.testing.assert_array_equal(whole.uniform("a", shape=(3,))[2:], half.uniform("a", shape=(3,)))
    np.testing.assert_array_equal(whole.permutation("p", 50)[2:], half.permutation("p", 50))


def test_draws_differ_by_seed_step_sample_name_and_scope():
    base = SampleRandom(seed=1, step=5, samples=(1, 2))
    draws = [
        base.normal("a", (8,)),
        base.normal("b", (8,)),
        base.child("x").normal("a", (8,)),
        SampleRandom(seed=2, step=5, samples=(1, 2)).normal("a", (8,)),
        SampleRandom(seed=1, step=6, samples=(1, 2)).normal("a", (8,)),
    ]
    rows = np.concatenate(draws)
    assert len(np.unique(rows[:, 0])) == len(rows)


def test_order_of_calls_does_not_matter():
    one, two = (SampleRandom(seed=3, step=0, samples=(0,)) for _ in range(2))
    first = one.uniform("a"), one.uniform("b")
    second = two.uniform("b"), two.uniform("a")
    np.testing.assert_array_equal(first, second[::-1])


def test_distributions():
    many = SampleRandom(seed=0, step=0, samples=tuple(range(4000)))
    assert abs(many.uniform("u", 2, 4).mean() - 3) < 0.03
    assert abs(many.bernoulli("b", 0.2).mean() - 0.2) < 0.03
    assert set(many.integers("i", 1, 4)) == {1, 2, 3}
    assert abs(many.normal("n").std() - 1) < 0.05


def test_keys_are_stable_over_processes_and_versions():
    assert seed_of(1, "a") == seed_of(1, "a") != seed_of(1, "b")
    assert 0 <= seed_of("x") < 2**63
    assert generator(1, "crop").integers(1 << 30) == generator(1, "crop").integers(1 << 30)
