"""The monitoring example: its files load, fit together, and ask for series that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from hardkv_sglang.observability.metrics import COUNTERS, GAUGES

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "monitoring"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "hardkv.json"
SERIES = re.compile(r"\b(?:hardkv_|sglang:)\w+")
HARDKV_SERIES = {series.name for series in (*COUNTERS, *GAUGES)}


@cache
def sglang_series() -> set[str]:
    """Names of SGLang's own series, as its source declares them."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations is not None
    source = Path(package.submodule_search_locations[0]) / "srt" / "observability" / "metrics_collector.py"
    return set(re.findall(r'name="(sglang:\w+)"', source.read_text()))


def unknown_series(text: str) -> set[str]:
    """Series that the text names and that neither we nor SGLang export."""
    named = {re.sub(r"_bucket$", "", name) for name in SERIES.findall(text)}
    return {name for name in named - HARDKV_SERIES - sglang_series() if name != "hardkv_sglang"}


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON."""
    return json.loads(DASHBOARD.read_text())


def expressions() -> list[str]:
    """The PromQL of all panels."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_dashboard_asks_for_series_that_exist() -> None:
    assert unknown_series(DASHBOARD.read_text()) == set()
    assert unknown_series("rate(hardkv_no_such_total[5m]) / sglang:no_such") == {
        "hardkv_no_such_total",
        "sglang:no_such",
    }


@pytest.mark.parametrize("name", ["operations.md", "metrics.md"])
def test_documents_name_series_that_exist(name: str) -> None:
    assert unknown_series((ROOT / "docs" / name).read_text()) == set()


def test_counters_are_read_as_rates_and_gauges_are_not() -> None:
    for expression in expressions():
        for name in SERIES.findall(expression):
            is_rate = f"rate({name}{{" in expression
            assert is_rate == name.endswith(("_total", "_bucket")), expression
        assert expression.count("(") == expression.count(")"), expression


def test_dashboard_has_the_form_that_grafana_loads() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places)
    assert all(x + p["gridPos"]["w"] <= 24 for (x, _), p in zip(places, panels, strict=True))
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", "\n".join(expressions()))) - {"__rate_interval"} <= set(variables)
    sources = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert variables["datasource"]["current"]["value"] in [source["uid"] for source in sources]


def test_compose_mounts_what_exists_and_runs_the_release_of_all_figures() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounts = [volume.rsplit(":", 2) for service in services.values() for volume in service["volumes"]]
    for source, *_ in mounts:
        assert not source.startswith(".") or (FOLDER / source).exists(), source
    (release,) = re.findall(r"^SGLANG := ([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert services["server"]["image"].endswith(f":v{release}")
    # the dashboards are mounted where the provider looks for them
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/hardkv.yaml").read_text())["providers"]
    assert provider["options"]["path"] in [parts[1] for parts in mounts if len(parts) == 3]
    (scrape,) = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    ((target,),) = [entry["targets"] for entry in scrape["static_configs"]]
    assert f"--port {target.rpartition(':')[2]}" in services["server"]["command"][-1]
