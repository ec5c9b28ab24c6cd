"""The build: two source roots, one extension without torch.

Names, versions and dependencies are in pyproject.toml.
"""

from glob import glob
from pathlib import Path
from runpy import run_path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

source_hash = run_path("kernels/anabranch_kernels/source_hash.py")["source_hash"]

ParallelCompile("MAX_JOBS", default=2).install()
setup(
    package_dir={"anabranch": "engine/anabranch", "anabranch_kernels": "kernels/anabranch_kernels"},
    packages=find_packages("engine") + find_packages("kernels"),
    package_data={"anabranch": ["py.typed", "assets/*/*"], "anabranch_kernels": ["py.typed", "_C.pyi"]},
    ext_modules=[
        Pybind11Extension(
            "anabranch_kernels._C",
            sorted(glob("bindings/*.cpp") + glob("csrc/*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # -O2: constant loops are unrolled by pragma, and -O3 only triples the time to compile. The two warnings
            # are false ones of GCC 12, about its own AVX-512 header.
            extra_compile_args=[
                "-O2",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-maybe-uninitialized",
                "-Wno-uninitialized",
            ],
            define_macros=[("ANABRANCH_SOURCE_HASH", f'"{source_hash(Path())}"')],
        )
    ],
)
