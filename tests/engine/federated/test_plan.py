"""A plan from a TOML file and from flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.federated.plan import Plan, read_plan
from anabranch.federated.schedule import Schedule

TOML = """
method = ["fedavg", "fedcfa:group=64"]
noise = "pairflip:0.4"
clients = 7
hidden = [32, 16]
lr = 1
drop-last = true

[set.fedcfa]
squared = false
"""


def written(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


def test_a_file_and_what_is_given_beside_it(tmp_path):
    plan, chosen = read_plan(written(tmp_path, TOML), {"clients": "9", "rounds": "3", "seed": "5"})
    assert plan == Plan(
        method=("fedavg", "fedcfa:group=64"), noise=("pairflip:0.4",), clients=9, hidden=(32, 16),
        schedule=Schedule(lr=1.0, drop_last=True, rounds=3, seed=5),
    )  # fmt: skip
    assert chosen == {"fedcfa": {"squared": False}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clients = 0", "clients must be at least 1, got 0"),
        ("client = 3", r"own\.toml has no option 'client'; its options are .*clients"),
        ("rounds = 'many'", "rounds must be int, got 'many'"),
        ("clients = ", r"own\.toml is not TOML"),
        ("resume = true", "--out"),
        ("method = []", "method must be"),
        ("lr = -1", "lr > 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_plan(written(tmp_path, text), {})
    with pytest.raises(ValueError, match="there is no file"):
        read_plan(Path("nowhere.toml"), {})


def test_a_plan_is_read_without_torch(tmp_path):
    code = (
        "import sys; from anabranch.federated.plan import read_plan; read_plan(None, {}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
