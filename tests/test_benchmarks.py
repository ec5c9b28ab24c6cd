"""The benchmarks of the ops run, with each contender in its peers' group and its share of the roof beside its time."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = "(decode and 2048) or (prefill and 512) or (linear and 2560 and bfloat16)"


def test_contenders_share_a_group_and_tell_their_roof(tmp_path):
    path = tmp_path / "times.json"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "benchmarks", "--quick", "-k", CHOSEN]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, *command, "--benchmark-json", str(path)],
        cwd=ROOT, env=alone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(path.read_text())["benchmarks"]
    groups = Counter(benchmark["group"] for benchmark in benchmarks)
    linear = {f"M={M} [96, 64] bfloat16": 2 for M in (1, 2, 4, 8, 16, 32)}
    assert groups == {"decode S=96": 6, "prefill T=48": 5, **linear}
    assert all(benchmark["extra_info"]["roofline"] > 0 for benchmark in benchmarks)
