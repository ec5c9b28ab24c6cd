"""What is written is what is read, and a run that goes on is the run that never stopped."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from anabranch.federated import run_files
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembering(FedAvg):
    """Two networks, a server that knows more than the model, and clients that keep things of every shape."""

    networks: ClassVar[int] = 2
    per_sample: ClassVar[frozenset[str]] = frozenset({"seen"})

    def first(self, network, clients):
        return {"visits": torch.zeros(clients, dtype=torch.int64)}

    def fresh(self, network, data):
        N = len(data.y)
        return {
            "seen": torch.zeros(data.y.shape), "count": torch.zeros(N, dtype=torch.int64), "rows": torch.zeros(N, 2, 3),
        }  # fmt: skip

    def end(self, visit, rows):
        visit.kept["seen"] += torch.arange(visit.data.y.shape[1]) + visit.kept["count"][:, None]
        visit.kept["count"] += 1
        visit.kept["rows"] += visit.streams.uniform(6, 3).view(-1, 2, 3)
        rows[: len(visit.clients)] += visit.kept["seen"].mean(1, keepdim=True) * 1e-3
        return rows

    def aggregate(self, server, replies, round):
        visits = server["visits"].index_add(0, replies.clients, torch.ones_like(replies.clients))
        return {"model": replies.mean, "visits": visits, "before": server["model"]}


def federation():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 6, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    owned = torch.arange(30).split([4, 9, 2, 10, 5])
    return found(Remembering(), MLP((6, 5, 3)), Holdings(x, y, owned), Schedule(share=0.5, epochs=1, batch=3))


def test_a_run_that_was_restored_has_the_same_bits(tmp_path):
    whole, first = federation(), federation()
    for _ in range(5):
        run_round(whole)
    for _ in range(2):
        run_round(first)
        run_files.save(tmp_path, first, {"seed": 0})
    second = federation()
    run_files.restore(tmp_path, second, {"seed": 0})
    assert second.round == 2
    for _ in range(3):
        run_round(second)
    assert second.server.keys() == whole.server.keys()
    assert all(torch.equal(second.server[name], value) for name, value in whole.server.items())
    assert second.kept.keys() == whole.kept.keys()
    for k, kept in whole.kept.items():
        assert all(torch.equal(second.kept[k][name], value) for name, value in kept.items())
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["round-000002.safetensors"]


def test_another_run_is_refused(tmp_path):
    run_files.save(tmp_path, federation(), {"seed": 0, "lr": 0.1})
    with pytest.raises(ValueError, match="seed is 1, was 0"):
        run_files.restore(tmp_path, federation(), {"seed": 1, "lr": 0.1})


def test_half_a_line_and_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = tmp_path / "rounds.jsonl"
    for round in range(3):
        run_files.append(log, {"round": round})
    with log.open("a") as file:
        file.write('{"round": 3, "netw')
    assert run_files.read_log(log, 2) == [{"round": 0}, {"round": 1}]
    assert log.read_text() == "".join(json.dumps({"round": round}) + "\n" for round in range(2))
    with pytest.raises(ValueError, match="a line for each of the 3 rounds"):
        run_files.read_log(log, 3)


def test_models_are_written_by_the_names_of_their_tensors(tmp_path):
    f = federation()
    run_files.save_model(tmp_path / "model.safetensors", f)
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) == sorted(f"{w}{name}" for w in ("", "1.") for name in f.network.layout.shapes)
    assert torch.equal(stored["1.1.weight"], f.network.layout.views(f.server["model"])["1.weight"][1])
