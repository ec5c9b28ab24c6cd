"""Intervals of a few seeds, against SciPy's."""

from statistics import stdev

import pytest
from scipy.stats import t, ttest_1samp

from anabranch.common.paired import T_95, paired


def test_the_interval_is_students():
    differences = [0.3, 0.1, 0.35]
    got = paired(differences)
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert got["mean"] == pytest.approx((low + high) / 2, abs=1e-5)
    assert got["half_width_95"] == pytest.approx((high - low) / 2, abs=1e-4)  # the table has three decimals
    assert got["sd"] == pytest.approx(stdev(differences), abs=1e-5)


@pytest.mark.parametrize("freedom", T_95)
def test_the_table_of_t_is_right(freedom):
    assert T_95[freedom] == pytest.approx(t.ppf(0.975, freedom), abs=5e-4)


def test_one_value_has_no_interval():
    assert paired([0.5]) == {"differences": [0.5], "mean": 0.5, "sd": None, "half_width_95": None}
