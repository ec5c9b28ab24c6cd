"""The same federation as a Flower simulation: FedAvg over nodes on Ray, each training as the plain loop does."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.bench.federated import APART, Row, Task, our_round
from anabranch.bench.federated_loop import Loop, Work, orders, parameters_of, row_of
from anabranch.bench.timing import timed
from anabranch.common.checkpoint import read_json, write_json
from anabranch.federated.rounds import run_round
from anabranch.federated.schedule import Schedule

CORES, REPEATS = 2, 7
# Not `-m`: what Ray's workers are sent must be of a module that they can import.
COMMAND = f"import sys; from pathlib import Path; from {__name__} import simulate; simulate(Path(sys.argv[1]))"


def measure_flower(task: Task, folder: Path, *, rounds: int, runs: int) -> list[Row]:
    """Rounds of ours, then steady rounds of `runs` simulations, their first by themselves, and their models' digests.

    Raises ImportError without Flower, ValueError if a model is not ours.
    """
    try:
        import flwr.simulation  # noqa: F401
    except ImportError as error:
        raise ImportError("the peer is Flower's simulation: pip install 'anabranch[flower]'") from error
    write(task, folder, rounds)
    K, case = len(task.work.index), f"{task.name} beside Flower"
    ours = timed(partial(our_round, task.federation, CORES))
    ours()
    seconds = tuple(ours() for _ in range(REPEATS))
    rows = [Row(case=case, contender=f"anabranch, {CORES} threads", seconds=seconds, clients=K)]
    for _ in range(rounds):
        run_round(task.federation)
    for run in range(runs):
        done = subprocess.run([sys.executable, "-c", COMMAND, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"Flower's simulation failed: {done.stderr[-2000:]}")
        first, *steady = read_json(folder / "seconds.json")["seconds"]
        model = load_file(folder / "model.safetensors")["model"]
        distance = float((model - task.federation.server["model"][0]).abs().max())
        if not distance <= rounds * APART:
            raise ValueError(f"{task.name}: after {rounds} rounds Flower's weights are {distance:.1e} from ours")
        rows += [
            Row(case=case, contender=f"Flower, first round of run {run + 1}", seconds=(first,), clients=K),
            Row(case=case, contender=f"Flower, run {run + 1}", seconds=tuple(steady), clients=K),
            Row(
                case=f"{task.name}, model after {rounds} rounds", contender=f"Flower, run {run + 1}",
                digest=hashlib.sha256(model.numpy().data).hexdigest(),
            ),
        ]  # fmt: skip
    return rows


def write(task: Task, folder: Path, rounds: int) -> None:
    """What nodes and server read: samples, and every client's order in every round."""
    work, owned = task.work, task.federation.holdings.owned
    index = torch.stack([orders(owned, work.schedule, r) for r in range(rounds)])
    tensors = {"x": work.x, "y": work.y, "index": index, "start": work.start}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "work.safetensors")
    s = work.schedule
    settings = {"epochs": 1, "batch": s.batch, "lr": s.lr, "momentum": s.momentum, "weight_decay": s.weight_decay}
    write_json(folder / "work.json", {"widths": work.widths, "schedule": settings})


@cache
def opened(folder: str, round: int) -> Loop:
    """The clients of a round; samples stay in the process."""
    told = read_json(Path(folder) / "work.json")
    tensors = _tensors(folder)
    work = Work(
        widths=tuple(told["widths"]), x=tensors["x"], y=tensors["y"], index=tensors["index"][round],
        start=tensors["start"], schedule=Schedule(**told["schedule"]),
    )  # fmt: skip
    return Loop(work)


@cache
def _tensors(folder: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(Path(folder) / "work.safetensors")
    return tensors


def simulate(folder: Path) -> None:
    """Run the federation and write each round's seconds and the last model."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    rounds, K, _ = _tensors(str(folder))["index"].shape
    client, server = ClientApp(), ServerApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        round = int(message.content["config"]["server-round"]) - 1
        loop = opened(str(folder), round)
        loop.module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        mine = loop.work.index[context.node_config["partition-id"]]
        loop.train([p.detach().clone() for p in loop.parameters], mine)
        arrays = ArrayRecord(loop.module.state_dict())
        told = MetricRecord({"num-examples": len(mine)})
        return Message(content=RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)

    class Timed(FedAvg):  # type: ignore[misc]
        """Notes when rounds begin and end."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.seconds: list[float] = []

        def configure_train(self, *args: Any, **named: Any) -> Iterable[Message]:
            self.seconds.append(-time.perf_counter())
            sent: Iterable[Message] = super().configure_train(*args, **named)
            return sent

        def aggregate_train(self, *args: Any, **named: Any) -> Any:
            done = super().aggregate_train(*args, **named)
            self.seconds[-1] += time.perf_counter()
            return done

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        loop = opened(str(folder), 0)
        loop.begin(parameters_of(loop.work.start, loop.module))
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=K, min_available_nodes=K)
        result = strategy.start(grid, ArrayRecord(loop.module.state_dict()), num_rounds=rounds)
        if not result.arrays:
            raise ValueError("no node has replied")
        loop.module.load_state_dict(result.arrays.to_torch_state_dict())
        save_file({"model": row_of(loop.parameters)}, folder / "model.safetensors")
        write_json(folder / "seconds.json", {"seconds": strategy.seconds})

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    init = {"num_cpus": CORES, "include_dashboard": False, "log_to_driver": False}
    run_simulation(server, client, num_supernodes=K, backend_config={"init_args": init, "client_resources": resources})
