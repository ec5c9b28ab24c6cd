"""Everything to be learnt on a machine with a GPU: its tests, its roofs, our kernels beside their peers.

    python benchmarks/gpu/run.py                  all parts, each in its own process of at most nine minutes
    python benchmarks/gpu/run.py decode prefill   only these
    python benchmarks/gpu/run.py --dry-run        every part in small on the CPU: shows that it runs, not how fast

Needs the package importable (`pip install -e .`, or PYTHONPATH=engine:kernels after `python setup.py build_ext
--inplace`). Tables go to benchmarks/results/gpu-<part>.json and .md, with refusals and losing rows.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import adapters
import cases
import torch
from torch import Tensor

from anabranch.bench.attention import Shape
from anabranch.bench.machine import describe
from anabranch.bench.report import Report, to_json, to_markdown
from anabranch.bench.timing import Case, Roofs, Sample, check_agreement, interleave, timed
from anabranch_kernels.field_coding.op import BABYBEAR

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "tests",
    "roof",
    "decode",
    "decode-wide",
    "prefill",
    "train",
    "coordinate-rules",
    "field",
    "median",
    "adapters",
    "adapters-train",
    "tune-decode",
    "tune-prefill",
    "tune-gram",
)
LIMIT_S = 540
REPEATS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables")
    parser.add_argument("--here", action="store_true", help="run the one named part in this process")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.here:
        return run_part(options.parts[0], options.out, dry=options.dry_run)
    failed = []
    for part in options.parts or PARTS:
        print(f"== {part}", flush=True)
        command = [sys.executable, __file__, part, "--here", "--out", str(options.out)]
        with subprocess.Popen(command + ["--dry-run"] * options.dry_run, start_new_session=True) as process:
            try:
                failed += [part] * bool(process.wait(LIMIT_S))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                print(f"{part} took more than {LIMIT_S} s")
                failed.append(part)
    print("failed: " + ", ".join(failed) if failed else "all parts ran")
    return 1 if failed else 0


def run_part(part: str, out: Path, *, dry: bool) -> int:
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
    if part == "tests":
        return run_tests(dry=dry)
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --dry-run shows that the parts run")
    if part == "roof":
        return show_roof(out, dry=dry)
    if part.startswith("tune"):
        return tune(part, out, dry=dry)
    return measure_part(part, out, dry=dry)


def run_tests(*, dry: bool) -> int:
    """Tests of the Triton kernels, which take the GPU when there is one, and whatever else is marked gpu."""
    ops = ("paged_attention", "attention", "coordinate_rules", "field_coding", "geometric_median", "rank_lora")
    kernels = [f"tests/kernels/test_{op}_gpu.py" for op in ops]
    others = [f"--ignore={path}" for path in kernels]
    failed = 0
    how = ["--collect-only"] if dry else ["-n", "8"]  # most of the time goes into compiling
    for chosen in (kernels, ["-m", "gpu", *others, "tests"]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *how, *chosen]
        done = subprocess.run(command, cwd=ROOT, check=False)
        failed += done.returncode not in (0, 5)  # 5: nothing is marked
    return failed


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def clock(step: Callable[[], object], *, dry: bool) -> Callable[[], float]:
    """The step, giving its seconds: by CUDA events on a GPU, with the L2 cache emptied before."""
    if dry:
        return timed(step)
    flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")

    def run() -> float:
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return run


def graphed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph; a step that cannot be captured stays as it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = step()
    except Exception as error:  # whatever a peer does that a graph cannot hold
        print(f"timed without a graph: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return step

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def roofs(*, dry: bool) -> Roofs:
    """Bytes/s of a plain read of 2 GiB, taken anew at each call, and operations/s of a large bfloat16 product."""
    device = device_of(dry)
    block = torch.ones(1 << (12 if dry else 29), device=device)
    read = clock(block.sum, dry=dry)
    size = 64 if dry else 8192
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    product = clock(lambda: left @ right, dry=dry)
    seconds = median(product() for _ in range(12))
    return Roofs(read=lambda: block.nbytes / read(), flops=2.0 * size**3 / seconds)


def show_roof(out: Path, *, dry: bool) -> int:
    found = roofs(dry=dry)
    source = torch.empty(1 << (12 if dry else 32), dtype=torch.int8, device=device_of(dry))
    target = torch.empty_like(source)
    copy = clock(lambda: target.copy_(source), dry=dry)
    table = {
        "device": "cpu" if dry else torch.cuda.get_device_name(),
        "read_bytes_per_s": max(found.read() for _ in range(REPEATS)),
        "copy_bytes_per_s": 2 * source.nbytes / min(copy() for _ in range(REPEATS)),
        "bf16_flops": found.flops,
    }
    (out / "gpu-roof.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))
    return 0


def measure_part(part: str, out: Path, *, dry: bool) -> int:
    """Measure the cases of a part in turns and write the table after each, so that a cut run leaves what it had."""
    torch.manual_seed(0)
    bench = cases.Bench(
        device=device_of(dry),
        dtype=torch.float32 if dry else torch.bfloat16,
        wrap=(lambda step: step) if dry or part.endswith("train") or part == "median" else graphed,
        compile=(lambda function: function) if dry else torch.compile,
    )
    roof = roofs(dry=dry)
    gpu = "dry run" if dry else torch.cuda.get_device_name()
    machine = describe()
    machine = replace(machine, cpu=f"{gpu}, host {machine.cpu}")
    samples: list[Sample] = []
    for case in planned_cases(part, bench, dry=dry):
        check_agreement(case)
        runs = [clock(contender.step, dry=dry) for contender in case.contenders]
        *times, reads = interleave([*runs, roof.read], repeats=2 if dry else REPEATS)
        samples += [
            Sample(
                case=case.name,
                contender=contender.name,
                seconds=tuple(value / case.calls for value in seconds),
                read_bytes=contender.read_bytes // case.calls,
                flops=contender.flops // case.calls,
                read_roof=median(reads),
                flops_roof=roof.flops,
            )
            for contender, seconds in zip(case.contenders, times, strict=True)
        ]
        report = Report(
            title=f"GPU: {part}", machine=machine, samples=tuple(samples), absent=tuple(dict.fromkeys(bench.absent))
        )
        (out / f"gpu-{part}.json").write_text(to_json(report))
        (out / f"gpu-{part}.md").write_text(to_markdown(report))
        print(f"measured {case.name}", flush=True)
    print((out / f"gpu-{part}.md").read_text())
    return 0


def planned_cases(part: str, bench: cases.Bench, *, dry: bool) -> Iterator[Case]:
    """The cases of one part, made one at a time: the tensors of a case are freed before the next."""
    if dry:
        tiny = Shape(Hq=4, Hk=1, Hv=2, width=16, page=16)
        if part == "prefill":
            yield cases.prefill(bench, tiny, 1, 48)
        elif part == "train":
            yield cases.train(bench, tiny, 1, 24)
        elif part == "coordinate-rules":
            yield from cases.coordinate(bench, 5, 300)
        elif part == "field":
            yield cases.field_product(bench, "encode", BABYBEAR, 6, 5, 100)
            yield cases.field_product(bench, "project", BABYBEAR, 3, 1200, 2)
        elif part == "median":
            yield from cases.medians(bench, 2, 5, 40, torch.float32)
        elif part == "adapters":
            yield adapters.decode(bench, 3, 2, width=32, ranks=16, chosen=4, copies=2)
            yield adapters.plain(bench, 3, (8, 16), width=32, copies=2)
        elif part == "adapters-train":
            yield adapters.train(bench, 20, width=32, ranks=16, chosen=4)
        else:
            yield cases.decode(bench, tiny, 2, 40, 1)
        return
    sigma_1b, sigma_10b = Shape(), Shape(width=128)
    llama = Shape(Hq=32, Hk=2, Hv=8, width=128)
    if part == "decode":
        for B, context in ((1, 1024), (1, 32768), (8, 16384), (64, 2048), (64, 8192)):
            yield cases.decode(bench, sigma_1b, B, context, 256 << 20)
    if part == "decode-wide":
        for shape, B, context in (
            (sigma_10b, 1, 32768),
            (sigma_10b, 64, 2048),
            (sigma_10b, 32, 16384),
            (llama, 64, 8192),
        ):
            yield cases.decode(bench, shape, B, context, 256 << 20)
    if part == "prefill":
        for shape, tokens in itertools.product((sigma_1b, sigma_10b), (2048, 8192, 32768)):
            yield cases.prefill(bench, shape, 1, tokens)
    if part == "train":
        for shape, B, tokens in ((sigma_1b, 8, 2048), (sigma_10b, 4, 4096)):
            yield cases.train(bench, shape, B, tokens)
    if part == "coordinate-rules":
        for N in (8, 16, 32, 64):
            yield from cases.coordinate(bench, N, (1 << 28) // N)
    if part == "field":
        for title, M, U, L in (  # 1e8 numbers in K = 32 blocks, T = 16 of noise, N = 64 clients; 6.4e7 for N = 128
            ("encode", 64, 48, 3_125_000),
            ("encode", 128, 96, 1_000_000),
            ("decode", 32, 48, 3_125_000),
            ("weighted sum", 1, 64, 3_125_000),
            ("project", 64, 3_125_000, 4),
        ):
            yield cases.field_product(bench, title, BABYBEAR, M, U, L)
    if part == "median":
        for dtype, (B, D) in itertools.product((torch.float32, torch.bfloat16), ((1, 10**8), (64, 65536))):
            yield from cases.medians(bench, B, 32, D, dtype)
    if part == "adapters":
        for T, many in itertools.product((1, 4, 16, 64), (1, 4, 16, 64)):
            if many <= T:
                yield adapters.decode(bench, T, many, width=4096, ranks=64, chosen=8, copies=64 // many)
        for T in (16, 64, 2048):
            yield adapters.plain(bench, T, (8, 16, 32, 64, 128) * 6 + (8, 128), width=4096, copies=4)
    if part == "adapters-train":
        for T in (2048, 8192):
            yield adapters.train(bench, T, width=4096, ranks=64, chosen=8)


def tune(part: str, out: Path, *, dry: bool) -> int:
    """Times of other tiles, warps and stages than the shipped ones, which are the first row of each problem."""
    import tuning  # brings the kernels, which must not be imported before run_part has set the interpreter

    table = []
    for label, plans, launch in tuning.problems(part, device_of(dry), dry=dry):
        for plan in plans[:2] if dry else plans:
            row = {"problem": label, **tuning.describe(plan)}
            try:
                launch(plan)
                run = clock(partial(launch, plan), dry=dry)
                row["seconds"] = median(run() for _ in range(2 if dry else 20))
            except Exception as error:  # a configuration too large for the machine is a row too
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if not dry:
                    torch.cuda.synchronize()
            table.append(row)
            print(row, flush=True)
            (out / f"gpu-{part}.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
