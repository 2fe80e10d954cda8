"""The dashboard and the compose file beside a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmcache_rag.vllm.metrics import ReusePromMetrics

FOLDER = Path(__file__).parents[2] / "examples" / "serving"


def names_of(registry: CollectorRegistry) -> set[str]:
    return {sample.name for family in registry.collect() for sample in family.samples} | {
        f"{family.name}_total" if family.type == "counter" else f"{family.name}_bucket" for family in registry.collect()
    }


def test_the_dashboard_asks_for_what_there_is() -> None:
    registry = CollectorRegistry()
    kinds = {
        kind: lambda kind=kind, **fields: kind(registry=registry, **fields) for kind in (Counter, Gauge, Histogram)
    }
    config = type("Config", (), {"kv_transfer_config": None})
    ReusePromMetrics(config, kinds, ["engine"], {0: ["0"]})
    known = names_of(registry) | {"vllm:time_to_first_token_seconds_bucket"}
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    asked = {name for panel in panels for each in panel["targets"] for name in re.findall(r"vllm:\w+", each["expr"])}
    assert len(asked) > 10
    assert asked <= known, asked - known


def test_the_compose_file_mounts_what_there_is() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounts = [mount.split(":")[0] for service in services.values() for mount in service["volumes"]]
    assert len(mounts) == 4
    assert all((FOLDER / mount).is_file() for mount in mounts)
