"""The compiled extension: refused when it is missing or not of these sources; instruction sets by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch_kernels import native

IMPORT = "import anabranch_kernels.native as native; print(native.extension.source_hash)"


@pytest.fixture
def tree(root, tmp_path):
    """A copy of the package with its extension and of the sources it was built from."""
    for folder in ("csrc", "bindings"):
        shutil.copytree(root / folder, tmp_path / folder)
    shutil.copy(root / "setup.py", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(native.__file__).parent, tmp_path / "kernels" / "anabranch_kernels", ignore=ignored)
    return tmp_path


def load(tree):
    environment = {**os.environ, "PYTHONPATH": str(tree / "kernels")}
    command = [sys.executable, "-c", IMPORT]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def test_the_extension_of_these_sources_is_loaded(tree):
    done = load(tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == native.extension.source_hash


@pytest.mark.parametrize(
    "changed", ["csrc/paged_attention.cpp", "csrc/simd_avx2.h", "bindings/module.cpp", "csrc/new.cpp"]
)
def test_an_extension_of_other_sources_is_refused(tree, changed):
    with (tree / changed).open("a") as file:
        file.write("// one more line\n")
    done = load(tree)
    assert done.returncode != 0
    assert "ImportError: the compiled kernels are older than csrc/ or bindings/; rebuild them" in done.stderr


def test_a_missing_extension_is_named(tree):
    for path in (tree / "kernels" / "anabranch_kernels").glob("_C.*.so"):
        path.unlink()
    done = load(tree)
    assert done.returncode != 0
    assert "ImportError: the compiled kernels cannot be loaded" in done.stderr
    assert "build them with `pip install .`" in done.stderr


def test_an_installed_package_needs_no_sources(tree):
    for folder in ("csrc", "bindings"):
        shutil.rmtree(tree / folder)
    (tree / "setup.py").unlink()
    assert load(tree).returncode == 0


def test_instruction_sets_are_listed_from_the_slowest():
    isas = native.extension.supported_isas()
    order = ["generic", "avx2", "avx512", "avx512_bf16"]
    assert isas == order[: len(isas)]  # each needs the one before
    assert isas[-1] == native.ISA


def test_instruction_sets_agree_with_the_system():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}
    if not flags:
        pytest.skip("/proc/cpuinfo names no x86 flags")
    isas = native.extension.supported_isas()
    assert ("avx2" in isas) == ({"avx2", "fma", "f16c"} <= flags)
    assert ("avx512" in isas) == ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags)
    assert ("avx512_bf16" in isas) == ("avx512" in isas and "avx512_bf16" in flags)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        native.extension.read_memory(0, 0, "sse9", 1)


def test_an_instruction_set_that_this_cpu_lacks_is_refused():
    isas = native.extension.supported_isas()
    missing = [isa for isa in ("avx2", "avx512", "avx512_bf16") if isa not in isas]
    if not missing:
        pytest.skip("this CPU has them all")
    with pytest.raises(ValueError, match=f"this CPU cannot run {missing[0]}"):
        native.extension.read_memory(0, 0, missing[0], 1)
