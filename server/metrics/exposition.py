"""Writes a snapshot as Prometheus reads it: its own text format, or OpenMetrics where that is accepted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.metrics.histogram import Histogram
from server.metrics.series import PREFIX, SERIES, Series
from server.metrics.snapshot import Metrics, Snapshot

__all__ = ["exposition"]

_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class _Collected(Collector):
    """Every series of a snapshot, in the order of their declaration. Those without a sample are told, too."""

    def __init__(self, now: Snapshot) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        for series in SERIES:
            yield _histogram(series, self._now) if series.kind == "histogram" else _numbers(series, self._now)


def _numbers(series: Series, now: Snapshot) -> Metric:
    made = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family: Metric = made(PREFIX + series.name, series.meaning, labels=series.labels)
    for labels, value in series.read(now):
        assert not isinstance(value, Histogram)
        family.add_metric(labels, value)  # type: ignore[attr-defined]
    return family


def _histogram(series: Series, now: Snapshot) -> Metric:
    family = HistogramMetricFamily(PREFIX + series.name, series.meaning, labels=series.labels)
    for labels, value in series.read(now):
        assert isinstance(value, Histogram)
        bounds = [*map(floatToGoString, value.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, value.cumulative(), strict=True)), value.total)
    return family


def exposition(metrics: Metrics, accept: str) -> tuple[bytes, str]:
    """Return all metrics, those of the process included, and their content type.

    Args:
        accept: the request's `Accept` header; OpenMetrics 1.0.0 is sent where it is named there.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(metrics.snapshot()))
    ProcessCollector(registry=registry)
    if any(_takes_openmetrics(kind) for kind in accept[:1000].split(",")):
        # With its default the library writes `verbatim_` before samples, and `verbatim:` above them.
        written: bytes = openmetrics.generate_latest(registry, escaping="allow-utf-8")  # type: ignore[no-untyped-call]
        return written, _OPENMETRICS
    return generate_latest(registry), _TEXT


def _takes_openmetrics(kind: str) -> bool:
    name, *parameters = (part.strip().lower() for part in kind.split(";"))
    given = dict(parameter.partition("=")[::2] for parameter in parameters)
    wanted = given.get("version", "1.0.0").strip('"') == "1.0.0"
    return name == "application/openmetrics-text" and wanted and not re.fullmatch(r"0(\.0*)?", given.get("q", "1"))
