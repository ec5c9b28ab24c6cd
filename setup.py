"""The build: two source roots, one extension without torch, and, when asked for, a second one for CUDA.

ANABRANCH_CUDA=1 pip install .    also builds anabranch_kernels._cuda for sm_80 and sm_90a (needs nvcc)
"""

import hashlib
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup


def source_hash() -> str:
    """Hash of the C++ sources; kernels/anabranch_kernels/native.py computes it again and compares."""
    digest = hashlib.sha256()
    for path in sorted([*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cpp"), *Path("bindings").glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


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
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
            define_macros=[("ANABRANCH_SOURCE_HASH", f'"{source_hash()}"')],
        )
    ],
)
