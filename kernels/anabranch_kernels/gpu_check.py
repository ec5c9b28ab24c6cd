"""Compile every Triton kernel in its shipped configurations for a GPU that need not be there, and judge the result.

    python -m anabranch_kernels.gpu_check [--arch 90] [--json FILE] [--jobs N] [--only SUBSTRING]

Fails (exit status 1) on a kernel that does not compile, spills registers to local memory, asks for more shared memory
than the multiprocessor has, or leaves no room for the programs that its launcher puts there side by side. The table
also counts what the compiler made of loads and products: 16-byte copies to shared memory (cp.async), warp-group
products (wgmma) and warp products (mma).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .launch import Plan

SHARED_BYTES = 227 * 1024  # what one program may have on sm_90; a multiprocessor has 228 KiB
REGISTERS = 65536
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8"}
# Arguments of all kernels that are not tensors of a case's own dtypes. Strides and width are multiples of 16.
FIXED: dict[str, str | None] = {
    **dict.fromkeys(("page_table", "seq_lens", "cu_seqlens_q"), "*i32"),
    **dict.fromkeys(("slots", "chosen"), "*i64"),
    **dict.fromkeys(("partial", "partial_lse", "lse", "scores", "shares", "delta"), "*fp32"),
    **dict.fromkeys(
        ("window", "longest", "shortest", "T", "S", "B", "P", "max_pages", "first_row", "kept", "N"), "i32"
    ),
    **dict.fromkeys(("scale", "resolution"), "fp32"),
    "found_nan": "*i32",
    "D": "i64",
}
STRIDE = re.compile(
    r"(q|k|v|g|table|score|points|centre|x|y|a|b|router|matrix)_(batch|token|head|page|slot|row|column)|width"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel in one configuration.

    module, kernel   where the kernel is
    types            Triton type of each argument that is not a stride or in FIXED; None for an argument left out
    residents        programs that must fit one multiprocessor together
    multiples        arguments that are multiples of 16, besides strides
    """

    name: str
    module: str
    kernel: str
    plan: Plan
    types: dict[str, str | None]
    residents: int = 1
    multiples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    stages: int
    cp_async_16: int
    wgmma: int
    mma: int

    @property
    def residents(self) -> int:
        """Programs of this kernel that fit one multiprocessor by registers and shared memory."""
        by_registers = REGISTERS // max(1, -(-self.registers // 8) * 8 * self.warps * 32)
        return min(by_registers, (SHARED_BYTES + 1024) // (self.shared_bytes + 1024), 64 // self.warps)


def judge(resources: Resources, wanted: int) -> list[str]:
    """What is wrong with a compiled kernel, in words; nothing for one that may ship."""
    wrong = []
    if resources.spill_bytes:
        wrong.append(f"{resources.spill_bytes} bytes of registers spilled")
    if resources.shared_bytes > SHARED_BYTES:
        wrong.append(f"{resources.shared_bytes} bytes of shared memory, {SHARED_BYTES} allowed")
    elif resources.residents < wanted:
        wrong.append(f"{resources.residents} programs fit a multiprocessor, {wanted} are launched")
    return wrong


def _dtypes(q: torch.dtype, k: torch.dtype, v: torch.dtype) -> dict[str, str | None]:
    return {
        "q": POINTERS[q], "out": POINTERS[q], "k_cache": POINTERS[k], "v_cache": POINTERS[v],
        "k_scales": "*fp32" if k == torch.int8 else None, "v_scales": "*fp32" if v == torch.int8 else None,
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return POINTERS[dtype].removeprefix("*")


BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
SIGMA_1B, SIGMA_10B = (32, 4, 16, 64, 64), (32, 4, 16, 128, 128)
# Shapes (Hq, Hk, Hv, Dk, Dv), page size, dtypes of q, K and V.
PAGED = (
    (SIGMA_1B, 16, (BF16, BF16, BF16)),
    (SIGMA_1B, 64, (BF16, BF16, BF16)),
    (SIGMA_1B, 64, (F16, F16, F16)),
    (SIGMA_1B, 16, (BF16, I8, I8)),
    (SIGMA_1B, 64, (BF16, I8, BF16)),
    (SIGMA_1B, 16, (F32, F32, F32)),
    ((32, 4, 16, 32, 64), 64, (BF16, BF16, BF16)),  # keys of half the width
    ((32, 16, 16, 64, 64), 64, (BF16, BF16, BF16)),  # the twin with as many K as V heads
    (SIGMA_10B, 16, (BF16, BF16, BF16)),
    (SIGMA_10B, 64, (BF16, BF16, BF16)),
    (SIGMA_10B, 64, (BF16, I8, I8)),
    ((32, 8, 8, 128, 128), 16, (BF16, BF16, BF16)),  # Llama 3.1 8B
    ((32, 2, 8, 128, 128), 64, (BF16, BF16, BF16)),  # the same, converted
    ((28, 4, 4, 128, 128), 16, (BF16, BF16, BF16)),  # Qwen2 7B
    ((24, 8, 3, 96, 128), 64, (BF16, BF16, BF16)),  # neither head count divides the other
    ((16, 1, 1, 192, 128), 64, (BF16, BF16, BF16)),
)
DENSE = (
    (SIGMA_1B, BF16),
    (SIGMA_10B, BF16),
    (SIGMA_1B, F32),
    ((24, 8, 3, 96, 128), F16),
    ((8, 2, 8, 64, 64), BF16),
    (SIGMA_10B, F32),
)


def cases() -> Iterator[Case]:
    """Every shipped configuration, from the plans that the launchers make."""
    yield from _paged_cases()
    yield from _dense_cases()
    yield from _coordinate_cases()
    yield from _field_cases()
    yield from _median_cases()
    yield from _rank_lora_cases()


def _paged_cases() -> Iterator[Case]:
    from .paged_attention import gpu_decode, gpu_prefill, gpu_select, gpu_store

    package = "anabranch_kernels.paged_attention"
    for shape, page, (q, k, v) in PAGED:
        Hq, Hk, Hv, Dk, Dv = shape
        label = f"{Hq}/{Hk}/{Hv} {Dk}/{Dv} page {page} {_name(q)}/{_name(k)}/{_name(v)}"
        types = _dtypes(q, k, v)
        split = gpu_decode.plan(*shape, page, q, k, v, 64, pack=0)
        yield Case(
            name=f"decode {label}",
            module=f"{package}.gpu_decode",
            kernel="split_kernel",
            plan=split,
            types=types,
            residents=gpu_decode.PROGRAMS_PER_SM,
        )
        plan = gpu_prefill.plan(*shape, page, q, k, v, 64, windowed=False)
        yield Case(
            name=f"prefill {label}", module=f"{package}.gpu_prefill", kernel="prefill_kernel", plan=plan, types=types
        )
    for shape, page, (q, k, v), B in ((*PAGED[1], 2048), (*PAGED[9], 1)):
        Hq, Hk, Hv, Dk, Dv = shape
        label = f"{Hq}/{Hk}/{Hv} {Dk}/{Dv}"
        types = _dtypes(q, k, v)
        mixed = gpu_decode.plan(*shape, page, q, k, v, B, pack=gpu_decode.SHORT)
        windowed = gpu_prefill.plan(*shape, page, q, k, v, B, windowed=True)
        score = gpu_select.plan(Hq, Hk, Dk, page, q, k, B)
        gather = gpu_select.gather_plan(Hq, Hv, Dv, page, B)
        store = gpu_store.plan(Hk, Hv, Dk, Dv, page)
        new_rows = types | {"k": POINTERS[q], "v": POINTERS[q]}
        quantised = new_rows | _dtypes(q, I8, I8)
        for name, module, kernel, plan, arguments in (
            (f"decode in a mixed batch {label}", "gpu_decode", "split_kernel", mixed, types),
            (f"merge {label}", "gpu_decode", "merge_kernel", gpu_decode.merge_plan(mixed), types),
            (f"prefill windowed {label}", "gpu_prefill", "prefill_kernel", windowed, types),
            (f"score {label}", "gpu_select", "score_kernel", score, types),
            (f"gather {label}", "gpu_select", "gather_kernel", gather, types),
            (f"store {label}", "gpu_store", "store_kernel", store, new_rows),
            (f"store int8 {label}", "gpu_store", "store_kernel", store, quantised),
        ):
            yield Case(name=name, module=f"{package}.{module}", kernel=kernel, plan=plan, types=arguments)


def _dense_cases() -> Iterator[Case]:
    from .attention import gpu

    for shape, dtype in DENSE:
        Hq, Hk, Hv, Dk, Dv = shape
        names = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
        types: dict[str, str | None] = dict.fromkeys(names, POINTERS[dtype])
        for kernel in ("forward", "dq", "dkv"):
            yield Case(
                name=f"{kernel} {Hq}/{Hk}/{Hv} {Dk}/{Dv} {_name(dtype)}",
                module="anabranch_kernels.attention.gpu",
                kernel=f"{kernel}_kernel",
                plan=gpu.plan(kernel, *shape, dtype, causal=True),
                types=types,
            )


def _coordinate_cases() -> Iterator[Case]:
    from .coordinate_rules import gpu
    from .coordinate_rules.reference import Rule

    kinds = [(rule, 9, F32) for rule in Rule]
    kinds += [(Rule.MEDIAN, 32, BF16), (Rule.PHOCAS, 32, F16)]
    kinds += [(rule, gpu.MOST_ROWS, F32) for rule in (Rule.MEDIAN, Rule.PHOCAS)]  # ten seconds each to compile
    for rule, N, dtype in kinds:
        f = 0 if rule in (Rule.MEDIAN, Rule.SIGN_MAJORITY) else N // 4
        yield Case(
            name=f"{rule.name.lower().replace('_', ' ')} N={N} f={f} {_name(dtype)}",
            module="anabranch_kernels.coordinate_rules.gpu",
            kernel="sorting_kernel",
            plan=gpu.plan(rule, f, N, dtype),
            types=dict.fromkeys(("points", "out"), POINTERS[dtype]),
        )


def _field_cases() -> Iterator[Case]:
    from .field_coding import gpu_convert, gpu_multiply, gpu_project
    from .field_coding.fields import BABYBEAR, F50, GOLDILOCKS

    def case(module: str, kernel: str, label: str, plan: Plan, residents: int, types: dict[str, str | None]) -> Case:
        return Case(
            name=f"{kernel} {label}",
            module=f"anabranch_kernels.field_coding.{module}",
            kernel=f"{kernel}_kernel",
            plan=plan,
            types=numbers | types,
            residents=residents,
        )

    numbers: dict[str, str | None] = {
        **dict.fromkeys(("M", "U", "L", "K", "C", "n", "share"), "i32"),
        **dict.fromkeys(("clip", "scale", "divisor"), "i64"),  # the bits of float64
        "digits": "*i8", "counts": "*i64", "begins": "*i64",
    }  # fmt: skip
    # The other 31-bit primes make the same instructions with other constants; so do F50's elements outside products.
    for field, shapes in (
        (BABYBEAR, ((64, 48, 4), (64, 48, 1), (128, 96, 4), (128, 96, 1), (1, 100, 4), (64, 200, 4))),
        (GOLDILOCKS, ((64, 32, 2), (64, 48, 1), (64, 96, 2))),
        (F50, ((64, 32, 2), (64, 96, 1))),
    ):
        element = "*i32" if field.bytes == 4 else "*i64"
        elements: dict[str, str | None] = dict.fromkeys(("matrix", "x", "out", "offsets", "partial"), element)
        for M, U, align in shapes:
            resident = field.bytes * U <= gpu_multiply.RESIDENT
            kernel, residents = ("resident", gpu_multiply.RESIDENTS) if resident else ("streaming", 1)
            plan = gpu_multiply.plan(M, U, align, field)
            yield case("gpu_multiply", kernel, f"{field.name} {M}x{U} align {align}", plan, residents, elements)
        yield case("gpu_multiply", "digits", field.name, gpu_multiply.digits_plan(32, field), 1, elements)
        yield case("gpu_project", "project", field.name, gpu_project.plan(field), 2, elements)
        if field is F50:
            continue
        convert, accept = gpu_convert.plan(field), gpu_convert.accept_plan(field)
        for source, dither in (("*fp32", None), ("*bf16", "*fp64"), ("*fp64", "*fp64")):
            label = f"{field.name} {source[1:]}{' dithered' if dither else ''}"
            yield case("gpu_convert", "quantise", label, convert, 1, elements | {"x": source, "dither": dither})
        yield case("gpu_convert", "dequantise", field.name, convert, 1, elements | {"out": "*fp64"})
        yield case("gpu_convert", "count", field.name, accept, 1, elements)
        yield case("gpu_convert", "accept", field.name, accept, 1, elements)


def _median_cases() -> Iterator[Case]:
    from .geometric_median import gpu, gpu_solve

    sums: dict[str, str | None] = dict.fromkeys(
        ("gram", "partial", "squares", "coefficients", "weights", "gaps", "around", "scratch"), "*fp64"
    )
    sizes: dict[str, str | None] = dict.fromkeys(("D", "width", "parts", "blocks", "max_steps"), "i32")

    def case(kernel: str, label: str, plan: Plan, dtype: torch.dtype = F32, module: str = "gpu") -> Case:
        return Case(
            name=f"{kernel} {label}",
            module=f"anabranch_kernels.geometric_median.{module}",
            kernel=f"{kernel}_kernel",
            plan=plan,
            types=sums | sizes | {"statuses": "*i64"} | dict.fromkeys(("points", "centre", "out"), POINTERS[dtype]),
            multiples=("D", "width"),
        )

    for N, dtype in ((10, F32), (32, F32), (32, BF16), (100, F32), (100, F16)):
        yield case("gram", f"N={N} {_name(dtype)}", gpu.gram_plan(N, scaled=False), dtype)
    for N in (10, 32, 100):
        yield case("gram", f"scaled N={N}", gpu.gram_plan(N, scaled=True))
    for dtype in (F32, BF16):
        yield case("combine", f"N=32 {_name(dtype)}", gpu.combine_plan(32), dtype)
    yield case("sum", "N=32", gpu.sum_plan(32))
    for N in (16, 32, 64, 128):
        yield case("solve", f"N={N}", gpu_solve.plan(N), module="gpu_solve")


def _rank_lora_cases() -> Iterator[Case]:
    from .rank_lora import gpu_backward, gpu_expand, gpu_shrink

    fixed: dict[str, str | None] = {
        **dict.fromkeys(("places", "adapter_of", "starts", "picked"), "*i32"), "order": "*i64", "counts": "*i64",
        **dict.fromkeys(("bias", "scales", "gates", "h", "dv", "logits"), "*fp32"),
        **dict.fromkeys(("adapters", "router_rows", "rank_rows"), "i32"),
    }  # fmt: skip
    own = ("x", "a", "b", "router", "y", "factors", "backward", "forward", "drouter", "da")
    D, A = 4096, 64
    # Rows of the widest router and of A: SMoRA of 64 ranks, LoRA of 64 and 256; the most that each kernel is for.
    for GW, RW, chosen, active, dtype in (
        (64, 64, 8, 8, BF16), (64, 64, 8, 8, F32), (0, 64, 0, 64, F16), (0, 256, 0, 256, BF16),
        (128, 128, 8, 8, BF16), (1024, 1024, 16, 16, BF16),
    ):  # fmt: skip
        sizes = GW, RW, chosen, active
        decode = gpu_shrink.plan(16, D, A, *sizes, few=True, routed=False, kept=False, aligned=True)
        plans = {
            "shrink few": decode,
            "expand": gpu_expand.expand_plan(-(-D // decode.constants["PART"]), *sizes, add=True),
            "expand kept": gpu_expand.expand_plan(1, *sizes, add=False),
            "sums": gpu_expand.sums_plan(8192, A, GW, RW, dtype, add=False, aligned=True),
            "gates": gpu_backward.gates_plan(*sizes),
            "weights": gpu_backward.weights_plan(GW, RW, dtype),
        }
        if GW + RW <= gpu_shrink.FUSED:
            for T in (1024, 8192):
                plans[f"shrink and route T={T}"] = gpu_shrink.plan(
                    T, D, A, *sizes, few=False, routed=True, kept=True, aligned=True
                )
        for name, plan in plans.items():
            kernel = name.split()[0]
            module = {"shrink": "gpu_shrink", "expand": "gpu_expand", "sums": "gpu_expand"}.get(kernel, "gpu_backward")
            yield Case(
                name=f"adapters {name} {GW}+{RW} of {chosen} {_name(dtype)}",
                module=f"anabranch_kernels.rank_lora.{module}",
                kernel=f"{kernel}_kernel",
                plan=plan,
                types=fixed | dict.fromkeys(own, POINTERS[dtype]),
            )


def kind_of(argument: str, case: Case) -> str | None:
    """Triton type of a kernel's argument; None for one that is a constant or left out."""
    if argument in case.plan.constants:
        return None
    for kinds in (case.types, FIXED):
        if argument in kinds:
            return kinds[argument]
    if STRIDE.fullmatch(argument):
        return "i32"
    raise ValueError(f"{case.kernel} has an argument {argument!r} of unknown type")


def compile_case(case: Case, arch: int) -> Resources:
    """Build one kernel down to machine code and read what it takes."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(case.module), case.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        kind = kind_of(name, case)
        if kind is None:
            signature[name], constants[i,] = "constexpr", case.plan.constants.get(name)
            continue
        signature[name] = kind
        if kind.startswith("*") or STRIDE.fullmatch(name) or name in case.multiples:
            attributes[i,] = [["tt.divisibility", 16]]
    plan = case.plan
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "maxnreg": plan.max_registers}
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )
    registers, spilled = _resource_usage(built.asm["cubin"], Path(triton.__file__).parent)
    ptx = built.asm["ptx"]
    return Resources(
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=built.metadata.shared,
        warps=case.plan.num_warps,
        stages=case.plan.num_stages,
        cp_async_16=len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, *(?:16|0x10)\b", ptx)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
    )


def _resource_usage(cubin: bytes, triton_folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory that it spills to, by the cuobjdump that Triton carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if not found:
        raise RuntimeError(f"no resource usage in the output of {tool}: {done.stdout!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def attempt(case: Case, arch: int) -> Resources | str:
    try:
        return compile_case(case, arch)
    except Exception as error:  # whatever the compiler raises is this case's result
        return f"{type(error).__name__}: {error}"


def _row(case: Case, result: Resources | str) -> tuple[str, bool]:
    if isinstance(result, str):
        return f"{case.name:<58} {result}", False
    wrong = judge(result, case.residents)
    numbers = (result.registers, result.spill_bytes, f"{result.shared_bytes / 1024:.0f}", result.warps, result.stages,
               result.residents, result.cp_async_16, result.wgmma, result.mma)  # fmt: skip
    return f"{case.name:<58}" + "".join(f"{value:>7}" for value in numbers) + f"  {'; '.join(wrong) or 'ok'}", not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (default 90)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    chosen = [case for case in cases() if options.only in case.name]
    titles = ("regs", "spill", "KiB", "warps", "stages", "per SM", "cp16", "wgmma", "mma")
    print(f"{f'sm_{options.arch}':<58}" + "".join(f"{title:>7}" for title in titles))
    good, table = True, []
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for case, result in zip(chosen, pool.map(attempt, chosen, [options.arch] * len(chosen)), strict=True):
            line, fine = _row(case, result)
            print(line, flush=True)
            good &= fine
            outcome = {"error": result} if isinstance(result, str) else asdict(result)
            table.append({"name": case.name, "kernel": case.kernel, "ok": fine, **outcome})
    if options.json:
        options.json.write_text(json.dumps({"arch": options.arch, "cases": table}, indent=1) + "\n")
    print(f"{len(chosen)} kernels, {sum(not row['ok'] for row in table)} not fit to ship")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
