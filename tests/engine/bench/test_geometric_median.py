"""The benchmark of the geometric median: its certificates are bounds, absent peers are named, its table is whole."""

import builtins

import pytest
import torch

from anabranch.bench import geometric_median as bench
from anabranch.bench.timing import check_agreement
from anabranch_kernels.geometric_median.op import geometric_median

F64 = torch.float64


@pytest.mark.parametrize("data", [bench.CENTRED, bench.OFFSET])
def test_certificates_bound_what_is_missing(data):
    points = bench.cloud(9, 70, dtype=F64, data=data)[0]
    best = geometric_median(points[None]).point[0]
    f = lambda x: float((points - x).norm(dim=1).sum())
    random = torch.Generator().manual_seed(0)
    for x in (best, points.mean(0), points[3], torch.zeros(70, dtype=F64), best + torch.randn(70, generator=random)):
        assert (f(x) - f(best)) / f(x) <= bench.certificate(points, x) + 1e-12
    assert bench.certificate(points, best) <= 1e-12


def test_three_steps_from_zero_do_not_arrive_at_points_with_an_offset():
    points = bench.cloud(32, 2000, dtype=F64, data=bench.OFFSET)[0]
    x = torch.zeros(2000, dtype=F64)
    for _ in range(3):
        v = 1 / (points - x).norm(dim=1).clamp_min(0.1)
        x = v @ points / v.sum()
    assert bench.certificate(points, geometric_median(points[None]).point[0]) <= 1e-9
    assert bench.certificate(points, x) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_without_steps_agree(dtype):
    gram, sums, _ = bench.medians(bench.cloud(8, 300, dtype=dtype, data=bench.CENTRED))
    check_agreement(gram)
    check_agreement(sums)


def test_absent_peers_are_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] in ("byzfl", "geom_median"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    measured, absent = bench.measure_all(
        4, 30, lambda: 1e9, dtype=torch.float32, data=bench.CENTRED, repeats=2, peers=True
    )
    assert [line.split(":")[0] for line in absent] == ["geom-median", "byzfl 3 steps", "byzfl NNM and 3 steps"]
    assert all("anabranch[bench]" in line for line in absent)
    assert {one.contender for one in measured if one.case.startswith("median")} == {"anabranch", "torch 10 steps"}


def test_the_composition_is_the_median_of_the_mixed_points():
    points = bench.cloud(8, 50, dtype=F64, data=bench.CENTRED)
    mixed = bench.composition(points, 2).contenders[0].step()
    near = torch.cdist(points[0], points[0]).argsort(1)[:, :6]
    torch.testing.assert_close(mixed, geometric_median(points[:, near.flatten()].view(1, 8, 6, 50).mean(2)).point[0])


def test_times_are_told_in_plain_reads():
    case = bench.medians(bench.cloud(4, 30, dtype=torch.float32, data=bench.CENTRED))[2]
    size = 4 * 30 * 4
    first, *others = bench.measure(case, lambda: size / 0.5, repeats=3, size=size, certify=None)
    assert first.read_s == pytest.approx(0.5)
    report = bench.MedianReport(title="t", machine=None, samples=(first, *others))
    assert [row[4] for row in report.rows()] == [f"{one.median_s / 0.5:.2f}" for one in (first, *others)]
    assert all(len(one.seconds) == 3 for one in (first, *others))
