"""Memory that was freed is there at once."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
from anabranch.common.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def come_and_go():
    before = faults()
    for _ in range(20):
        bytearray(4 << 20)
        [bytearray(20 << 20) for _ in range(2)]  # the top of the heap is given back beyond twice the largest
    return faults() - before

come_and_go()
before, kept = come_and_go(), keep_freed_memory()
come_and_go()
print(kept, before, come_and_go())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    if kept == "False":
        pytest.skip("another C library than glibc")
    assert int(after) < 100  # of some ten thousand pages each time
    assert int(before) > 100 * int(after)
