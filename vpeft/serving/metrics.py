"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server, in a registry of their own.

    Attributes:
        requests: by ``task`` (empty for one that is not in the book) and ``status``; 499 where the client went away.
        batch: images of each batch.
        forwards: by ``how``: ``routed`` or ``separate``.
        latency: seconds from a request's beginning to its answer.
        shelf: loads and evictions of adapters, by ``what``.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry}
        self.requests = Counter("vpeft_requests", "Answered requests", ["task", "status"], **kept)
        self.batch = Histogram("vpeft_batch_size", "Images in a batch", buckets=SIZES, **kept)
        self.forwards = Counter("vpeft_forwards", "Forwards of the model", ["how"], **kept)
        self.latency = Histogram(
            "vpeft_request_seconds", "Seconds from the first byte to the answer", ["task"], buckets=SECONDS, **kept
        )
        self.shelf = Counter("vpeft_adapter_changes", "Adapters loaded and evicted", ["what"], **kept)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A number that is looked up when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
