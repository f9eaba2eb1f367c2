from types import SimpleNamespace

import pytest

from nnssl_ext.core.checks import above_zero, at_least, rising, within

BOTH = "share=.* must be two numbers in "


@pytest.mark.parametrize(
    ("check", "taken", "refused", "message"),
    [
        (lambda record: at_least(record, share=1), (1, (1, 2), None), (0.99, (1, 0)), "share=.* must be 1 or more"),
        (lambda record: above_zero(record, "share"), (0.01, 5), (0, (1, 0)), "share=.* must be above 0"),
        (lambda record: within(record, "[0, 1)", "a.share"), (0, 0.9), (-0.1, 1), r"a\.share=.* must lie in \[0, 1\)"),
        (lambda record: within(record, "(0, 1]", "share"), (0.1, 1), (0, 1.1, (0.5, 2)), r"share=.* must lie in \(0, "),
        (lambda record: rising(record, "(0, 1]", "share"), ((0.1, 0.1), (0.5, 1)), ((1, 0.5), (0, 1)), BOTH),
    ],
)
def test_settings_are_refused_outside_of_what_is_allowed(check, taken, refused, message):
    """Catches an end of an interval taken for open or closed, and one bad number among good ones that passes."""
    for value in taken:
        check(SimpleNamespace(share=value))
    for value in refused:
        with pytest.raises(ValueError, match=message):
            check(SimpleNamespace(share=value))
