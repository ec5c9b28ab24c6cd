"""What Prometheus reads: sums kept by the engine's thread and the loop, put into words only when somebody asks."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from anabranch.serve.adapters.library import AdapterLibrary
from anabranch.serve.async_engine import AsyncEngine
from anabranch.serve.traffic import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "anabranch_"


class EngineMetrics(Collector):
    """Reads one engine. Numbers of one answer may be a step apart: nothing is locked for them."""

    def __init__(self, engine: AsyncEngine, adapters: AdapterLibrary | None) -> None:
        self._engine = engine
        self._adapters = adapters

    def collect(self) -> Iterator[Metric]:
        traffic, engine = self._engine.traffic, self._engine.engine
        scheduler, stats = engine.scheduler, engine.stats
        pool = scheduler.pool
        yield _gauge("requests_running", "Samples that advance in every step", len(scheduler.running))
        yield _gauge("requests_waiting", "Samples in the queue", len(scheduler.waiting))
        yield _gauge("cache_usage_ratio", "Cache blocks held by samples", 1 - pool.num_free / pool.num_blocks)
        yield _gauge("cache_blocks", "Cache blocks in all", pool.num_blocks)
        yield _counter("prompt_tokens", "Tokens of prompts", traffic.prompt_tokens)
        yield _counter("prefix_hit_tokens", "Tokens of prompts found in the prefix cache", traffic.cached_tokens)
        yield _counter("generated_tokens", "Tokens of outputs", stats.sampled_tokens)
        yield _counter("preemptions", "Samples that gave their blocks back for older ones", scheduler.preemptions)
        yield _counter("rejected_requests", "Requests refused because the server was full", traffic.rejected)
        yield _counter("engine_steps", "Passes through the model", stats.steps)
        yield _counter("engine_busy_seconds", "Time with something to compute", traffic.busy_s)
        yield _counter("model_seconds", "Of it in calls of the model", engine.runner.model_s)
        if engine.adapter_slots is not None and self._adapters is not None:
            slots, library = engine.adapter_slots, self._adapters
            yield _gauge("adapters_named", "Adapters that requests can name", len(library.names()))
            yield _gauge("adapters_resident", "Of them, and of those unloaded, on the device", len(slots.residents))
            yield _gauge("adapters_host_bytes", "Adapters kept in memory beside", library.kept_bytes)
            yield _counter("adapter_reads", "Adapters read from disk", library.reads)
            yield _counter("adapter_loads", "Adapters copied to the device", slots.loads)
            yield _counter("adapter_evictions", "Adapters that gave way to others there", slots.evictions)
        finished = CounterMetricFamily(PREFIX + "finished_requests", "Prompts that ended", labels=["reason"])
        for reason, number in traffic.finished.items():
            finished.add_metric([reason], number)
        yield finished
        yield _histogram("first_token_seconds", "From arrival to the first token", traffic.first_s)
        yield _histogram("inter_token_seconds", "Between two tokens of a sample", traffic.between_s)
        yield _histogram("request_seconds", "From arrival to the end of a prompt's samples", traffic.whole_s)


def make_registry(engine: AsyncEngine, adapters: AdapterLibrary | None) -> CollectorRegistry:
    """All metrics of this server and its process."""
    registry = CollectorRegistry()
    registry.register(EngineMetrics(engine, adapters))
    ProcessCollector(registry=registry)
    return registry


def expose(registry: CollectorRegistry) -> bytes:
    """Prometheus' text format."""
    return generate_latest(registry)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, histogram.cumulative(), strict=True))
    return HistogramMetricFamily(PREFIX + name, text, buckets=buckets, sum_value=histogram.total)
