"""Types of the compiled extension (bindings/module.cpp). Addresses are `data_ptr()`s; types as in native.TYPES."""

source_hash: str

def supported_isas() -> list[str]: ...
def paged_attention(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    k_scales: int,
    v_scales: int,
    page_table: tuple[int, int],
    seq_lens: int,
    cu_seqlens_q: int,
    out: int,
    lse: int,
    sizes: tuple[int, ...],
    scale: float,
    window: int,
    v_top_k: int,
    renormalise: bool,
    isa: str,
    threads: int,
) -> None: ...
def store_kv(
    k: tuple[int, ...],
    v: tuple[int, ...],
    k_cache: tuple[int, ...],
    v_cache: tuple[int, ...],
    k_scales: int,
    v_scales: int,
    slots: int,
    sizes: tuple[int, ...],
    threads: int,
) -> None: ...
def skinny_linear(
    x: int,
    x_type: int,
    x_row: int,
    weight: int,
    weight_type: int,
    weight_row: int,
    scales: int,
    bias: int,
    y: int,
    M: int,
    in_: int,
    out: int,
    isa: str,
    threads: int,
) -> None: ...
def centred_gram(
    points: tuple[int, ...],
    centre: tuple[int, int],
    gram: int,
    B: int,
    N: int,
    D: int,
    isa: str,
    threads: int,
) -> None: ...
def combine(
    points: tuple[int, ...],
    coefficients: int,
    centre: tuple[int, int],
    out: int,
    B: int,
    N: int,
    D: int,
    isa: str,
    threads: int,
) -> None: ...
def coordinate_rule(
    points: tuple[int, ...],
    out: int,
    rule: int,
    f: int,
    B: int,
    N: int,
    D: int,
    isa: str,
    threads: int,
) -> bool: ...
def perceptron_sgd(
    widths: tuple[int, ...],
    rows: int,
    velocity: int,
    x: int,
    index: int,
    y: int,
    counts: int,
    sizes: tuple[int, int, int],
    batch: int,
    sgd: tuple[float, float, float],
    isa: str,
    threads: int,
) -> None: ...

class PerceptronSteps:
    floats: int
    def __init__(self, widths: tuple[int, ...], batch: int, N: int, isa: str) -> None: ...
    def load(self, states: int, rows: int, velocity: int, threads: int) -> None: ...
    def unload(self, rows: int, velocity: int, threads: int) -> None: ...
    def forward(self, x: int, M: int, B: int, logits: int, features: int, threads: int) -> None: ...
    def step(
        self, sgd: tuple[float, float, float], logits: int, features: int, live: int, M: int, B: int, threads: int
    ) -> None: ...

def rank_lora(
    x: tuple[int, ...],
    a: tuple[int, ...],
    b: tuple[int, ...],
    router: tuple[int, ...],
    bias: int,
    places: int,
    scales: int,
    adapter_of: int,
    out: tuple[int, ...],
    sizes: tuple[int, ...],
    add: bool,
    isa: str,
    threads: int,
) -> None: ...
def listed_dots(
    rows: tuple[int, ...],
    offsets: int,
    index: int,
    lists: int,
    x: tuple[int, ...],
    to: int,
    isa: str,
    threads: int,
) -> None: ...
def listed_sums(
    rows: tuple[int, ...],
    offsets: int,
    index: int,
    lists: int,
    factors: int,
    y: int,
    isa: str,
    threads: int,
) -> None: ...
def read_memory(data: int, bytes: int, isa: str, threads: int) -> float: ...
def supported_field_isas() -> list[str]: ...
def field_multiply(
    field: int,
    matrix: tuple[int, int, int],
    x: tuple[int, int, int],
    out: int,
    sizes: tuple[int, int, int],
    isa: str,
    threads: int,
) -> None: ...
def field_quantise(
    field: int,
    x: int,
    type: int,
    dither: int,
    out: int,
    size: int,
    clip: float,
    scale: float,
    isa: str,
    threads: int,
) -> tuple[int, int]: ...
def field_dequantise(field: int, x: int, out: int, size: int, divisor: float, isa: str, threads: int) -> None: ...
def field_accept(field: int, stream: int, out: int, words: int, isa: str, threads: int) -> int: ...
def field_transform(
    field: int,
    x: int,
    x_row: int,
    out: int,
    sizes: tuple[int, int, int, int, int],
    isa: str,
    threads: int,
) -> None: ...
