"""`anabranch bench KIND`: measure, print the table, write what was asked for."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.common.files import check_targets

if TYPE_CHECKING:
    from anabranch.bench.aggregate import FilesReport
    from anabranch.bench.federated import FederatedReport, Row, Task
    from anabranch.bench.field_coding import FieldReport
    from anabranch.bench.geometric_median import Measured, MedianReport
    from anabranch.bench.report import Report, Table
    from anabranch.bench.serve import ServeReport
    from anabranch.bench.timing import Roofs, Sample

DTYPES = ("bfloat16", "float16", "float32")
PEERS = ("transformers", "llama.cpp")
FEDERATED = ("digits", "pictures", "methods", "scale", "models")
RULES = ("median", "trimmed mean", "mean around median")
EXAMPLES = """examples:
  anabranch bench attention --quick
  anabranch bench linear --rows 1 8 --json linear.json
  anabranch bench engine --help
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand for each kind of benchmark."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(title="benchmarks", dest="kind", metavar="KIND", required=True)
    _add_attention(_add_kind(kinds, "attention", "decode and prefill of unequal heads beside the GQA twin and torch"))
    _add_linear(_add_kind(kinds, "linear", "skinny_linear beside torch's linear"))
    _add_coordinate_rules(
        _add_kind(kinds, "coordinate-rules", "medians and trimmed means beside torch's sort and ByzFL")
    )
    _add_aggregate(_add_kind(kinds, "aggregate", "clients' files beside a copy of the same bytes", plot=False))
    _add_median(
        _add_kind(kinds, "geometric-median", "the geometric median beside torch and other libraries", plot=False)
    )
    _add_rank_lora(_add_kind(kinds, "rank-lora", "adapters with routed ranks, and many adapters at once, beside torch"))
    _add_triadapt(_add_kind(kinds, "triadapt", "a training step of TriAdaptLoRA beside LoRA's and AdaLoRA's"))
    _add_engine(_add_kind(kinds, "engine", "a 315M-parameter Llama beside transformers and llama.cpp"))
    _add_adapters(_add_kind(kinds, "adapters", "an engine with adapters beside one without", plot=False))
    fields = _add_kind(kinds, "field-coding", "secret sharing over finite fields beside NumPy and galois", plot=False)
    fields.epilog = "examples:\n  anabranch bench field-coding --threads 1 --repeats 7 --markdown field_coding.md\n"
    _add_secagg(_add_kind(kinds, "secagg", "secure sums beside Flower's SecAgg primitives", plot=False))
    _add_federated(
        _add_kind(kinds, "federated", "federated rounds beside plain torch, torch.func and Flower", plot=False)
    )
    _add_serve(_add_kind(kinds, "serve", "the HTTP server under load beside the engine without it", plot=False))


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for."""
    from anabranch.bench import report as reports
    from anabranch.common.threads import torch_threads

    if args.repeats < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError(f"--repeats and --threads must be at least 1, got {args.repeats} and {args.threads}")
    check_targets([path for path in (args.json, args.markdown, args.plot) if path])
    if args.plot:
        reports.check_plot_library()
    args.repeats = 3 if args.quick else args.repeats
    kinds: dict[str, Callable[[argparse.Namespace], Table]] = {
        "serve": _serve, "aggregate": _aggregate, "field-coding": _field_coding, "geometric-median": _median,
        "secagg": _secagg, "federated": _federated,
    }  # fmt: skip
    with torch_threads(args.threads):
        report = kinds.get(args.kind, _measure)(args)
    print(reports.to_text(report))
    reports.save(report, json_path=args.json, markdown_path=args.markdown, plot_path=args.plot)
    return 0


def _add_kind(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", kind: str, summary: str, *, plot: bool = True
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        kind, help=summary, description=f"Measure {summary}.", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="threads of every contender (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=30, help="samples of each contender (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and 3 repeats: shows that it runs, not how fast"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    parser.set_defaults(plot=None)
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a roofline PNG (needs matplotlib)")
    return parser


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench attention
  anabranch bench attention --contexts 8192 32768 --prompts --plot attention.png
  anabranch bench attention --heads 32 2 8 --width 128 --threads 2 --json attention.json
"""
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[2048, 8192, 32768], help="cached tokens of decode (%(default)s)"
    )
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048], help="tokens of prefill (%(default)s)")
    parser.add_argument(
        "--heads", type=int, nargs=3, default=[32, 4, 16], metavar=("HQ", "HK", "HV"), help="heads (%(default)s)"
    )
    parser.add_argument("--width", type=int, default=64, help="width of a head (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of q and the cache (%(default)s)")


def _add_linear(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench linear
  anabranch bench linear --rows 1 8 --dtypes bfloat16 int8 --markdown linear.md
"""
    parser.add_argument("--rows", type=int, nargs="+", help="rows of x (default: 1 to 32)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=(*DTYPES, "int8"), default=["bfloat16", "float32", "int8"],
        help="of the weights (%(default)s)",
    )  # fmt: skip


def _add_coordinate_rules(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench coordinate-rules --rows 8 32
  anabranch bench coordinate-rules --rules median --dtype bfloat16   with ByzFL beside it if that is installed
"""
    parser.add_argument("--rows", type=int, nargs="+", help="how many vectors (default: 8 to 128)")
    parser.add_argument("--elements", type=int, help="of all vectors together (default: 80 million)")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="(default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the vectors (%(default)s)")


def _add_aggregate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench aggregate --repeats 5
  anabranch bench aggregate --clients 32 --dtype bfloat16 --megabytes 2500 --cold
"""
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32], help="how many files (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=2000, help="of all files together (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (%(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every call")
    parser.add_argument("--folder", type=Path, help="where the files are made for the time being (default: /tmp's)")


def _add_median(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench geometric-median
  anabranch bench geometric-median --clients 16 32 64 --numbers 1000000 --dtypes bfloat16 --repeats 7
"""
    parser.set_defaults(repeats=7)
    parser.add_argument("--clients", type=int, nargs="+", default=[32], help="points (%(default)s)")
    parser.add_argument("--numbers", type=int, default=10_000_000, help="numbers of a point (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of points (%(default)s)")
    parser.add_argument(
        "--data",
        nargs="+",
        choices=("centred", "offset"),
        default=["centred", "offset"],
        help="where their mean lies (%(default)s)",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out geom-median and byzfl")


def _add_rank_lora(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench rank-lora
  anabranch bench rank-lora --rows 1 32 --dtypes float32 --threads 1
"""
    parser.add_argument("--rows", type=int, nargs="+", help="tokens (default: 1 to 64)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="(%(default)s)")


def _add_triadapt(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench triadapt --threads 1
  anabranch bench triadapt --rows 2048 --widths 4096 --layers 2
"""
    parser.add_argument("--rows", type=int, nargs="+", default=[512], help="tokens of a step (%(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024], help="of the layers (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="adapted layers (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of each layer (%(default)s)")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench engine                     random weights, 512 tokens of context, batches of 1 and 8
  anabranch bench engine --peers llama.cpp   beside one peer only (pip install llama-cpp-python gguf)
"""
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="(default: all installed)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at once (%(default)s)")


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench adapters --repeats 7
"""
    parser.add_argument("--batch", type=int, default=32, help="sequences at once (%(default)s)")
    parser.add_argument("--adapters", type=int, default=16, help="of each kind (%(default)s)")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench serve                              random weights; 1, 8 and 32 clients
  anabranch bench serve --clients 8 --url llama.cpp=http://127.0.0.1:8081   beside a server that runs already
"""
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at once (%(default)s)")
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL",
        help="another server with OpenAI's API, which must take prompts of token ids below 8192; may be repeated",
    )  # fmt: skip


def _add_secagg(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench secagg --repeats 3 --threads 1 --markdown secagg.md
"""
    parser.add_argument("--clients", type=int, default=32, help="N (%(default)s)")
    parser.add_argument("--length", type=int, default=1_000_000, help="numbers in a vector (%(default)s)")
    parser.add_argument("--drop", type=int, default=8, help="clients silent in the end (%(default)s)")


def _add_federated(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  anabranch bench federated --parts digits pictures
  anabranch bench federated --parts pictures --data fashion-mnist=PATH
  anabranch bench federated --parts digits models --flower --clients 100
"""
    parser.set_defaults(repeats=7)
    parser.add_argument(
        "--parts", nargs="+", choices=FEDERATED, default=list(FEDERATED),
        help="tasks in turns with their peers, passes of every method, very many clients, digests of models (all)",
    )  # fmt: skip
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000], help="of the digits (%(default)s)")
    parser.add_argument("--data", metavar="NAME=PATH", help="pictures of 28 x 28 (default: random ones)")
    parser.add_argument("--flower", action="store_true", help="Flower's simulation, too; some minutes")


def _measure(args: argparse.Namespace) -> "Report":

    from anabranch.bench.timing import Roofs, best_flops
    from anabranch_kernels.roofline import read_sweep

    read = read_sweep(bytes=1 << 20 if args.quick else 1 << 29)
    roofs = Roofs(read=read, flops=best_flops(size=64 if args.quick else 1024))
    kinds: dict[str, Callable[[argparse.Namespace, Roofs], Report]] = {
        "attention": _attention, "linear": _linear, "coordinate-rules": _coordinate_rules, "rank-lora": _rank_lora,
        "triadapt": _triadapt, "engine": _engine, "adapters": _adapters,
    }  # fmt: skip
    return kinds[args.kind](args, roofs)


def _attention(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    import torch

    from anabranch.bench import attention, machine
    from anabranch.bench.report import Report
    from anabranch.bench.timing import measure

    Hq, Hk, Hv = args.heads
    shape = attention.Shape(Hq=Hq, Hk=Hk, Hv=Hv, width=args.width)
    dtype = getattr(torch, args.dtype)
    working_set = 1 if args.quick else machine.working_set_bytes()
    samples = []
    for context in [96] if args.quick else args.contexts:
        case = attention.decode(context, shape=shape, dtype=dtype, working_set=working_set)
        samples += measure(case, roofs, repeats=args.repeats)
    for tokens in [48] if args.quick else args.prompts:
        samples += measure(attention.prefill(tokens, shape=shape, dtype=dtype), roofs, repeats=args.repeats)
    title = f"Attention, heads ({Hq},{Hk},{Hv}) of {args.width}, {args.dtype}"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples))


def _linear(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    import torch

    from anabranch.bench import linear, machine
    from anabranch.bench.report import Report
    from anabranch.bench.timing import measure

    working_set = 1 if args.quick else machine.working_set_bytes()
    samples = []
    for name in args.dtypes:
        for size in linear.QUICK_SHAPES if args.quick else linear.SHAPES:
            rows = args.rows or linear.ROWS
            for case in linear.skinny(size, rows, dtype=getattr(torch, name), working_set=working_set):
                samples += measure(case, roofs, repeats=args.repeats)
    title = "A weight [out, in] times M rows"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples))


def _coordinate_rules(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    import torch

    from anabranch.bench import coordinate_rules, machine
    from anabranch.bench.report import Report
    from anabranch.bench.timing import measure
    from anabranch_kernels.roofline import read_sweep

    rows, dtype = args.rows or coordinate_rules.ROWS, getattr(torch, args.dtype)
    elements = 500 * max(rows) if args.quick else args.elements or coordinate_rules.ELEMENTS
    if min(rows) < 1 or elements < max(rows):
        raise ValueError(f"--rows must be at least 1 and --elements as many, got {list(rows)} and {elements}")
    # A read of as many bytes as the rules read, and by turns with ours alone: after a peer nothing is in the caches.
    roofs = replace(roofs, read=read_sweep(bytes=elements * dtype.itemsize))
    samples: list[Sample] = []
    absent: list[str] = []
    for N in rows:
        cases, missing = coordinate_rules.coordinate_rules(N, elements // N, dtype=dtype, rules=args.rules)
        absent += missing
        for case in cases:
            alone = replace(case, name=f"{case.name}, alone", contenders=case.contenders[:1])
            (ours,) = measure(alone, roofs, repeats=args.repeats)
            beside = measure(case, roofs, repeats=args.repeats)
            samples += [ours, *(replace(sample, read_roof=ours.read_roof) for sample in beside)]
    title = "Coordinate-wise rules over N vectors of D numbers, f = N / 4"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples), absent=tuple(absent))


def _median(args: argparse.Namespace) -> "MedianReport":
    import torch

    from anabranch.bench import geometric_median as bench
    from anabranch.bench import machine
    from anabranch_kernels.roofline import read_sweep

    if min(args.clients) < 2 or args.numbers < 1:
        raise ValueError(f"--clients must be at least 2 and --numbers 1, got {args.clients} and {args.numbers}")
    read = read_sweep(bytes=1 << 20 if args.quick else 1 << 29)
    samples: list[Measured] = []
    absent: dict[str, None] = {}
    for name in args.dtypes:
        for N in args.clients:
            for data in args.data:
                D = 200 if args.quick else args.numbers
                measured, missing = bench.measure_all(
                    N, D, read, dtype=getattr(torch, name), data=data, repeats=args.repeats, peers=not args.no_peers
                )
                samples += measured
                absent |= dict.fromkeys(missing)
    return bench.MedianReport(
        title="Geometric median of N points of D numbers", machine=machine.describe(), samples=tuple(samples),
        absent=tuple(absent),
    )  # fmt: skip


def _rank_lora(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    import torch

    from anabranch.bench import machine, rank_lora
    from anabranch.bench.report import Report
    from anabranch.bench.timing import measure

    width, ranks, each, copies = (64, 16, 4, 2) if args.quick else (4096, 64, 16, 8)
    samples, absent = [], []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for T in args.rows or rank_lora.ROWS:
            case = rank_lora.one_adapter(T, width=width, ranks=ranks, chosen=ranks // 8, dtype=dtype, copies=copies)
            samples += measure(case, roofs, repeats=args.repeats)
        case, missing = rank_lora.many_adapters(
            32, width=width, ranks=each, adapters=16, dtype=dtype, copies=copies // 2
        )
        samples += measure(case, roofs, repeats=args.repeats)
        absent += missing
    title = "Adapters of one layer: SMoRA, and 16 LoRAs in one batch"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples), absent=tuple(dict.fromkeys(absent)))


def _triadapt(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    from anabranch.bench import machine, triadapt
    from anabranch.bench.report import Report
    from anabranch.bench.timing import measure

    if min(*args.rows, *args.widths, args.layers) < 1 or args.rank < 2:
        raise ValueError(f"--rows, --widths and --layers must be at least 1 and --rank 2, got {args.rank}")
    samples: list[Sample] = []
    absent: dict[str, None] = {}
    for width in [32] if args.quick else args.widths:
        sizes = {"width": width, "ranks": args.rank, "layers": 2 if args.quick else args.layers}
        cases = [
            triadapt.training_step(T, **sizes, base=base)
            for T in ([8] if args.quick else args.rows)
            for base in (True, False)
        ]
        for case, missing in [*cases, triadapt.scoring(**sizes)]:
            samples += measure(case, roofs, repeats=args.repeats)
            absent |= dict.fromkeys(missing)
    title = "TriAdaptLoRA: a step of training, float32, and what choosing the ranks costs in each"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples), absent=tuple(absent))


def _engine(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    import torch

    from anabranch.bench import engine, machine
    from anabranch.bench.report import Report

    config = engine.TINY if args.quick else engine.LLAMA_315M
    context, steps = (24, 3) if args.quick else (512, 16)
    samples: list[Sample] = []
    absent: dict[str, None] = {}
    for batch in args.batches:
        opened = engine.open_peers(
            config, args.peers, batch=batch, length=context + steps + 1, threads=torch.get_num_threads()
        )
        with opened as (peers, missing):
            absent |= dict.fromkeys(missing)
            if batch == 1:
                samples += engine.measure_prefill(peers, config, roofs, prompt_tokens=context, repeats=args.repeats)
            samples += engine.measure_decode(
                peers, config, roofs, batch=batch, context=context, new_tokens=steps, repeats=args.repeats
            )
    weights = engine.count_weights(config) / 1e6
    title = f"Engines on one bfloat16 Llama of {weights:.0f} M random weights"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples), absent=tuple(absent))


def _adapters(args: argparse.Namespace, roofs: "Roofs") -> "Report":
    from anabranch.bench import adapters, machine
    from anabranch.bench.engine import LLAMA_315M, TINY
    from anabranch.bench.report import Report

    if args.batch < 1 or args.adapters < 1:
        raise ValueError(f"--batch and --adapters must be at least 1, got {args.batch} and {args.adapters}")
    batch, count = (4, 2) if args.quick else (args.batch, args.adapters)
    samples = []
    for config, steps in ((None, 64), (TINY if args.quick else LLAMA_315M, 8)):
        steps = 3 if args.quick else steps
        samples += adapters.measure_adapters(
            config, roofs, batch=batch, adapters=count, new_tokens=steps, repeats=args.repeats
        )
    title = f"Decoding with adapters beside all linear layers, {batch} sequences"
    return Report(title=title, machine=machine.describe(), samples=tuple(samples))


def _serve(args: argparse.Namespace) -> "ServeReport":
    import torch

    from anabranch.bench import machine, serve

    urls = dict(word.split("=", 1) for word in args.url if "=" in word)
    if len(urls) < len(args.url) or not all(url.startswith("http://") for url in urls.values()):
        raise ValueError(f"--url must be NAME=http://HOST:PORT, each name once, got {args.url}")
    if min(args.clients) < 1:
        raise ValueError(f"--clients must be at least 1, got {args.clients}")
    threads = args.threads or torch.get_num_threads()
    steps = serve.plan(quick=args.quick, clients=args.clients, repeats=args.repeats, threads=threads)
    measured = tuple(serve.measure(steps, urls))
    return serve.ServeReport(title="Serving random weights", machine=machine.describe(), measured=measured)


def _aggregate(args: argparse.Namespace) -> "FilesReport":
    import torch

    from anabranch.bench import aggregate, machine
    from anabranch.common.threads import torch_threads

    if min(args.clients) < 7 or args.megabytes < 1:
        raise ValueError(f"--clients must be at least 7 and --megabytes 1, got {args.clients} and {args.megabytes}")
    total = 1_000_000 if args.quick else args.megabytes * 1_000_000
    with torch_threads(args.threads or max(1, torch.get_num_threads() - 1)):  # another reads
        samples = [
            sample
            for N in args.clients
            for sample in aggregate.measure_files(
                N, total, dtype=getattr(torch, args.dtype), repeats=args.repeats, cold=args.cold, folder=args.folder
            )
        ]
        return aggregate.FilesReport(title="Aggregation of files", machine=machine.describe(), samples=tuple(samples))


def _field_coding(args: argparse.Namespace) -> "FieldReport":

    from anabranch.bench import field_coding, machine

    cases, absent = field_coding.cases(quick=args.quick)
    samples = [sample for case in cases for sample in field_coding.measure(case, repeats=args.repeats)]
    return field_coding.FieldReport(
        title="Coding over finite fields", machine=machine.describe(), samples=tuple(samples), absent=tuple(absent)
    )


def _secagg(args: argparse.Namespace) -> "Table":

    from anabranch.bench import machine, secagg

    clients, length, drop = (8, 100, 1) if args.quick else (args.clients, args.length, args.drop)
    return secagg.measure(clients=clients, length=length, drop=drop, repeats=args.repeats, machine=machine.describe())


def _federated(args: argparse.Namespace) -> "FederatedReport":
    import torch

    from anabranch.bench import federated, machine
    from anabranch.common.memory import keep_freed_memory

    if min(args.clients) < 1:
        raise ValueError(f"--clients must be at least 1, got {args.clients}")
    threads, quick = args.threads or torch.get_num_threads(), args.quick
    keep_freed_memory()  # for all contenders, as `anabranch federated` does
    rows: list[Row] = []
    if "digits" in args.parts:
        for clients in [3] if quick else args.clients:
            rows += federated.throughput(federated.digits_task(clients), threads=threads, repeats=args.repeats)
    if "pictures" in args.parts:
        data = federated.pictures(args.data, most=400) if quick else federated.pictures(args.data)
        sizes = ((False, 2, 64), (True, 2, 32)) if quick else ((False, 100, 18 * 32), (True, 4, 6 * 32))
        for convolutions, clients, n in sizes:
            task = federated.pictures_task(data, clients, convolutions=convolutions, n=n)
            rows += federated.throughput(task, threads=threads, repeats=args.repeats)
    if "methods" in args.parts:
        from anabranch.bench.federated_methods import all_methods, measure_methods

        names, clients = (["symmetric-ce"], 4) if quick else (all_methods(), 20)
        rows += measure_methods(names, clients=clients, repeats=args.repeats)
    if "scale" in args.parts:
        from anabranch.bench.federated_scale import measure_scale

        rows.append(measure_scale(200 if quick else 100_000, samples=160, threads=threads))
    if "models" in args.parts:
        rows += federated.digests(clients=5 if quick else 100, rounds=2 if quick else 5, threads=[1, threads])
    if args.flower:
        rows += _with_flower(federated.digits_task(3 if quick else 100))
    return federated.FederatedReport(machine=machine.describe(), measured=tuple(rows))


def _with_flower(task: "Task") -> "list[Row]":
    from tempfile import TemporaryDirectory

    from anabranch.bench.federated_flower import measure_flower

    with TemporaryDirectory(prefix="anabranch-bench-") as folder:
        return measure_flower(task, Path(folder), rounds=5, runs=2)
