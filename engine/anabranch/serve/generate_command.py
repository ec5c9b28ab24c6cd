"""`anabranch generate`: stream text from a model folder to the terminal, and say how fast it was."""

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.serve.llm import LLM
    from anabranch.serve.request import SamplingParams
    from anabranch.serve.structured import StructuredOutput

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "pystdlib-diffqkv"
SHIPPED_PROMPT = "import os\n\n\ndef "
EXAMPLES = """examples:
  anabranch generate                               the small model in the package
  anabranch generate ./Llama-3.2-1B --prompt "Once upon a time" --max-tokens 200
  anabranch generate ./Qwen3-0.6B --chat --prompt "What is a river?" --temperature 0
  anabranch generate ./Qwen3-0.6B --prompt - --json < question.txt
  anabranch generate ./Qwen3-0.6B --adapter ./my-lora --prompt "Once upon a time"
  anabranch generate ./Qwen3-0.6B --chat --prompt "Describe Rome." --json-schema city.json
  anabranch generate ./Qwen3-0.6B --chat --prompt "When did it fall?" --regex "[0-9]{1,4} (AD|BC)"
  anabranch generate ./Qwen3-0.6B --chat --prompt "Is it large?" --choice yes --choice no
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", default=str(SHIPPED), help="model folder (default: the small model in the package)")
    add("--prompt", help="text to continue; - reads it from the standard input")
    add("--adapter", metavar="DIR", help="an adapter's folder, as PEFT or the tune command saves it")
    add("--chat", action="store_true", help="the prompt is a user's message: use the model's chat template")
    add("--max-tokens", type=int, default=256, help="length of the output (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the most probable token (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="smallest set of tokens with this probability (default: %(default)s)")
    add("--top-k", type=int, default=0, help="only the k most probable tokens (default: all)")
    add("--min-p", type=float, default=0.0, help="only tokens above this share of the best one (default: %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 avoids repetition (default: %(default)s)")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--stop", action="append", help="text that ends the output; may be given several times")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="the output is JSON that satisfies the schema in this file")
    form.add_argument("--regex", help="the whole output matches this regular expression (Rust's syntax)")
    form.add_argument("--choice", action="append", help="the output is this text; give it again for each other choice")
    add("--ignore-eos", action="store_true", help="go on after the model's end token")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: as stored)")
    add("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")
    add("--cache-dtype", default="auto", choices=("auto", "int8"), help="of keys and values (default: as the weights)")
    add("--max-model-len", type=int, help="longest sequence, prompt and output together (default: the model's)")
    add("--tensor-parallel-size", type=int, default=1, help="processes that share the model (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of a stream")


def run(args: argparse.Namespace) -> int:
    from anabranch.serve.llm import LLM
    from anabranch.serve.request import SamplingParams

    prompt = _read_prompt(args)
    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty, seed=args.seed, stop=args.stop, ignore_eos=args.ignore_eos,
        structured=_read_form(args),
    )  # fmt: skip
    llm = LLM(
        args.model, dtype=args.dtype, device=args.device, cache_dtype=args.cache_dtype,
        max_model_len=args.max_model_len, max_num_seqs=1, tensor_parallel_size=args.tensor_parallel_size,
        adapters=None if args.adapter is None else {args.adapter: args.adapter},
    )  # fmt: skip
    with closing(llm):
        return _continue(llm, prompt, params, args)


def _continue(llm: "LLM", prompt: str, params: "SamplingParams", args: argparse.Namespace) -> int:
    ids = llm.encode_chat([{"role": "user", "content": prompt}]) if args.chat else llm.encode(prompt)
    if not args.json and not args.chat:
        print(prompt, end="", flush=True)
    report = generate(llm, ids, params, adapter=args.adapter, echo=not args.json)
    if args.json:
        print(json.dumps({"model": args.model, "prompt": prompt, **asdict(report)}, ensure_ascii=False))
    else:
        print()
        print(report.line(), file=sys.stderr)
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt == "-":
        return sys.stdin.read()
    if args.prompt is None and Path(args.model) == SHIPPED:
        return SHIPPED_PROMPT
    if args.prompt is None:
        raise ValueError("give a text to continue with --prompt (or - for the standard input)")
    return str(args.prompt)


def _read_form(args: argparse.Namespace) -> "StructuredOutput | None":
    from anabranch.serve.structured import StructuredOutput

    if args.json_schema is not None:
        return StructuredOutput(json_schema=Path(args.json_schema).read_text(encoding="utf-8"))
    if args.regex is not None:
        return StructuredOutput(regex=args.regex)
    return None if args.choice is None else StructuredOutput(choice=args.choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One generation and its speed.

    tokens_per_s    of decoding, after the first token; None with fewer than two
    read_bandwidth  bytes/s of a plain read of memory, measured on this machine just now
    roof_share      weights and cache that decoding must read each second at this pace, as a share of that; above 1 when
                    a small model stays in the processor's caches. None for ranks on a CPU: they share one memory, and
                    the threads of one of them do not measure it
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    read_bandwidth: float
    roof_share: float | None

    def line(self) -> str:
        speed = "one token" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"
        share = "" if self.roof_share is None else f", {self.roof_share:.0%} of the read bandwidth"
        roof = f" ({self.read_bandwidth / 1e9:.1f} GB/s)" if share else ""
        return (
            f"[{self.prompt_tokens} + {self.output_tokens} tokens: {speed}, "
            f"first after {self.first_token_s * 1e3:.0f} ms{share}{roof}]"
        )


def generate(llm: "LLM", ids: list[int], params: "SamplingParams", *, adapter: str | None = None, echo: bool) -> Report:
    """Stream one prompt, to the terminal if `echo`, and measure. `adapter` names one that the model serves."""
    from anabranch.serve.runner import decode_bytes
    from anabranch_kernels.roofline import read_bandwidth

    start = time.perf_counter()
    moments: list[float] = []
    text, reason = "", None
    for part in llm.stream(ids, params, adapter=adapter):
        moments += [time.perf_counter()] * len(part.token_ids)
        text, reason = text + part.text, part.finish_reason
        if echo:
            print(part.text, end="", flush=True)
    runner = llm.engine.runner
    bandwidth = read_bandwidth(runner.device)
    pace = (len(moments) - 1) / (moments[-1] - moments[0]) if len(moments) > 1 else None
    context = len(ids) + len(moments) // 2  # on average
    share = None
    if pace is not None and (runner.workers is None or runner.device.type != "cpu"):
        share = decode_bytes(runner.model, llm.engine.config.cache_dtype, context) * pace / bandwidth
    return Report(
        text=text, finish_reason=reason, prompt_tokens=len(ids), output_tokens=len(moments),
        first_token_s=moments[0] - start, tokens_per_s=pace, read_bandwidth=bandwidth, roof_share=share,
    )  # fmt: skip
