"""Counters of what the indexer does, served on vLLM's `/metrics` under `misa:`.

Layers run in worker processes whose Prometheus registry nobody serves. A worker therefore keeps its counters in
a small shared file of float64 in a directory that the server's process made and named in the environment; a
collector in the server's registry adds the files up at each scrape.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM
from misa_vllm.policies.base import IndexerStep
from misa_vllm.settings import IndexerSettings

DIRECTORY_VARIABLE = "MISA_METRICS_DIR"
PATHS = ("all", "exact", "routed")
"""How a query's tokens were selected: fewer than top-k visible, by all heads, by routed heads."""
COUNTERS = (*PATHS, "audited_queries", "audited_recall_sum")
AUDITED_AT_ONCE = 1024
"""Queries compared together: bounds the memory of the comparison (`audit_bytes`)."""


def export(settings: IndexerSettings) -> None:
    """Serve the counters of this process and of those it starts (called in the server's process)."""
    if DIRECTORY_VARIABLE not in os.environ:
        directory = tempfile.mkdtemp(prefix="misa-metrics-")
        os.environ[DIRECTORY_VARIABLE] = directory
        atexit.register(_remove_if_owner, directory, os.getpid())
    _collector().settings = settings


@functools.cache
def _collector() -> "_Collector":
    """The collector of this process, in the registry that vLLM serves."""
    from prometheus_client import REGISTRY

    collector = _Collector(Path(os.environ[DIRECTORY_VARIABLE]))
    REGISTRY.register(collector)
    return collector


def _remove_if_owner(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # forked children inherit the exit handler
        shutil.rmtree(directory, ignore_errors=True)


class _Collector:
    """Sums the workers' files at scrape time."""

    def __init__(self, directory: Path, settings: IndexerSettings | None = None) -> None:
        self.directory = directory
        self.settings = settings

    def collect(self):
        from prometheus_client.core import CounterMetricFamily, InfoMetricFamily

        totals = np.zeros(len(COUNTERS))
        for file in self.directory.glob("*.f64"):
            totals += np.fromfile(file, dtype=np.float64, count=len(COUNTERS))
        total = dict(zip(COUNTERS, totals.tolist(), strict=True))
        queries = CounterMetricFamily("misa:queries", "Queries (tokens) by how they selected keys", labels=["path"])
        for path in PATHS:
            queries.add_metric([path], total[path])
        yield queries
        yield CounterMetricFamily(
            "misa:audited_queries", "Queries (per layer) compared with exact DSA", value=total["audited_queries"]
        )
        yield CounterMetricFamily(
            "misa:audited_recall_sum",
            "Sum over audited queries of the share of DSA's tokens that were selected",
            value=total["audited_recall_sum"],
        )
        numbers = ("active_heads", "index_heads", "pool_block", "candidates", "min_context", "topk")
        shown = ("policy", *numbers, "exact_decode", "statistic")
        if self.settings is None:
            return
        yield InfoMetricFamily(
            "misa:config", "Options in force", value={name: str(getattr(self.settings, name)) for name in shown}
        )


@functools.cache
def _counters() -> np.ndarray | None:
    """This process's counters as a mapped file, or None where nobody serves them."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None or not os.path.isdir(directory):
        return None
    return np.memmap(Path(directory, f"{os.getpid()}.f64"), dtype=np.float64, mode="w+", shape=(len(COUNTERS),))


def _add(counter: str, amount: float) -> None:
    counters = _counters()
    if counters is not None:
        counters[COUNTERS.index(counter)] += amount


def count_queries(
    settings: IndexerSettings, first_visible: np.ndarray, last_visible: np.ndarray, decoding: np.ndarray | None = None
) -> None:
    """Count a step's queries by path.

    first_visible, last_visible [R]: how many keys the first and the last query of each request see; those in
    between see one more each. decoding [R] bool: which requests decode; None: none.
    """

    def queries(least: int, most: int, requests: np.ndarray | slice = slice(None)) -> int:
        """That see `least` to `most` keys, of some requests."""
        first, last = first_visible[requests].clip(min=least), last_visible[requests].clip(max=most)
        return int((last - first + 1).clip(min=0).sum())

    largest = np.iinfo(np.int32).max
    every, selecting_all = queries(0, largest), queries(0, settings.topk)
    routed = 0
    if settings.routes_heads:
        all_may = decoding is None or not settings.exact_decode
        routed = queries(settings.route_from, largest, slice(None) if all_may else ~decoding)
    _add("all", selecting_all)
    _add("routed", routed)
    _add("exact", every - selecting_all - routed)


def audit(settings: IndexerSettings, step: IndexerStep, out: torch.Tensor) -> None:
    """Compare every n-th routed query (by position) with exact DSA and count the share of its tokens found.

    Reads results back to the host, so nothing is audited while a CUDA graph is captured or replayed.
    """
    if step.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    visible = step.rows.visible
    sampled = torch.nonzero((visible >= settings.route_from) & (visible % settings.audit_every == 0)).flatten()
    for part in sampled.split(AUDITED_AT_ONCE) if len(sampled) else ():
        exact = torch.empty(len(part), settings.topk, dtype=torch.int32, device=out.device)
        # as bytes: not every device and version of torch gathers float8
        q = step.q.view(torch.uint8)[part].view(step.q.dtype)
        rows = step.rows.take(part)
        step.kernels.select_tokens(q, step.gates[part], None, step.index_cache, rows, settings.topk, exact)
        _add("audited_queries", len(part))
        _add("audited_recall_sum", float(recall(out[part, : settings.topk], exact).sum()))


def audit_bytes(settings: IndexerSettings) -> int:
    """Device memory that `audit` takes besides what the kernels take."""
    query = settings.index_heads * INDEX_HEAD_DIM
    joined = 2 * settings.topk * (2 * torch.int32.itemsize + 2 * torch.int64.itemsize)  # with their sort's
    return AUDITED_AT_ONCE * (query + settings.topk * torch.int32.itemsize + joined)


def recall(selected: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Share of each row's `exact` tokens [M, k] that `selected` [M, k] holds (-1: none), [M] float32."""
    merged = torch.cat([selected, exact], dim=1).sort(dim=1).values
    found = ((merged[:, 1:] == merged[:, :-1]) & (merged[:, 1:] >= 0)).sum(dim=1)
    return found / (exact >= 0).sum(dim=1).clamp(min=1)
