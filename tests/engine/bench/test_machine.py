"""A table of times says where it was made."""

import torch

from anabranch.bench.machine import describe, last_cache_bytes, working_set_bytes


def test_this_machine_can_be_described(threads):
    threads(1)
    machine = describe()
    assert machine.cores >= machine.threads == 1
    assert machine.cpu
    assert machine.cpu in machine.sentence()
    assert dict(machine.versions)["torch"] == torch.__version__


def test_the_working_set_is_larger_than_any_cache():
    assert working_set_bytes() >= max(256 * 2**20, 2 * last_cache_bytes())
