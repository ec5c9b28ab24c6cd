"""The judge of compiled Triton kernels: what it covers, what it refuses, and one kernel compiled for real."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")
import anabranch_kernels
from anabranch_kernels.gpu_check import SHARED_BYTES, Resources, cases, judge, kind_of

FIT = Resources(registers=128, spill_bytes=0, shared_bytes=64 * 1024, warps=4, stages=3, cp_async_16=8, wgmma=0, mma=8)


def test_every_kernel_of_the_package_is_compiled():
    found = set()
    for path in Path(anabranch_kernels.__file__).parent.rglob("gpu*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(node.name)
    assert found
    assert found == {case.kernel for case in cases()}


def test_every_argument_of_every_case_has_a_type():
    for case in cases():
        kernel = getattr(import_module(case.module), case.kernel)
        assert {name: kind_of(name, case) for name in kernel.arg_names}
        assert set(case.plan.constants) <= set(kernel.arg_names)


def test_an_argument_without_a_type_is_named():
    with pytest.raises(ValueError, match="'surprise'"):
        kind_of("surprise", next(cases()))


@pytest.mark.parametrize(
    ("change", "wanted", "words"),
    [
        ({}, 2, []),
        ({"spill_bytes": 8}, 1, ["8 bytes of registers spilled"]),
        ({"shared_bytes": SHARED_BYTES + 1}, 1, [f"{SHARED_BYTES + 1} bytes of shared memory, {SHARED_BYTES} allowed"]),
        ({"registers": 255}, 3, ["2 programs fit a multiprocessor, 3 are launched"]),
        ({"shared_bytes": 150 * 1024}, 2, ["1 programs fit a multiprocessor, 2 are launched"]),
    ],
)
def test_what_may_not_ship_is_said(change, wanted, words):
    assert judge(replace(FIT, **change), wanted) == words


def test_one_kernel_compiles_down_to_machine_code(tmp_path):
    table = tmp_path / "table.json"
    command = [
        "-m",
        "anabranch_kernels.gpu_check",
        "--jobs",
        "1",
        "--only",
        "merge 32/4/16 64/64",
        "--json",
        str(table),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(table.read_text())["cases"]
    assert row["ok"]
    assert row["spill_bytes"] == 0
    assert 16 <= row["registers"] <= 255


def test_a_kernel_that_does_not_compile_is_an_exit_status(tmp_path):
    script = """
import sys
from dataclasses import replace
from anabranch_kernels import gpu_check
first = next(case for case in gpu_check.cases() if case.kernel == "gather_kernel")
broken = replace(first, plan=replace(first.plan, constants=first.plan.constants | {"CHUNK": 33}))
result = gpu_check.attempt(broken, 90)
print(result)
sys.exit(isinstance(result, str))
"""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 1, done.stderr
    assert "power of 2" in done.stdout
