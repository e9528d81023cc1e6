"""Prometheus metrics of the HTTP server, in a registry of their own. The names are listed in docs/api.md."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from memserve.core.clock import Clock
from memserve.core.types import FinishReason, Ledger
from memserve.server.backend import ClusterView
from memserve.server.failure_metrics import FailureMetrics
from memserve.server.line_metrics import LineMetrics
from memserve.server.routing_metrics import RoutingMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_REQUEST = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All instruments; one object per application."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "memserve_requests", "HTTP requests answered", ("endpoint", "status"), registry=registry
        )
        self._in_flight = Gauge("memserve_requests_in_flight", "HTTP requests under way", registry=registry)
        self._seconds = Histogram(
            "memserve_request_seconds",
            "Arrival to end of the response",
            ("endpoint",),
            buckets=_WHOLE_REQUEST,
            registry=registry,
        )
        self.first_token = Histogram(
            "memserve_time_to_first_token_seconds",
            "Arrival to first sampled token",
            ("endpoint",),
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "memserve_inter_token_seconds",
            "Time per sampled token after the first",
            ("endpoint",),
            buckets=_BETWEEN_TOKENS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "memserve_prompt_tokens",
            "Prompt tokens by where their KV came from",
            ("source",),
            registry=registry,
        )
        self.generated_tokens = Counter("memserve_generated_tokens", "Tokens sampled", registry=registry)
        self.finished = Counter(
            "memserve_choices_finished", "Answers by finish reason", ("reason",), registry=registry
        )
        self._cluster = _ClusterGauges(registry)
        self._routing = RoutingMetrics(registry)
        self._failures = FailureMetrics(registry)
        self._line = LineMetrics(registry)

    def begin_request(self) -> float:
        """Count an HTTP request in and return its time of arrival, s."""
        self._in_flight.inc()
        return self.clock.now()

    def end_request(self, endpoint: str, status: int, arrived: float) -> None:
        """Count it out."""
        self._in_flight.dec()
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(self.clock.now() - arrived)

    def show_cluster(self, view: ClusterView) -> None:
        """Set the gauges of instances and trees; instances that are gone disappear."""
        self._cluster.show(view)
        self._routing.show(view.regrets)
        self._failures.show(view)
        self._line.show(view.line)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Meter:
    """Measures the choices of one HTTP request."""

    def __init__(self, metrics: Metrics, endpoint: str, arrived: float) -> None:
        self.metrics = metrics
        self.endpoint = endpoint
        self.arrived = arrived

    def start(self) -> Watch:
        """Watch one choice."""
        return Watch(self)

    def count_prompt(self, ledger: Ledger) -> None:
        """It has become known where a prompt's tokens came from; once per prompt, as in the usage."""
        for source in ledger.__struct_fields__:
            self.metrics.prompt_tokens.labels(source).inc(getattr(ledger, source))


class Watch:
    """Tokens of one choice and when they came."""

    def __init__(self, meter: Meter) -> None:
        self._metrics = meter.metrics
        self._endpoint = meter.endpoint
        self._last = meter.arrived
        self._tokens = 0

    def count(self, tokens: int) -> None:
        """The choice has ``tokens`` sampled tokens now."""
        new = tokens - self._tokens
        if new > 0:
            now = self._metrics.clock.now()
            first, between = self._metrics.first_token, self._metrics.between_tokens
            if self._tokens == 0:
                first.labels(self._endpoint).observe(now - self._last)
            else:
                for _ in range(new):
                    between.labels(self._endpoint).observe((now - self._last) / new)
            self._metrics.generated_tokens.inc(new)
            self._tokens, self._last = tokens, now

    def finish(self, reason: FinishReason) -> None:
        """The choice has ended by itself."""
        self._metrics.finished.labels(reason.value).inc()


class _ClusterGauges:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._up = Gauge("memserve_instance_up", "1 if ready", ("instance", "role", "isa"), registry=registry)
        labels = ("instance", "role", "state")
        self._blocks = Gauge("memserve_instance_blocks", "KV blocks by state", labels, registry=registry)
        self._requests = Gauge("memserve_instance_requests", "Requests by state", labels, registry=registry)
        self._counters = Gauge(
            "memserve_instance_counter", "Counters of an instance", ("instance", "name"), registry=registry
        )
        self._nodes = Gauge(
            "memserve_tree_nodes", "Nodes of a global prompt tree", ("role",), registry=registry
        )
        self._tokens = Gauge(
            "memserve_tree_tokens", "Tokens in a global prompt tree", ("role",), registry=registry
        )
        self._memory = Gauge(
            "memserve_tree_memory_bytes", "Size of a global prompt tree", ("role",), registry=registry
        )
        self._beliefs = Gauge(
            "memserve_tree_prompt_tokens",
            "Tokens of answered prompts by what their decisions believed",
            ("role", "source", "belief"),
            registry=registry,
        )

    def show(self, view: ClusterView) -> None:
        for gauge in (self._up, self._blocks, self._requests, self._counters):
            gauge.clear()
        for gauge in (self._nodes, self._tokens, self._memory, self._beliefs):
            gauge.clear()
        for one in view.instances:
            self._up.labels(one.instance, one.role, one.isa).set(one.state == "ready")
            for state in ("free", "active", "historical", "incoming"):
                self._blocks.labels(one.instance, one.role, state).set(getattr(one, f"blocks_{state}"))
            for state in ("waiting", "running"):
                self._requests.labels(one.instance, one.role, state).set(getattr(one, state))
            for counter in one.counters:
                self._counters.labels(one.instance, counter.name).set(counter.value)
        for tree in view.trees:
            self._nodes.labels(tree.role).set(tree.nodes)
            self._tokens.labels(tree.role).set(tree.tokens)
            self._memory.labels(tree.role).set(tree.memory)
            for belief in ("believed", "promised", "stale", "missed"):
                figure = getattr(tree, f"{belief}_tokens")
                self._beliefs.labels(tree.role, tree.source, belief).set(figure)
