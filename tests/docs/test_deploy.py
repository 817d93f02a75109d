"""What is in deploy/ fits what a cluster serves by default. (The names on the board: test_metric_docs.py.)"""

from __future__ import annotations

import yaml
from tests.docs_pages import ROOT

from tarragon.config import Config


def test_prometheus_scrapes_both_listeners_at_their_default_addresses() -> None:
    jobs = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    assert {job["job_name"]: job["static_configs"] for job in jobs} == {
        "tarragon-gateway": [{"targets": [f"{Config().host}:{Config().port}"]}],
        "tarragon-cluster": [{"targets": [f"{Config().admin_host}:{Config().admin_port}"]}],
    }
    assert all("metrics_path" not in job for job in jobs), "both serve /metrics, as Prometheus expects"
