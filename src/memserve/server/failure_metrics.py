"""Prometheus metrics of lost instances and of requests that went on elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from memserve.server.backend import ClusterView, Counter


class FailureMetrics(Collector):
    """Shows the counts that the server keeps, as they were last shown to it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._losses: Sequence[Counter] = ()
        self._failovers = 0
        registry.register(self)

    def show(self, view: ClusterView) -> None:
        """Take the latest counts."""
        self._losses, self._failovers = view.losses, view.failovers

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        losses = CounterMetricFamily(
            "memserve_instance_losses", "Times that an instance was lost", labels=("instance",)
        )
        for loss in self._losses:
            losses.add_metric((loss.name,), loss.value)
        failovers = CounterMetricFamily(
            "memserve_failovers", "Requests that went on elsewhere", value=self._failovers
        )
        return losses, failovers
