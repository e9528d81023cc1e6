"""Prometheus metrics of the scheduler's foresight: prediction errors and regret, by policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from memserve.server.backend import RegretView


class RoutingMetrics(Collector):
    """Shows the sums that the scheduler keeps, as they were last shown to it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._views: Sequence[RegretView] = ()
        registry.register(self)

    def show(self, views: Sequence[RegretView]) -> None:
        """Take the latest sums."""
        self._views = views

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        regret = SummaryMetricFamily(
            "memserve_regret_seconds",
            "What the best recorded place would have saved, of the time to the first token and in total",
            labels=("policy", "of"),
        )
        better = CounterMetricFamily(
            "memserve_regretted_decisions", "Decisions with a better place", labels=("policy",)
        )
        error = GaugeMetricFamily(
            "memserve_ttft_prediction_error",
            "Relative error of the predicted time to the first token, of late",
            labels=("policy", "quantile"),
        )
        for view in self._views:
            regret.add_metric((view.policy, "ttft"), view.decisions, view.regret)
            regret.add_metric((view.policy, "total"), view.totals, view.regret_total)
            better.add_metric((view.policy,), view.others)
            error.add_metric((view.policy, "0.5"), view.error_p50)
            error.add_metric((view.policy, "0.9"), view.error_p90)
        return regret, better, error
