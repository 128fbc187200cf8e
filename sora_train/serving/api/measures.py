"""What Prometheus reads of a gateway: its own requests, and the jobs of the database."""

from collections.abc import Iterator
from typing import Any

from sora_train.serving.jobs.job import DatabaseAway
from sora_train.serving.jobs.store import JobStore

TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Measures:
    """The numbers of one app; two in a process do not mix."""

    def __init__(self, store: JobStore):
        import prometheus_client as prometheus

        self._prometheus = prometheus
        self.store, self.registry = store, prometheus.CollectorRegistry()
        names = ["route", "method", "status"]
        self._requests = prometheus.Counter(
            "sora_requests", "Requests answered.", names, registry=self.registry
        )
        self._seconds = prometheus.Histogram(
            "sora_request_seconds",
            "Time to the end of an answer.",
            names[:2],
            buckets=TIMES,
            registry=self.registry,
        )
        self.registry.register(self)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)

    def describe(self) -> list[Any]:
        """Nothing before the first reading: the database is not asked when the app is made."""
        return []

    def collect(self) -> Iterator[Any]:
        """Read at every scrape."""
        from_core = self._prometheus.metrics_core
        up = from_core.GaugeMetricFamily("sora_database_up", "Whether the database answers.")
        jobs = from_core.GaugeMetricFamily("sora_jobs", "Jobs by status.", labels=["status"])
        try:
            counts = self.store.counts()
        except DatabaseAway:
            counts = {}
        up.add_metric([], float(bool(counts)))
        for status, count in counts.items():
            jobs.add_metric([status], count)
        yield from (up, jobs)

    def text(self) -> bytes:
        return self._prometheus.generate_latest(self.registry)

    @property
    def kind(self) -> str:
        return self._prometheus.CONTENT_TYPE_LATEST
