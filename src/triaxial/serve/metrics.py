"""Figures for Prometheus, under the names and labels that vLLM's dashboards use; `engine` is the replica.

Names: https://docs.vllm.ai/en/latest/usage/metrics.html.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from triaxial.serve.request import Chunk

if TYPE_CHECKING:
    from triaxial.serve.replica import Replica

_LABELS = ("model_name", "engine")
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40)
_REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Metrics:
    """All series of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._finished = self._counter("request_success", "Requests finished, by reason.", "finished_reason")
        self._first = self._histogram("time_to_first_token_seconds", "Time to first token.", _FIRST_TOKEN_S)
        self._between = self._histogram("inter_token_latency_seconds", "Time between tokens.", _TOKEN_S)
        self._mean = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per output token of a request.", _TOKEN_S
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "Time from arrival to the last token.", _REQUEST_S)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._length = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._restarts = Counter(
            "triaxial:replica_restarts", "Restarts of a replica.", _LABELS, registry=self._registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, (*_LABELS, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self._registry)

    def watch(self, replicas: Sequence[Replica]) -> None:
        """Read the replicas' own figures whenever someone asks."""
        self._registry.register(_Gauges(self.model, replicas))
        for replica in replicas:  # series exist from the start, so that rates do
            for metric in (self._prompt_tokens, self._generated, self._first, self._between, self._mean, self._whole):
                metric.labels(self.model, replica.index)
            for reason in ("stop", "length", "abort", "error"):
                self._finished.labels(self.model, replica.index, reason)
            self.restarts(replica.index)

    def restarts(self, replica: int) -> Counter:
        return self._restarts.labels(self.model, replica)

    @contextmanager
    def observe(self, replica: int, prompt_tokens: int, arrived: float) -> Iterator[RequestMetrics]:
        """Call the result with every chunk of a request."""
        request = RequestMetrics(self, replica, prompt_tokens, arrived)
        try:
            yield request
        except GeneratorExit:  # its reader has enough: a stop text was found
            request.finish("stop")
            raise
        except asyncio.CancelledError:  # its client is gone
            request.finish("abort")
            raise
        except Exception:
            request.finish("error")
            raise

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class RequestMetrics:
    """What is measured of one request, as its chunks come."""

    def __init__(self, metrics: Metrics, replica: int, prompt_tokens: int, arrived: float) -> None:
        self.generated = 0
        self._metrics, self._labels, self._prompt_tokens = metrics, (metrics.model, replica), prompt_tokens
        self._arrived, self._first, self._last = arrived, 0.0, 0.0
        self._finished = False

    def __call__(self, chunk: Chunk) -> None:
        now, metrics = time.monotonic(), self._metrics
        if not self._first:
            self._first = now
            metrics._prompt_tokens.labels(*self._labels).inc(self._prompt_tokens)
            metrics._first.labels(*self._labels).observe(now - self._arrived)
        elif chunk.tokens:
            metrics._between.labels(*self._labels).observe((now - self._last) / len(chunk.tokens))
        self._last = now
        self.generated += len(chunk.tokens)
        metrics._generated.labels(*self._labels).inc(len(chunk.tokens))
        if chunk.finish_reason:
            self.finish(chunk.finish_reason)

    def finish(self, reason: str) -> None:
        """Once; what comes later is no news."""
        if self._finished:
            return
        self._finished = True
        metrics = self._metrics
        metrics._finished.labels(*self._labels, reason).inc()
        if reason not in ("stop", "length"):
            return
        metrics._whole.labels(*self._labels).observe(self._last - self._arrived)
        metrics._prompt_length.labels(*self._labels).observe(self._prompt_tokens)
        metrics._length.labels(*self._labels).observe(self.generated)
        if self.generated > 1:
            metrics._mean.labels(*self._labels).observe((self._last - self._first) / (self.generated - 1))


class _Gauges(Collector):
    """The present state of every replica."""

    def __init__(self, model: str, replicas: Sequence[Replica]) -> None:
        self._model, self._replicas = model, replicas

    def collect(self) -> Iterator[Metric]:
        running = self._gauge("vllm:num_requests_running", "Requests in the batch.")
        waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a place in the batch.")
        usage = self._gauge("vllm:kv_cache_usage_perc", "Part of the KV cache blocks in use, 0 to 1.")
        ready = self._gauge("triaxial:replica_ready", "1 if all ranks of the replica work.")
        preempted = CounterMetricFamily("vllm:num_preemptions", "Preemptions since the engine started.", labels=_LABELS)
        for replica in self._replicas:
            stats, labels = replica.stats, (self._model, str(replica.index))
            running.add_metric(labels, stats.running)
            waiting.add_metric(labels, stats.waiting)
            usage.add_metric(labels, stats.blocks_used / max(1, stats.blocks_total))
            ready.add_metric(labels, replica.ready)
            preempted.add_metric(labels, stats.preemptions)
        return iter((running, waiting, usage, ready, preempted))

    def _gauge(self, name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=_LABELS)
