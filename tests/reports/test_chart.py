import numpy as np

from opus_jax.reports.chart import label, thin
from opus_jax.reports.series import Series


def test_a_short_series_is_left_as_it_is() -> None:
    steps, values = thin(Series(np.array([3, 5]), np.array([1.5, np.nan])))
    assert steps.tolist() == [3, 5]
    assert values[0] == 1.5
    assert np.isnan(values[1])


def test_a_long_series_is_averaged_without_its_gaps() -> None:
    values = np.arange(1000.0)
    values[::2] = np.nan
    steps, thinned = thin(Series(np.arange(1000), values), points=10)
    assert steps.tolist() == list(range(0, 1000, 100))
    assert thinned == [50.0 + 100 * i for i in range(10)]


def test_labels_carry_no_markup_and_stay_short() -> None:
    assert label("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"
    assert label("y" * 99, 10) == "y" * 9 + "…"
