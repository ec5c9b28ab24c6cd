"""Pictures appear, whatever is unknown in them."""

from anabranch.common.plot import draw_clients, draw_seeds


def test_clients_are_drawn(tmp_path):
    unknown = float("nan")
    distances = [[0.0, 1.0, unknown], [1.0, 0.0, unknown], [unknown] * 3]
    draw_clients(tmp_path / "x.png", ["a", "b", "c"], [0.5, 0.5, unknown], distances, label="weight")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_drawn(tmp_path):
    panels = {"first": {"a": [1.0, 2.0], "b": [0.01]}, "second": {"a": [3.0], "b": [4.0, 5.0]}}
    draw_seeds(tmp_path / "x.png", panels, x="left")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
