"""Who looks like an outlier, and what is said of what is not known."""

import json

import pytest
import torch

from anabranch.aggregate.report import Certificate, Report

KNOWN = {
    "method": "krum", "per_tensor": False,
    "clients": ("a", "b", "c", "d", "e"), "tensors": ("w", "n"), "numbers": (6, 2),
    "coefficients": None, "distances": None, "pairwise": None, "certificates": (), "dropped": {}, "bytes_read": 40,
    "seconds": 0.5,
}  # fmt: skip


def of(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("distances", "outliers"),
    [
        ((1.0, 1.1, 0.9, 1.05, 5.0), [4]),
        ((1.0, 2.0, 3.0, 4.0, 5.0), []),
        ((1.0, 1.0, 1.0, 1.0, 1.0 + 1e-9), []),  # rounding is no reason
        ((1.0, 1.0, 1.0, 1.0, 1.1), [4]),
        ((0.0, 0.0, 0.0, float("nan"), 1.0), [4]),
        ((1.0, 1.1, 1.0, 1e30, 1e30), [3, 4]),
    ],
)
def test_outliers_are_far_beyond_the_median_distance(distances, outliers):
    assert Report(**{**KNOWN, "distances": of(*distances)}).outliers == outliers


def test_the_weight_of_a_client_is_its_mean_over_all_numbers():
    coefficients = torch.stack([of(1, 0, 0, 0, 0), of(0, 0, 0.5, 0.5, 0)])
    report = Report(**{**KNOWN, "per_tensor": True, "coefficients": coefficients})
    assert report.weights.tolist() == [0.75, 0, 0.125, 0.125, 0]
    assert report.to_json()["weights_per_tensor"] == {"w": [1, 0, 0, 0, 0], "n": [0, 0, 0.5, 0.5, 0]}


def test_json_has_null_for_what_is_not_known():
    pairwise = torch.full((5, 5), torch.nan)
    pairwise[:2, :2] = 1.0
    distances = of(1, 2, float("nan"), 3, float("inf"))
    report = Report(**{**KNOWN, "distances": distances, "pairwise": pairwise, "dropped": {2: "w"}})
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["distances"] == [1, 2, None, 3, None]
    assert found["pairwise"][0] == [1, 1, None, None, None]
    assert (found["weights"], found["weights_per_tensor"], found["dropped"]) == (None, None, {"c": "w"})


def test_the_table_says_what_there_is():
    certificates = (Certificate("w", 1e-9, "converged"), Certificate("n", 2e-7, "anchor"))
    pairwise = torch.tensor([[abs(i - j) ** 2.0 for j in range(5)] for i in range(5)], dtype=torch.float64)
    pairwise[2], pairwise[:, 2] = torch.nan, torch.nan
    distances = of(1, 1, float("nan"), 1, 9)
    report = Report(
        **{**KNOWN, "certificates": certificates, "distances": distances, "pairwise": pairwise, "dropped": {2: "w"}}
    )
    assert report.to_text().splitlines() == [
        "client  weight  distance  nearest",
        "a            –         1        1",
        "b            –         1        1",
        "c            –         –        –  dropped: w is not finite",
        "d            –         1        1",
        "e            –         9        1  outlier",
        "",
        "krum, all tensors as one vector: 8 numbers in 2 tensors",
        "certificate: anchor, within 2.0e-07 of the least sum of distances at worst, in n",
        "read 0.00 GB in 0.50 s (0.0 GB/s)",
    ]
