"""Aggregation as a whole: files like memory, whole or not there; several processes like one."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anabranch.aggregate import sources
from anabranch.aggregate.job import aggregate_files, aggregate_tensors
from anabranch.aggregate.settings import AggregateMethod, AggregateOptions

METHODS = [
    AggregateMethod(rule="mean"),
    AggregateMethod(),
    AggregateMethod(rule="krum", f=2),
    AggregateMethod(rule="coordinate-median"),
    AggregateMethod(rule="phocas", pre=("nnm",), f=2),
    AggregateMethod(rule="centred-clipping", radius=3.0),
]


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_files_give_the_bits_that_memory_gives(method, per_tensor, make_clients, save, tmp_path):
    clients = make_clients(9)
    (base,) = make_clients(1, seed=3)
    options, out = AggregateOptions(per_tensor=per_tensor), tmp_path / "new" / "out.safetensors"
    with patch.object(sources, "TILE_BYTES", 50_000):
        wanted, known = aggregate_tensors(clients, method, options, base=base)
        report = aggregate_files(save(clients), out, method, options, base=save([base], "base")[0])
    found = load_file(out)
    assert {name: (x.dtype, x.shape) for name, x in found.items()} == {
        name: (x.dtype, x.shape) for name, x in wanted.items()
    }
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert report.bytes_read == known.bytes_read
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "round": "3"}


def test_progress_counts_every_byte(make_clients, save, tmp_path):
    steps = []
    with patch.object(sources, "TILE_BYTES", 50_000):
        report = aggregate_files(
            save(make_clients(5)), tmp_path / "out", AggregateMethod(), progress=lambda *step: steps.append(step)
        )
    sweeps = {name: [(done, total) for sweep, done, total in steps if sweep == name] for name in ("products", "result")}
    assert all(len(sweep) > 3 and sweep[-1][0] == sweep[-1][1] for sweep in sweeps.values())
    assert sum(sweep[-1][0] for sweep in sweeps.values()) == report.bytes_read


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("the disk is full")])
def test_whatever_ends_the_work_leaves_what_was_there(error, make_clients, save, tmp_path):
    paths, folder = save(make_clients(3)), tmp_path / "results"
    folder.mkdir()
    (folder / "out").write_text("before")

    def fail(sweep, done, total):
        if sweep == "result":
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        aggregate_files(paths, folder / "out", AggregateMethod(), progress=fail)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("out", "before")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_bad_clients_leave_nothing(make_clients, save, tmp_path):
    clients = make_clients(3)
    clients[1]["vector"][7] = torch.nan
    paths, folder = save(clients), tmp_path / "results"
    with pytest.raises(ValueError, match=r"not finite: .*client-01.safetensors in vector"):
        aggregate_files(paths, folder / "out", AggregateMethod(rule="mean"))
    assert list(folder.iterdir()) == []
    with pytest.raises(ValueError, match="is one of the files to read"):
        aggregate_files(paths, paths[1], AggregateMethod())
    with pytest.raises(ValueError, match="is a folder"):
        aggregate_files(paths, tmp_path, AggregateMethod())


def test_a_kill_leaves_no_result(make_clients, save, tmp_path):
    """SIGKILL can be cleaned up after by nobody; but no file may carry the result's name."""
    out = tmp_path / "results" / "out"
    source = f"""
import sys, time
from anabranch.aggregate.job import aggregate_files
from anabranch.aggregate.settings import AggregateMethod
def stall(sweep, done, total):
    if sweep == "result":
        print("on", flush=True)
        time.sleep(600)
aggregate_files({[str(path) for path in save(make_clients(3))]}, {str(out)!r}, AggregateMethod(), progress=stall)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "on\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()


RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file, save_file
from anabranch.aggregate.job import aggregate_tensors
from anabranch.aggregate.settings import AggregateMethod, AggregateOptions

folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "meet"), size), rank=rank, world_size=size)
clients = [load_file(path) for path in sorted(folder.glob("client-*"))]
cuts = json.loads((folder / "cuts.json").read_text())
parts = [{name: x[cuts[name][rank] : cuts[name][rank + 1]] for name, x in client.items()} for client in clients]
said = {}
for name, method, options in [
    ("mean", AggregateMethod(rule="mean"), AggregateOptions()),
    ("krum", AggregateMethod(rule="krum", f=2), AggregateOptions()),
    ("median", AggregateMethod(), AggregateOptions()),
    ("tensors", AggregateMethod(pre=("nnm",), f=2), AggregateOptions(per_tensor=True)),
]:
    tensors, report = aggregate_tensors(parts, method, options, group=dist.group.WORLD)
    save_file(tensors, folder / f"{name}-{rank}.safetensors")
    said[name] = report.to_json()
if rank == 1:
    parts[3]["w"][5] = float("nan")  # only this process can see it
for method in (AggregateMethod(rule="mean"), AggregateMethod()):
    try:
        aggregate_tensors(parts, method, group=dist.group.WORLD)
    except ValueError as error:
        said.setdefault("errors", []).append(str(error))
try:
    aggregate_tensors([{"v" if rank else "w": torch.zeros(2)}], AggregateMethod(), group=dist.group.WORLD)
except ValueError as error:
    said["errors"].append(str(error))
(folder / f"said-{rank}.json").write_text(json.dumps(said))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("size", "cut"), [(2, 1024), (3, 777)], ids=["where tiles begin", "anywhere"])
def test_processes_with_a_part_of_every_tensor_give_the_whole(size, cut, tmp_path):
    """Bits of the mean and of a chosen client do not change; sums of products are added in another order, so a median's
    coefficients may, by rounding. Where parts do not begin where tiles do, so may the last bit of a mean.
    """
    random = torch.Generator().manual_seed(0)
    middle = {"w": torch.randn(4000, generator=random), "b": torch.randn(5, 3, generator=random)}
    clients = [{n: x + 0.1 * torch.randn(x.shape, generator=random) for n, x in middle.items()} for _ in range(7)]
    for i, client in enumerate(clients):
        save_file(client, tmp_path / f"client-{i}.safetensors")
    cuts = {"w": [*range(0, size * cut, cut), 4000], "b": [0, *[5] * size]}
    (tmp_path / "cuts.json").write_text(json.dumps(cuts))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank), str(size)], env=environment)
        for rank in range(size)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0] * size
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(size)]
    for name, method, options in (
        ("mean", AggregateMethod(rule="mean"), AggregateOptions()),
        ("krum", AggregateMethod(rule="krum", f=2), AggregateOptions()),
        ("median", AggregateMethod(), AggregateOptions()),
        ("tensors", AggregateMethod(pre=("nnm",), f=2), AggregateOptions(per_tensor=True)),
    ):
        wanted, report = aggregate_tensors(clients, method, options)
        parts = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(size)]
        for tensor, whole in wanted.items():
            got = torch.cat([part[tensor] for part in parts])
            if name in ("mean", "krum") and cut % 1024 == 0:
                assert torch.equal(got, whole)
            torch.testing.assert_close(got, whole, atol=1e-6, rtol=1e-6)
        for one in said:
            assert one[name]["weights"] == said[0][name]["weights"]
            assert one[name]["distances"] == pytest.approx(report.distances.tolist(), rel=1e-6, abs=1e-4)
    for one in said:
        assert len(one["errors"]) == 3
        assert all("not finite: client 3 in w" in error for error in one["errors"][:2])
        assert "processes hold tensors of other names" in one["errors"][2]


def test_the_folder_of_a_checkpoint_is_not_overwritten(make_clients, tmp_path):
    for i, client in enumerate(make_clients(2)):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file(client, folder / "model.safetensors")
    paths = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(ValueError, match="is one of the files to read"):
        aggregate_files(paths, Path(tmp_path / "0" / "model.safetensors"), AggregateMethod())
