"""Sums that become metrics."""

from anabranch.serve.traffic import Histogram


def test_a_histogram_counts_each_value_once():
    histogram = Histogram((1.0, 2.0))
    histogram.add(1.0)
    histogram.add(1.5, 3)
    histogram.add(9.0)
    assert (histogram.cumulative(), histogram.total) == ([1, 4, 5], 14.5)
