"""What can be set about the server, apart from the model."""

from dataclasses import dataclass, field
from pathlib import Path

KEY_VARIABLE = "ANABRANCH_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Addresses and limits.

    host, port        where to listen; port 0 takes a free one
    api_key           what clients must send as a bearer token; None: nothing
    model_names       the names the model answers to; the first is the one it calls itself
    max_concurrency   requests that may be open at once
    max_queue         samples that may wait beside those that run
    max_body_bytes    of a request
    max_logprobs      alternatives per token that a request may ask for
    drain_timeout_s   how long running requests may go on after SIGTERM
    adapter_root      the folder below which adapters may be loaded while the server runs; None: none may
    client_timeout_s  how long a client may take to send the next part of its request, or to take the next of an answer
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    model_names: tuple[str, ...]
    max_concurrency: int = 1024
    max_queue: int = 512
    max_body_bytes: int = 4 << 20
    max_logprobs: int = 20
    drain_timeout_s: float = 30.0
    client_timeout_s: float = 60.0
    adapter_root: Path | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.port < 1 << 16, "port", self.port, "in [0, 65535]")
        _check(self.api_key is None or len(self.api_key) > 0, "api_key", "an empty text", "not empty")
        _check(bool(self.model_names) and all(self.model_names), "model_names", self.model_names, "names, not empty")
        _check(self.max_concurrency >= 1, "max_concurrency", self.max_concurrency, "at least 1")
        _check(self.max_queue >= 0, "max_queue", self.max_queue, "at least 0")
        _check(self.max_body_bytes >= 1024, "max_body_bytes", self.max_body_bytes, "at least 1024")
        _check(self.max_logprobs >= 0, "max_logprobs", self.max_logprobs, "at least 0")
        _check(self.drain_timeout_s >= 0, "drain_timeout_s", self.drain_timeout_s, "at least 0")
        _check(self.client_timeout_s > 0, "client_timeout_s", self.client_timeout_s, "above 0")
        root = self.adapter_root
        _check(root is None or root.is_dir(), "adapter_root", str(root), "a folder")


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
