"""What tasks may ask of the data."""

import pytest

from nnssl_ext.loading.needs import DataNeeds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"images": 0}, "images=0 must be 1 or more"),
        ({"images": 2, "same": "patient"}, "same='patient' must be one of modality, session or None"),
        ({"same": "session"}, "same='session' says what the images of a sample share: set images to 2"),
    ],
)
def test_refuses_needs_that_say_nothing(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataNeeds(**settings)
