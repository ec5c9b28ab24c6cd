"""Every example in README.md and docs/ runs as it is printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall((ROOT / page).read_text()) if found == language]


def run(arguments, *, cwd, **environment):
    everything = {**os.environ, **environment}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=everything, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/floors.md",
        "docs/writing-a-method.md",
        "docs/embedding.md",
        "docs/aggregating.md",
        "docs/secure-aggregation.md",
        "docs/adapters.md",
        "docs/federated-learning.md",
        "docs/end-edge-cloud.md",
        "docs/serving.md",
    ],
)
def test_python_examples_run(page, tmp_path):
    examples = blocks(page, "python")
    assert examples
    (tmp_path / "example.py").write_text("\n".join(examples))  # one after another, as a reader would
    run(["example.py"], cwd=tmp_path)


def test_the_stories_of_the_page_can_be_sampled(data, tmp_path):
    """Three instead of 1200, of which the last is for calibration."""
    (example,) = blocks("docs/converting-checkpoints.md", "python")
    (tmp_path / "stories260k").symlink_to(data("stories260k"))
    run(["-c", example.replace("1200", "3").replace("1100", "2")], cwd=tmp_path)
    stories = sorted((tmp_path / "stories").rglob("*.txt"))
    assert [path.parent.name for path in stories] == ["calibration", "text", "text"]
    assert all(len(path.read_text()) > 100 for path in stories)


def test_the_op_of_the_page_builds_and_passes_its_test(tmp_path):
    """Its files go to the places they name; only what every op shares comes from the repository."""
    for body in blocks("docs/writing-an-op.md", "python") + blocks("docs/writing-an-op.md", "cpp"):
        path = tmp_path / body.split("\n")[0].lstrip("#/ ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    package = tmp_path / "kernels" / "anabranch_kernels"
    (package / "__init__.py").touch()
    (package / "native.py").write_text("from . import _C as extension\n")
    shutil.copy(ROOT / "kernels" / "anabranch_kernels" / "library.py", package)
    for name in ("parallel.h", "parallel.cpp"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc")
    (tmp_path / "setup.py").write_text(
        "from glob import glob\n"
        "from pybind11.setup_helpers import Pybind11Extension\n"
        "from setuptools import setup\n"
        "sources = sorted(glob('csrc/*.cpp') + glob('bindings/*.cpp'))\n"
        "extension = Pybind11Extension('_C', sources, include_dirs=['csrc'], cxx_std=17)\n"
        "setup(ext_modules=[extension])\n"
    )
    run(["setup.py", "--quiet", "build_ext", "--build-lib", str(package)], cwd=tmp_path)
    test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_sum_squares.py"]
    assert "11 passed" in run(test, cwd=tmp_path, PYTHONPATH=str(package.parent), TRITON_INTERPRET="1")
