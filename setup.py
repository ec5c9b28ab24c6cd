"""The build: two source roots, one extension without torch, and when asked for a second one for CUDA.

ANABRANCH_CUDA=1 pip install .    also builds anabranch_kernels._cuda for sm_80 and sm_90a; needs nvcc on PATH

Names, versions and dependencies are in pyproject.toml.
"""

import os
import subprocess
from glob import glob
from pathlib import Path
from runpy import run_path
from shutil import which

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

source_hash = run_path("kernels/anabranch_kernels/source_hash.py")["source_hash"]
HASH = f'"{source_hash(Path())}"'


class BuildExtensions(build_ext):
    """Compiles the CUDA extension, whose sources end in .cu, with one call of nvcc."""

    def build_extension(self, extension: Extension) -> None:
        if not any(source.endswith(".cu") for source in extension.sources):
            return super().build_extension(extension)
        if which("nvcc") is None:
            raise SystemExit("ANABRANCH_CUDA=1 needs nvcc on PATH; leave it out to install without the CUDA extension")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            "nvcc", "-shared", "-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden",
            "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a",
            *(f"-D{name}={value}" for name, value in extension.define_macros),
            *(f"-I{folder}" for folder in [*extension.include_dirs, *self.include_dirs]),
            *extension.sources, "-o", str(target),
        ]  # fmt: skip
        return subprocess.run(command, check=True)


extensions: list[Extension] = [
    Pybind11Extension(
        "anabranch_kernels._C",
        sorted(glob("bindings/*.cpp") + glob("csrc/*.cpp")),
        include_dirs=["csrc", "bindings"],
        depends=sorted(glob("csrc/*.h") + glob("bindings/*.h")),
        cxx_std=17,
        # -O2: constant loops are unrolled by pragma, and -O3 only triples the time to compile. The two warnings are
        # false ones of GCC 12, about its own AVX-512 header.
        extra_compile_args=[
            "-O2",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ],
        define_macros=[("ANABRANCH_SOURCE_HASH", HASH)],
    )
]
if os.environ.get("ANABRANCH_CUDA") == "1":
    extensions.append(
        Pybind11Extension(
            "anabranch_kernels._cuda",
            sorted(glob("bindings/cuda/*.cpp") + glob("csrc/*.cu")),
            include_dirs=["csrc", "bindings"],
            define_macros=[("ANABRANCH_SOURCE_HASH", HASH.replace('"', '\\"'))],
        )
    )

ParallelCompile("MAX_JOBS", default=2).install()
setup(
    package_dir={"anabranch": "engine/anabranch", "anabranch_kernels": "kernels/anabranch_kernels"},
    packages=find_packages("engine") + find_packages("kernels"),
    package_data={
        "anabranch": ["py.typed", "assets/*/*", "serve/http/*.html"],
        "anabranch_kernels": ["py.typed", "_C.pyi", "_cuda.pyi"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtensions},
)
