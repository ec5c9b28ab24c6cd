"""Clients' files: found in whatever layout, read in bounded memory, named when something is wrong with them."""

import json
import threading
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from anabranch.aggregate import files, sources
from anabranch.aggregate.files import SafetensorsFiles
from anabranch.aggregate.sources import NamedTensors


def everyone(source):
    return [list(range(len(source.clients)))] * len(source.entries)


def read_all(source, chosen=None, base=False):
    """Entry's name -> rows [n, D], the base last if it was read."""
    parts = {}
    for tile in source.tiles(chosen or everyone(source), base=base):
        rows = tile.rows if tile.base is None else torch.cat([tile.rows, tile.base[None]])
        parts.setdefault(source.entries[tile.entry].name, []).append(rows.clone())
    return {name: torch.cat(columns, 1) for name, columns in parts.items()}


@pytest.mark.parametrize("tile_bytes", [1, 9000, 1 << 20])
def test_files_give_the_tiles_that_memory_gives(tile_bytes, make_clients, save):
    clients = make_clients(5)
    with patch.object(sources, "TILE_BYTES", tile_bytes):
        found = read_all(SafetensorsFiles(save(clients[:4]), *save(clients[4:], "base")), base=True)
        wanted = read_all(NamedTensors(clients[:4], clients[4]), base=True)
    assert found.keys() == wanted.keys() == {"matrix", "vector", "number", "steps", "mask"}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_only_chosen_rows_are_read(make_clients, save):
    clients = make_clients(4)
    source = SafetensorsFiles(save(clients))
    names = [entry.name for entry in source.entries]
    chosen = [[2, 0] if name == "matrix" else [] if name == "vector" else None for name in names]
    found = read_all(source, chosen)
    assert torch.equal(found["matrix"], torch.stack([clients[i]["matrix"].flatten() for i in (2, 0)]))
    assert found.keys() == {"matrix", "vector"}
    assert found["vector"].shape == (0, 1100)


def test_folders_and_shards_are_clients_too(make_clients, save, tmp_path):
    clients = make_clients(3)
    paths = save(clients)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    paths[1].rename(one / "model.safetensors")
    two.mkdir()
    names = sorted(clients[2])
    for part in range(2):
        save_file({name: clients[2][name] for name in names[part::2]}, two / f"{part}.safetensors")
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = read_all(SafetensorsFiles([paths[0], one, two]))
    wanted = read_all(NamedTensors(clients))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_memory_is_bounded_by_tiles_whatever_the_size_of_the_files(save):
    """Every buffer passes through prefer_huge_pages; a tile is a view of one of them."""
    N, D = 6, 300_000
    paths = save([{"w": torch.full((D,), float(i))} for i in range(N)])
    buffers = []

    def see(buffer):
        buffers.append(buffer)
        return buffer

    with patch.object(sources, "TILE_BYTES", 200_000), patch.object(files, "prefer_huge_pages", see):
        source = SafetensorsFiles(paths)
        tiles = 0
        for tile in source.tiles(everyone(source), base=False):
            tiles += 1
            assert any(tile.rows.untyped_storage().data_ptr() == buffer.data_ptr() for buffer in buffers)
    assert tiles == 49  # of 6144 columns
    assert sum(buffer.nbytes for buffer in buffers) <= (files.AHEAD + 1) * (200_000 + 2 * 64 * (N + 1))


def test_the_next_tiles_are_read_meanwhile(save):
    paths = save([{"w": torch.arange(5000.0)}])
    read = threading.Event()
    ahead = files._Files.read

    def tell(self, begin, *rest):
        ahead(self, begin, *rest)
        if begin > 0:
            read.set()

    with patch.object(sources, "TILE_BYTES", 1), patch.object(files._Files, "read", tell):
        tiles = SafetensorsFiles(paths).tiles([[0]], base=False)
        next(tiles)
        assert read.wait(60)
        tiles.close()


def test_a_sweep_that_is_left_closes_its_files_and_ends_its_thread(save, monkeypatch):
    opened, closed = [], []
    really_open, really_close = files.os.open, files.os.close
    monkeypatch.setattr(files.os, "open", lambda *args: opened.append(really_open(*args)) or opened[-1])
    monkeypatch.setattr(files.os, "close", lambda file: closed.append(file) or really_close(file))
    source = SafetensorsFiles(save([{"w": torch.zeros(5000)}] * 3))
    tiles = source.tiles(everyone(source), base=False)
    next(tiles)
    tiles.close()
    assert len(opened) == 3
    assert sorted(closed) == sorted(opened)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_metadata_is_what_all_agree_on(tmp_path):
    for i in range(2):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{i}.safetensors", metadata={"format": "pt", "client": str(i)})
    assert SafetensorsFiles([tmp_path / "0.safetensors", tmp_path / "1.safetensors"]).metadata == {"format": "pt"}


def test_what_cannot_be_aggregated_is_named(make_clients, save, tmp_path):
    paths = save(make_clients(2))
    with pytest.raises(ValueError, match=r"given more than once: .*client-01.*; weights let a client count"):
        SafetensorsFiles([*paths, paths[1]])
    with pytest.raises(ValueError, match="no files were given"):
        SafetensorsFiles([])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nobody"):
        SafetensorsFiles([*paths, tmp_path / "nobody"])
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "eight.safetensors")
    with pytest.raises(ValueError, match=r"eight.safetensors: a is F8_E4M3; what can be aggregated is \['BF16'"):
        SafetensorsFiles([tmp_path / "eight.safetensors"])
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors does not hold the tensors of .*client-00"):
        SafetensorsFiles([paths[0], tmp_path / "other.safetensors"])
    (tmp_path / "cut.safetensors").write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read"):
        SafetensorsFiles([paths[0], tmp_path / "cut.safetensors"])


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"names shards outside its folder: \['../x.safetensors'\]"):
        SafetensorsFiles([tmp_path])


def test_a_file_that_shrinks_meanwhile_is_named(save):
    paths = save([{"w": torch.zeros(100_000)}] * 2)
    source = SafetensorsFiles(paths)
    with paths[1].open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"client-01.safetensors ended while it was read"):
        read_all(source)
