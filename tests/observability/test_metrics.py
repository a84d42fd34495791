"""The Prometheus series in real registries, of one process and of several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from hardkv_sglang.generated import insert_generated
from hardkv_sglang.observability.metrics import COUNTERS, GAUGES, HardKVMetrics, help_text, metrics_table
from hardkv_sglang.observability.occupancy import Occupancy
from hardkv_sglang.observability.statistics import Statistics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
LABELS = {"model_name": "m", "tp_rank": 0}
UNIT_ENDINGS = {"token pages": "_pages", "tokens": "_tokens", "seconds": "_seconds", "ratio": "_ratio"}


def test_document_lists_the_series() -> None:
    assert insert_generated(DOCUMENT.read_text(), "metrics", metrics_table()) == DOCUMENT.read_text()


def test_names_follow_the_rules_of_prometheus() -> None:
    for series in (*COUNTERS, *GAUGES):
        base = series.name.removesuffix("_total")
        assert (base != series.name) == (series in COUNTERS), series.name
        assert base.endswith(UNIT_ENDINGS.get(series.unit, ("_events", "_avoided"))), series.name


def test_published_values_are_the_statistics() -> None:
    registry = CollectorRegistry()
    metrics = HardKVMetrics(LABELS, registry)
    statistics = Statistics()
    for step in (1, 2, 3):
        for number, series in enumerate(COUNTERS):
            setattr(statistics, series.source, step * (number + 0.5))
        occupancy = Occupancy(640 * step, 4 * step, 64 * step, 30 * step, 40 * step)
        metrics.publish(statistics, occupancy)
        metrics.publish(statistics, occupancy)  # nothing happened in between
        for series in COUNTERS:
            assert registry.get_sample_value(series.name, str_labels(0)) == getattr(statistics, series.source)
        for series in GAUGES:
            assert registry.get_sample_value(series.name, str_labels(0)) == getattr(occupancy, series.source)
    assert registry.get_sample_value("hardkv_kept_ratio", str_labels(0)) == 0.75


def test_exposition_is_readable() -> None:
    registry = CollectorRegistry()
    HardKVMetrics(LABELS, registry).publish(Statistics(), Occupancy.of([], 32))
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
    for series in (*COUNTERS, *GAUGES):
        family = families[series.name.removesuffix("_total")]
        assert family.type == ("counter" if series in COUNTERS else "gauge")
        assert family.documentation == help_text(series)


RANK_PROGRAM = """
import sys
from hardkv_sglang.observability.metrics import HardKVMetrics
from hardkv_sglang.observability.occupancy import Occupancy
from hardkv_sglang.observability.statistics import Statistics

rank = int(sys.argv[1])
metrics = HardKVMetrics({"model_name": "m", "tp_rank": rank})
for step in (1, 2):
    metrics.publish(Statistics(select_events=(rank + 1) * step), Occupancy(0, 0, 0, step, 10 * (rank + 1)))
"""


def test_processes_are_collected_side_by_side(tmp_path: Path) -> None:
    # as SGLang runs it: scheduler processes write files, the HTTP server's process reads them
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rank in (0, 1):
        subprocess.run([sys.executable, "-c", RANK_PROGRAM, str(rank)], env=environment, check=True, timeout=120)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    for rank in (0, 1):
        assert registry.get_sample_value("hardkv_select_events_total", str_labels(rank)) == 2 * (rank + 1)
        assert registry.get_sample_value("hardkv_output_pages", str_labels(rank)) == 2
        expected = pytest.approx(2 / (10 * (rank + 1)))
        assert registry.get_sample_value("hardkv_kept_ratio", str_labels(rank)) == expected


def str_labels(rank: int) -> dict[str, str]:
    """Labels as they are exported."""
    return {"model_name": "m", "tp_rank": str(rank)}
