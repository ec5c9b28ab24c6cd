"""The compiled extension: refused when missing or of other sources; instruction sets by name; no read past a tensor."""

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anabranch_kernels import native
from anabranch_kernels.paged_attention import cpu as paged_attention
from anabranch_kernels.skinny_linear import cpu as skinny_linear

# An editable installation would find the extension of the real tree where the copy has none.
ALONE = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]; "
IMPORT = ALONE + "import anabranch_kernels.native as native; print(native.extension.source_hash)"


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


@pytest.mark.parametrize("changed", ["csrc/simd_avx2.h", "bindings/new.cpp"])
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
    order = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
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
    assert ("amx" in isas) <= ("avx512_bf16" in isas and {"amx_tile", "amx_bf16", "amx_int8"} <= flags)  # or refused


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        native.extension.read_memory(0, 0, "sse9", 1)


def test_an_instruction_set_that_this_cpu_lacks_is_refused():
    isas = native.extension.supported_isas()
    missing = [isa for isa in ("avx2", "avx512", "avx512_bf16", "amx") if isa not in isas]
    if not missing:
        pytest.skip("this CPU has them all")
    with pytest.raises(ValueError, match=f"this CPU cannot run {missing[0]}"):
        native.extension.read_memory(0, 0, missing[0], 1)


def at_the_edge(tensor):
    """A copy that ends where readable memory ends: one element further is a segmentation fault."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)


def random(kind, *shape):
    return torch.randint(-127, 128, shape, dtype=kind) if kind == torch.int8 else torch.randn(shape).to(kind)


def attend_at_the_edge(isa, dtype, kind, widths, cached, new, v_top_k):
    """Pages of 3 tokens, the last one full: its last row is the last readable memory of each cache."""
    pages = cached // 3
    caches = [at_the_edge(random(kind, pages, H, 3, D)) for H, D in zip((2, 4), widths, strict=True)]
    scales = [at_the_edge(torch.rand(cache.shape[:3])) if kind == torch.int8 else None for cache in caches]
    tables = [list(range(pages))], [cached], [0, new]
    tables = [at_the_edge(torch.tensor(table, dtype=torch.int32)) for table in tables]
    q = at_the_edge(random(dtype, new, 8, widths[0]))
    paged_attention.paged_attention(q, *caches, *tables, *scales, 0.1, None, v_top_k, False, isa=isa)
    k, v = (at_the_edge(random(dtype, 2, cache.shape[1], cache.shape[3])) for cache in caches)
    paged_attention.store_kv(k, v, *caches, at_the_edge(torch.tensor([0, cached - 1])), *scales)


def multiply_at_the_edge(isa, dtype, kind, M, width, out):
    x, weight, bias = (at_the_edge(random(*what)) for what in ((dtype, M, width), (kind, out, width), (dtype, out)))
    scales = at_the_edge(torch.rand(out)) if kind == torch.int8 else None
    skinny_linear.skinny_linear(x, weight, bias, scales, isa=isa)


def run_at_the_edge():
    isas = native.extension.supported_isas()
    for isa in [*isas, *["avx512_bf16_emulated"][: "avx512" in isas]]:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for kind in {dtype, torch.int8}:
                for widths in ((16, 32), (33, 7), (1, 24)):
                    for cached, new, v_top_k in ((3, 1, None), (66, 1, None), (66, 40, None), (66, 5, 4)):
                        attend_at_the_edge(isa, dtype, kind, widths, cached, new, v_top_k)
                sizes = ((1, 64, 8), (1, 37, 5), (3, 15, 1), (16, 33, 7), (5, 1, 3), (3, 128, 32), (40, 70, 50))
                for M, width, out in sizes:
                    multiply_at_the_edge(isa, dtype, kind, M, width, out)


def run_here(program):
    """In a process of its own, which a read past the end would end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"import torch; from {Path(__file__).stem} import *; {program}"]
    here = Path(__file__).parent
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is protected as on Linux")
def test_no_kernel_reads_past_its_tensors():
    """In a process of its own, which the first read past an end would end; at last one does, to show that it would."""
    program = (
        f"import ctypes, torch, {Path(__file__).stem} as test\n"
        "test.run_at_the_edge()\n"
        "print('whole', flush=True)\n"
        "ctypes.string_at(test.at_the_edge(torch.ones(3)).data_ptr(), 13)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
