import pytest

from chexfound.host.durations import span


@pytest.mark.parametrize(
    ("seconds", "whole", "tenths"),
    [
        (0, "0 s", "0.0 s"),
        (89.9, "90 s", "89.9 s"),
        (119.98, "2 minutes", "2.0 minutes"),
        (120, "2 minutes", "2.0 minutes"),
        (400, "7 minutes", "6.7 minutes"),
        (7199, "2 hours", "2.0 hours"),
        (172_800, "2 days", "2.0 days"),
    ],
)
def test_the_unit_goes_by_what_is_printed(seconds: float, whole: str, tenths: str) -> None:
    assert span(seconds) == whole
    assert span(seconds, 1) == tenths
