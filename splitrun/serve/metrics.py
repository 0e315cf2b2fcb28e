"""What Prometheus reads: requests, tokens, latencies, and the engine's last status. Knows nothing of how they arise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from splitrun.engine.interface import EngineStatus

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """The counters of one HTTP process and, through ``status``, the gauges of its engine."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(status))
        self.requests = Counter(
            "splitrun_requests", "HTTP requests answered.", ["path", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("splitrun_prompt_tokens", "Prompt tokens received.", registry=self._registry)
        self.completion_tokens = Counter("splitrun_completion_tokens", "Tokens produced.", registry=self._registry)
        self._first = Histogram(
            "splitrun_time_to_first_token_seconds", "From the request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._between = Histogram(
            "splitrun_inter_token_seconds", "Between two tokens of a completion.",
            buckets=_BETWEEN_BUCKETS, registry=self._registry,
        )  # fmt: skip

    def observe_tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """Record ``count`` tokens that arrived together, ``seconds`` after the request or the tokens before them."""
        self.completion_tokens.inc(count)
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Turns the engine's status into metrics whenever they are read."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield GaugeMetricFamily("splitrun_healthy", "1 while the engine works.", value=float(status.healthy))
        yield GaugeMetricFamily("splitrun_requests_running", "Requests in the batch.", value=status.running)
        yield GaugeMetricFamily("splitrun_requests_waiting", "Requests in the queue.", value=status.waiting)
        yield CounterMetricFamily("splitrun_preemptions", "Requests put back for want of blocks.",
                                  value=status.preemptions)  # fmt: skip
        used = GaugeMetricFamily("splitrun_blocks_used", "KV blocks in use.", labels=["group"])
        total = GaugeMetricFamily("splitrun_blocks_total", "KV blocks there are.", labels=["group"])
        for group, use in status.blocks.items():
            used.add_metric([group], use.used)
            total.add_metric([group], use.total)
        yield from (used, total)
        yield CounterMetricFamily("splitrun_epoch", "How often everything was computed again.", value=status.epoch)
        labels = ["stage", "node", "device", "units"]
        memory = GaugeMetricFamily("splitrun_stage_memory_bytes", "Live memory of a stage.", labels=labels)
        last = GaugeMetricFamily("splitrun_stage_last_step_seconds", "The stage's last step.", labels=labels)
        mean = GaugeMetricFamily("splitrun_stage_mean_step_seconds", "The mean of the stage's steps.", labels=labels)
        restarts = CounterMetricFamily("splitrun_stage_restarts", "Starts of a stage after it was lost.", labels=labels)
        queued = GaugeMetricFamily("splitrun_stage_queued_steps", "Steps that wait or run at a stage.", labels=labels)
        sent = CounterMetricFamily("splitrun_hop_bytes", "Activations over the hop behind a stage.", labels=labels)
        kept = GaugeMetricFamily("splitrun_stage_kept_bytes", "Kept for the case that a stage is lost.", labels=labels)
        for index, stage in enumerate(status.stages):
            values = [str(index), stage.node, stage.device, stage.units]
            restarts.add_metric(values, stage.restarts)
            queued.add_metric(values, stage.queued)
            sent.add_metric(values, stage.sent_bytes)
            memory.add_metric(values, stage.memory_bytes)
            last.add_metric(values, stage.last_step_ms / 1000)
            mean.add_metric(values, stage.mean_step_ms / 1000)
            kept.add_metric(values, stage.kept_bytes)
        yield from (memory, last, mean, restarts, queued, sent, kept)

    def describe(self) -> Iterator[Metric]:
        return iter(())
