"""The page holds what was measured and asks for nothing from elsewhere."""

import re
import threading
from html.parser import HTMLParser

import torch

from anabranch.data.labelled import Labelled
from anabranch.federated.choices import Chosen, choose_method
from anabranch.federated.experiment import compare
from anabranch.federated.method import FedAvg
from anabranch.federated.plan import Plan
from anabranch.federated.report import page
from anabranch.federated.schedule import Schedule
from anabranch.federated.tables import percent, rows_of


class Balanced(HTMLParser):
    """Fails at a tag that closes another than the last that was opened."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Knowing(FedAvg):
    def first(self, network, clients):
        return {"noisy": torch.arange(clients) > 1, "flips": torch.eye(3)}


def results():
    y = torch.arange(60) % 3
    x = torch.nn.functional.one_hot(y, 3).float()
    data = Labelled(name="a<b", kind="vector", x=x, y=y, test_x=x[:9], test_y=y[:9], names=["x&", "y", "z"])
    plan = Plan(
        clients=4, hidden=(), noise=("clean", "symmetric:0-0.4"), seeds=2, schedule=Schedule(rounds=2, epochs=1)
    )  # fmt: skip
    methods = [choose_method("fedavg"), Chosen("knowing:<1>", Knowing())]
    return compare(plan, methods, data, interrupted=threading.Event(), progress=False)


def test_the_page():
    found = results()
    text = page(found)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"https?://|src=|href=|<script|@import|url\(", text)
    assert "a&lt;b" in text
    assert "knowing:&lt;1&gt;" in text
    assert "a<b" not in text
    for row in rows_of(found.courses):
        assert percent(row.accuracy) in text
    # under each noise: a chart, the labels, two confusions, one learnt matrix, and dots of 2 seeds x 4 clients
    assert (text.count('class="lines"'), text.count('class="map"'), text.count('class="dots"')) == (2, 8, 2)
    assert text.count("<circle") == 2 * 2 * 4
