"""`anabranch serve`: an HTTP server with OpenAI's API over one model folder."""

import argparse
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.serve.generate_command import SHIPPED

if TYPE_CHECKING:
    from anabranch.serve.http.settings import ServerSettings
    from anabranch.serve.llm import LLM

NEEDED = ("fastapi", "uvicorn", "orjson", "prometheus_client")
EXAMPLES = """examples:
  anabranch serve                                      the small model in the package, at http://127.0.0.1:8000
  anabranch serve ./Qwen3-0.6B --port 8080 --cache-dtype int8
  anabranch serve ./Qwen3-0.6B --host 0.0.0.0 --max-num-seqs 64 --max-queue 256
  anabranch serve ./Qwen3-0.6B --adapter sql=./sql-lora --adapter poems=./poems-lora --adapter-root ./adapters

  With a key, from --api-key or the environment's ANABRANCH_API_KEY, clients must send it as a bearer token everywhere
  but at /health and at the page at /. SIGTERM lets running requests end, for --drain-timeout seconds at most.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", default=str(SHIPPED), help="model folder (default: the small model in the package)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--api-key", help="what clients must send (default: $ANABRANCH_API_KEY, which a list of processes hides)")
    add("--served-model-name", nargs="+", help="names the model answers to (default: the folder's)")
    add("--tokenizer", help="another folder to take the tokenizer from")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: as stored)")
    add("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")
    add("--max-model-len", type=int, help="longest sequence, prompt and output together (default: the model's)")
    add("--max-num-seqs", type=int, default=256, help="samples that run at once (default: %(default)s)")
    add("--max-num-batched-tokens", type=int, help="tokens of one step (default: 512, on a GPU 2048)")
    add("--cache-dtype", default="auto", choices=("auto", "int8"), help="of keys and values (default: as the weights)")
    add("--cache-bytes", type=int, help="memory for keys and values (default: half of what is free, 85%% on a GPU)")
    add("--block-size", type=int, default=64, help="tokens of a cache block (default: %(default)s)")
    add("--tensor-parallel-size", type=int, default=1, help="processes that share the model (default: %(default)s)")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="find prompts again")
    add(
        "--adapter", action="append", default=[], metavar="NAME=DIR",
        help="an adapter's folder and the model name it answers to; may be given many times",
    )  # fmt: skip
    add("--adapter-root", type=Path, metavar="DIR", help="clients may load adapters below this folder (default: none)")
    add("--adapter-bytes", type=int, help="memory for adapters that run (default: a tenth of what is free)")
    add("--adapter-host-bytes", type=int, default=1 << 30, help="memory for those used last beside (%(default)s)")
    add("--seed", type=int, default=0, help="of requests that bring none (default: %(default)s)")
    add("--max-concurrency", type=int, default=1024, help="requests open at once (default: %(default)s)")
    add("--max-queue", type=int, default=512, help="samples that may wait beside those that run (default: %(default)s)")
    add("--max-body-bytes", type=int, default=4 << 20, help="of a request (default: %(default)s)")
    add("--max-logprobs", type=int, default=20, help="log-probabilities per token (default: %(default)s)")
    add("--drain-timeout", type=float, default=30.0, help="seconds for running requests at the end (%(default)s)")


def run(args: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(f"serve needs {', '.join(missing)}; install with: pip install 'anabranch[serve]'")
    from anabranch.serve.http.listen import bind

    settings = read_settings(args)
    read_adapters(args)
    listener = bind(settings)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of long prompts, which are answered with 400
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(load, args)
        from anabranch.serve.http.server import serve  # takes a while too: FastAPI and what it brings

        llm = loading.result()
    with closing(llm):
        return serve(llm, settings, listener)


def load(args: argparse.Namespace) -> "LLM":
    """The model, by the command's options."""
    from anabranch.serve.llm import LLM

    return LLM(
        args.model, tokenizer=args.tokenizer, dtype=args.dtype, device=args.device, max_model_len=args.max_model_len,
        cache_bytes=args.cache_bytes, cache_dtype=args.cache_dtype, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens, enable_prefix_caching=args.enable_prefix_caching,
        block_size=args.block_size, seed=args.seed, tensor_parallel_size=args.tensor_parallel_size,
        adapters=read_adapters(args), adapter_bytes=args.adapter_bytes, adapter_host_bytes=args.adapter_host_bytes,
    )  # fmt: skip


def read_settings(args: argparse.Namespace) -> "ServerSettings":
    """ValueError for what cannot be."""
    from anabranch.serve.http.settings import KEY_VARIABLE, ServerSettings

    return ServerSettings(
        host=args.host, port=args.port, api_key=args.api_key or os.environ.get(KEY_VARIABLE) or None,
        model_names=model_names(args), adapter_root=args.adapter_root,
        max_concurrency=args.max_concurrency, max_queue=args.max_queue, max_body_bytes=args.max_body_bytes,
        max_logprobs=args.max_logprobs, drain_timeout_s=args.drain_timeout,
    )  # fmt: skip


def model_names(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(args.served_model_name or [Path(args.model).resolve().name])


def read_adapters(args: argparse.Namespace) -> dict[str, Path] | None:
    """The folders of --adapter by name; None if no adapter can come either. ValueError for what cannot be."""
    if not args.adapter and args.adapter_root is None:
        return None
    adapters: dict[str, Path] = {}
    for given in args.adapter:
        name, separator, folder = given.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"--adapter must be NAME=DIR, got {given!r}")
        if name in adapters or name in model_names(args):
            raise ValueError(f"--adapter {given}: the name {name!r} is taken")
        adapters[name] = Path(folder)
    return adapters
