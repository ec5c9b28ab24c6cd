"""The page stands alone and shows every tier."""

import threading
from dataclasses import replace
from html.parser import HTMLParser

import torch

from anabranch.data.labelled import Labelled
from anabranch.federated.plan import Plan
from anabranch.federated.tree.experiment import compare
from anabranch.federated.tree.plan import SCHEDULE, FedEEC, TreePlan
from anabranch.federated.tree.report import page


def test_the_page_of_a_deep_tree():
    y = torch.arange(60) % 3
    x = torch.nn.functional.one_hot(y, 3).float()
    data = Labelled(name="<drawn>", kind="vector", x=x, y=y, test_x=x, test_y=y, names="abc")
    plan = TreePlan(
        tree=(1, 2, 3), settings=FedEEC(networks=("mlp:3", "mlp:4", "mlp:4", "mlp:5"), bridge="pca:2"),
        plan=Plan(clients=3, noise=("clean", "symmetric:0.3"), schedule=replace(SCHEDULE, rounds=2)),
    )  # fmt: skip
    shown = page(compare(plan, data, interrupted=threading.Event(), progress=False))

    opened = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img")
            opened.append(tag) if tag != "meta" else None

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balanced().feed(shown)
    assert opened == []
    assert "A tree learns &lt;drawn&gt;" in shown
    assert shown.count("<svg") == 2 * 3
    for tier in ("leaves", "height 1", "height 2", "root"):
        assert f">{tier}</text>" in shown
