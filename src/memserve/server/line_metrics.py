"""Prometheus metrics of the line in front of the instances: who waits, how long, and who was refused."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from memserve.server.backend import LineView


class LineMetrics(Collector):
    """Shows the line as it was last shown to it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._view = LineView()
        registry.register(self)

    def show(self, view: LineView) -> None:
        """Take the latest view."""
        self._view = view

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        requests = GaugeMetricFamily(
            "memserve_waiting_requests", "Requests in front of the instances", labels=("tenant",)
        )
        tokens = GaugeMetricFamily(
            "memserve_waiting_tokens", "Tokens of their prompts and expected answers", labels=("tenant",)
        )
        waits = SummaryMetricFamily(
            "memserve_wait_seconds", "How long those have waited that were sent", labels=("tenant",)
        )
        refusals = CounterMetricFamily(
            "memserve_refusals", "Requests not taken, by reason", labels=("reason",)
        )
        for tenant in self._view.tenants:
            requests.add_metric((tenant.tenant,), tenant.waiting)
            tokens.add_metric((tenant.tenant,), tenant.tokens)
            waits.add_metric((tenant.tenant,), tenant.waited, tenant.waited_seconds)
        for refusal in self._view.refusals:
            refusals.add_metric((refusal.name,), refusal.value)
        return requests, tokens, waits, refusals
