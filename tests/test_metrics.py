"""Counters reach the server's registry from other processes; recall is the share of DSA's tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from misa_vllm import metrics
from misa_vllm.settings import IndexerSettings

SETTINGS = IndexerSettings(
    policy="misa", index_heads=64, topk=4, active_heads=8, pool_block=64, candidates=8, min_context=0
)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(tmp_path))
    metrics._counters.cache_clear()
    yield tmp_path
    metrics._counters.cache_clear()


def samples(directory):
    families = metrics._Collector(directory, SETTINGS).collect()
    return {(s.name, s.labels.get("path")): s.value for family in families for s in family.samples}


def test_recall_counts_shared_tokens_only():
    selected = torch.tensor([[5, 1, 9, -1], [0, 1, 2, 3], [-1, -1, -1, -1]])
    exact = torch.tensor([[1, 2, 5, -1], [3, 2, 1, 0], [-1, -1, -1, -1]])
    assert metrics.recall(selected, exact).tolist() == pytest.approx([2 / 3, 1.0, 0.0])


def test_queries_are_counted_by_path(directory):
    # a prompt of 70 tokens in one step, one decode far out, one request with no query in this step
    metrics.count_queries(SETTINGS, np.array([1, 1000, 31]), np.array([70, 1000, 30]))
    seen = samples(directory)
    assert seen["misa:queries_total", "all"] == 4
    assert seen["misa:queries_total", "exact"] == 63 - 4
    assert seen["misa:queries_total", "routed"] == 70 - 63 + 1


def test_dsa_routes_nothing(directory):
    metrics.count_queries(replace(SETTINGS, policy="dsa", routes_heads=False), np.array([1]), np.array([70]))
    seen = samples(directory)
    assert [seen["misa:queries_total", path] for path in metrics.PATHS] == [4, 66, 0]


def test_files_of_several_processes_are_added(directory):
    metrics.count_queries(SETTINGS, np.array([1]), np.array([1]))
    (directory / "12345.f64").write_bytes((directory / next(directory.iterdir()).name).read_bytes())
    assert samples(directory)["misa:queries_total", "all"] == 2


def test_nothing_is_written_where_nobody_serves_metrics(monkeypatch, tmp_path):
    monkeypatch.delenv(metrics.DIRECTORY_VARIABLE, raising=False)
    metrics._counters.cache_clear()
    metrics.count_queries(SETTINGS, np.array([1]), np.array([1]))
    assert metrics._counters() is None
    metrics._counters.cache_clear()
