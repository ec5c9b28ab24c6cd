"""Names, and adapters in memory: who keeps what, and for how long."""

import gc
import shutil
import threading

import pytest
import torch

from anabranch.adapters.attach import linear_layers
from anabranch.adapters.files import read_adapters
from anabranch.serve.adapters import library as library_module
from anabranch.serve.adapters.library import AdapterLibrary, AdapterUnreadable, UnknownAdapter


@pytest.fixture
def folders(write_adapter, tmp_path):
    return [write_adapter(tmp_path / str(number), seed=number, targets=["q_proj"]) for number in range(4)]


@pytest.fixture
def make(model):
    return lambda host_bytes=1 << 20: AdapterLibrary(linear_layers(model), host_bytes=host_bytes)


def open_new(library, name, folder):
    return library.open(library.load(name, folder))


def test_a_name_stands_for_a_folders_weights(make, folders, model):
    library = make()
    loaded = open_new(library, "a", folders[0])
    assert library.open(library.find("a")) is loaded
    assert loaded.ranks == 4
    assert loaded.nbytes == sum(t.nbytes for packed in loaded.weights.values() for t in packed[1:])
    for name, adapter in read_adapters(linear_layers(model), folders[0]).items():
        assert all(map(torch.equal, loaded.weights[name][1:], adapter.packed()[1:]))
    assert library.reads == 1
    assert [(named.name, named.folder) for named in library.names()] == [("a", folders[0])]


def test_the_least_recently_used_leaves_memory_and_is_read_again(make, folders):
    each = open_new(make(), "a", folders[0]).nbytes
    library = make(2 * each + 1)
    for name, folder in zip("abc", folders, strict=False):
        library.load(name, folder)
    assert library.kept_bytes == 2 * each
    for name, reads in (("b", 3), ("c", 3), ("a", 4), ("c", 4), ("b", 5)):
        library.open(library.find(name))
        assert library.reads == reads, name


def test_what_a_request_holds_is_not_read_twice(make, folders):
    library = make(0)
    held = open_new(library, "a", folders[0])
    assert library.kept_bytes == 0
    assert library.reads == 2  # loading let go of it
    assert library.open(library.find("a")) is held
    del held
    gc.collect()
    library.open(library.find("a"))
    assert library.reads == 3


def test_unloading_harms_nobody_who_came_before(make, folders):
    library = make()
    named, other = library.load("a", folders[0]), library.load("b", folders[1])
    library.unload("a")
    shutil.rmtree(folders[0])
    held = library.open(named)  # found before it was unloaded
    library.host_bytes = held.nbytes
    library.open(other)
    assert library.kept_bytes == held.nbytes
    assert library.open(named) is held
    for call in (library.find, library.unload):
        with pytest.raises(UnknownAdapter, match=r"there is no adapter 'a'; loaded are \['b'\]"):
            call("a")


def test_a_name_is_taken_until_it_is_replaced(make, folders, monkeypatch):
    library = make()
    first = open_new(library, "a", folders[0])
    with pytest.raises(ValueError, match="'a' is loaded already"):
        library.load("a", folders[1])
    second = library.open(library.load("a", folders[1], replace=True))
    assert library.open(library.find("a")) is second
    assert first.number != second.number
    with pytest.raises(ValueError, match="needs a name"):
        library.load("", folders[1])
    monkeypatch.setattr(library_module, "MOST_NAMES", 1)
    with pytest.raises(ValueError, match="1 adapters are loaded already, and more are not allowed"):
        library.load("b", folders[1])


def test_files_that_have_changed_are_not_taken_for_the_old_ones(make, folders, write_adapter):
    library = make(0)
    library.load("a", folders[0])
    write_adapter(folders[0], seed=9, targets=["q_proj"])
    with pytest.raises(AdapterUnreadable, match="the files of adapter 'a' have changed since; load it again"):
        library.open(library.find("a"))
    shutil.rmtree(folders[0])
    with pytest.raises(AdapterUnreadable, match="have changed since"):
        library.open(library.find("a"))


def test_limits_hold_for_what_is_loaded_later(make, folders, write_adapter, tmp_path):
    library = make()
    library.load("a", folders[0])
    library.limit(ranks=3, file_bytes=1 << 20)
    with pytest.raises(ValueError, match="adapter 'b' has 4 ranks, there is room for 3: raise adapter_bytes"):
        library.load("b", folders[1])
    library.limit(ranks=9, file_bytes=100)
    with pytest.raises(ValueError, match="bytes, allowed 100"):
        library.load("b", folders[1])
    assert [named.name for named in library.names()] == ["a"]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        make(-1)


def test_many_threads_read_a_folder_once(make, folders):
    library = make(0)
    named = library.load("a", folders[0])
    gate, found = threading.Barrier(8), []

    def work():
        gate.wait(60)
        found.append(library.open(named))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(map(id, found))) == 1
    assert library.reads == 2
