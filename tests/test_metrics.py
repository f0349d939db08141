"""Counters reach the server's registry from other processes; recall is the share of DSA's tokens."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from misa_vllm import metrics
from misa_vllm.indexer import Indexer
from misa_vllm.policies import IndexerStep
from misa_vllm.rows import QueryRows
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


def test_exact_decodes_are_counted_as_such(directory):
    settings = replace(SETTINGS, exact_decode=True)
    # two decodes, one of them among the first tokens of a request, and the prompt of 70 tokens
    metrics.count_queries(settings, np.array([1000, 3, 1]), np.array([1000, 3, 70]), np.array([True, True, False]))
    seen = samples(directory)
    assert [seen["misa:queries_total", path] for path in metrics.PATHS] == [1 + 4, 1 + 59, 7]


def test_dsa_routes_nothing(directory):
    metrics.count_queries(replace(SETTINGS, policy="dsa", routes_heads=False), np.array([1]), np.array([70]))
    seen = samples(directory)
    assert [seen["misa:queries_total", path] for path in metrics.PATHS] == [4, 66, 0]


def test_the_options_in_force_are_shown(directory):
    settings = replace(SETTINGS, statistic="mean_positive")
    shown = {f.name: f.samples[0].labels for f in metrics._Collector(directory, settings).collect()}["misa:config"]
    assert (shown["policy"], shown["pool_block"], shown["statistic"]) == ("misa", "64", "mean_positive")


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


class ExactKernels:
    """Stands in for the kernels: every query's best tokens are the first ones."""

    def __init__(self):
        self.calls = []

    def select_tokens(self, q, gates, heads, index_cache, rows, k, out):
        assert heads is None and len(q) == len(gates) == len(rows) == len(out)
        self.calls.append(rows.visible.tolist())
        out[:] = torch.arange(k)


@pytest.mark.parametrize("at_once", [2, 1024])
def test_every_nth_routed_query_is_audited(directory, monkeypatch, at_once):
    monkeypatch.setattr(metrics, "AUDITED_AT_ONCE", at_once)
    visible = torch.arange(60, 80, dtype=torch.int32)  # routed from 64 on
    rows = QueryRows(torch.zeros(1, 2, dtype=torch.int32), torch.zeros_like(visible), visible, 79)
    q = torch.zeros(20, 64, 128).to(torch.float8_e4m3fn)
    kernels = ExactKernels()
    step = IndexerStep(q, torch.zeros(20, 64), torch.zeros(2, 8960, dtype=torch.uint8), rows, kernels)
    out = torch.tensor([[0, 1, 70, 71, -7]], dtype=torch.int32).expand(20, 5).contiguous()
    metrics.audit(replace(SETTINGS, audit_every=5), step, out)
    assert sum(kernels.calls, []) == [65, 70, 75]
    assert max(map(len, kernels.calls)) <= at_once
    seen = samples(directory)
    assert (seen["misa:audited_queries_total", None], seen["misa:audited_recall_sum_total", None]) == (3, 1.5)
    metrics.audit(replace(SETTINGS, audit_every=1000), step, out)  # none is sampled
    assert samples(directory) == seen and len(sum(kernels.calls, [])) == 3


def test_memory_of_the_audit_is_reserved():
    taken = []
    kernels = SimpleNamespace(workspace_bytes=lambda rows, visible, k: 7)
    for every in (0, 64):
        indexer = Indexer(replace(SETTINGS, audit_every=every), "cpu")
        indexer.kernels = kernels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", lambda size, **_: taken.append(size))
            indexer.reserve(8192, 2**20, torch.device("cpu"))
    assert taken == [7, 7 + metrics.audit_bytes(SETTINGS)]
