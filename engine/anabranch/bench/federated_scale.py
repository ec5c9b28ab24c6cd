"""One round of very many clients in a process of its own, for its seconds and its memory.

python -m anabranch.bench.federated_scale CLIENTS SAMPLES THREADS
"""

import json
import resource
import subprocess
import sys
import time

from anabranch.bench.federated import Row, digits_task
from anabranch.common.memory import keep_freed_memory
from anabranch.federated.rounds import run_round


def measure_scale(clients: int, *, samples: int, threads: int) -> Row:
    """A round of clients that draw so many of the digits each, in steps of 16."""
    command = [sys.executable, "-m", __name__, str(clients), str(samples), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout)
    return Row(
        case=f"D, {clients} clients, {-(-samples // 16)} steps", contender=f"anabranch, {threads} threads",
        seconds=(seconds,), clients=clients, peak=peak,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print seconds and bytes."""
    clients, samples, threads = map(int, arguments)
    keep_freed_memory()
    federation = digits_task(clients, n=samples).federation
    started = time.perf_counter()
    run_round(federation, threads=threads)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


if __name__ == "__main__":
    main(sys.argv[1:])
