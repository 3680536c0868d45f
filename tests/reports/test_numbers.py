import pytest

from opus_jax.reports.numbers import duration, percent, readable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.25, "0.25"),
        (999, "999"),
        (999.6, "1.00k"),
        (1234567, "1.23M"),
        (-5.5e10, "-55.0G"),
        (2e25, "20000Z"),
    ],
)
def test_readable(value: float, text: str) -> None:
    assert readable(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.0, "0 %"), (0.00123, "0.12 %"), (0.0456, "4.6 %"), (1.234, "123 %")])
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.14, "3.1 s"), (61, "1 min 1 s"), (3 * 3600 + 125, "3 h 2 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
