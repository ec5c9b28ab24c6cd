"""`anabranch secagg simulate` prints a table for people and JSON for programs."""

import json

import pytest

from anabranch.aggregate.secure import command
from anabranch.cli import main
from anabranch_kernels.field_coding.op import FIELDS

SMALL = ["secagg", "simulate", "--clients", "8", "--length", "30", "--drop", "1", "--corrupt", "1", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _threads(threads):
    threads(1)  # the command sets the number; this puts it back


def test_the_table(capsys):
    assert main(SMALL) == 0
    shown = capsys.readouterr()
    assert "N=8 K=3 T=2 E=1 D=1, 30 numbers, babybear, direct, V2" in shown.out
    assert "8 vectors in the sum, wrong sums from 0, equal to the sum of the integers" in shown.out
    assert [line.split()[0] for line in shown.out.splitlines()[2:9]] == [
        "step", "share", "check", "agree", "sum", "project", "verify",
    ]  # fmt: skip
    assert "round 1 of 1" in shown.err


def test_json(capsys):
    assert main([*SMALL, "--json", "--mode", "mask", "--proof", "V1", "--field", "goldilocks"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["exact"] is True
    assert numbers["settings"]["mode"] == "mask"
    assert {"client_s", "server_sum_and_proof_s", "verification"} <= set(numbers)


def test_what_cannot_be_is_said_in_a_line(capsys):
    assert main(["secagg", "simulate", "--clients", "4", "--drop", "3"]) == 2
    assert "anabranch: need" in capsys.readouterr().err


def test_the_fields_of_the_option_are_those_there_are():
    assert set(command.FIELDS) == set(FIELDS)
