"""What the kernel benchmark computes on: sizes, how much work they are, and random inputs in GPU memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from misa_vllm import reference
from misa_vllm.index_cache import (
    INDEX_HEAD_DIM,
    MEAN_BYTES,
    PAGE_BYTES,
    PAGE_TOKENS,
    STOCK_PAGE_BYTES,
    keys_view,
    means_view,
    scales_view,
    signed_means_view,
)
from misa_vllm.rows import QueryRows
from misa_vllm.settings import STATISTICS

KEY_BYTES = STOCK_PAGE_BYTES // PAGE_TOKENS
"""An FP8 key with its scale."""
DOT_FLOP = 2 * INDEX_HEAD_DIM
"""One (query head, key) pair."""
PAGES_AT_ONCE = 8192
"""Pages filled per step: bounds the fp32 values that keys are quantised from."""


@dataclass(frozen=True)
class Case:
    """`requests` requests of `keys` tokens each; the last `rows_each` tokens of each are the queries."""

    phase: str
    """"prefill" or "decode"."""
    heads: int
    """H."""
    keys: int
    """N."""
    requests: int
    rows_each: int

    @property
    def rows(self) -> int:
        """M."""
        return self.requests * self.rows_each

    @property
    def pages_each(self) -> int:
        return -(-self.keys // PAGE_TOKENS)

    @property
    def visible(self) -> range:
        """Keys that the queries of a request see."""
        return range(self.keys - self.rows_each + 1, self.keys + 1)

    @property
    def input_bytes(self) -> int:
        """Keys and queries."""
        return self.requests * self.keys * KEY_BYTES + self.rows * self.heads * INDEX_HEAD_DIM

    def __str__(self) -> str:
        rows = f"{self.rows} rows" if self.phase == "prefill" else f"batch {self.requests}, next_n {self.rows_each}"
        return f"{self.phase}, H = {self.heads}, {rows}, {self.keys} keys"


@dataclass(frozen=True)
class Options:
    """h, B, C, k, the context from which heads are routed, and the statistic they are routed by."""

    active_heads: int
    pool_block: int
    candidates: int
    k: int
    route_from: int
    statistic: str = STATISTICS[0]


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without: matrix products in FLOP, and bytes of device memory, each read once."""

    flop: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def tflops(self, us: float) -> float:
        """TFLOP/s of a run of `us` microseconds."""
        return self.flop / us * 1e-6

    def terabytes_per_s(self, us: float) -> float:
        """TB/s of a run of `us` microseconds."""
        return self.bytes / us * 1e-6


def _pairs(case: Case, of_row: Callable[[int], int] = lambda visible: visible) -> int:
    return case.requests * sum(map(of_row, case.visible))


def _keys(case: Case) -> int:
    return case.requests * case.keys * KEY_BYTES


def _scores(case: Case, heads: int, visible_from: int = 0, visible_to: float = math.inf) -> int:
    """FLOP of `heads` heads against every visible key, for rows that see visible_from .. visible_to - 1 keys."""
    return DOT_FLOP * heads * _pairs(case, lambda visible: visible if visible_from <= visible < visible_to else 0)


def _route(case: Case, options: Options, visible_from: int = 0) -> Work:
    """All heads against the means of the complete pool blocks, or against the sums of mean_positive's."""
    pool_block = options.pool_block
    blocks = _pairs(case, lambda visible: visible // pool_block if visible >= visible_from else 0)
    means = case.requests * (case.keys // pool_block) * (pool_block // PAGE_TOKENS) if blocks else 0
    products = blocks
    if options.statistic == "mean_positive":
        products = 2 * _pairs(case, lambda visible: int(visible >= max(visible_from, pool_block)))
    return Work(DOT_FLOP * case.heads * products, means * MEAN_BYTES)


def work(case: Case, stage: str, options: Options) -> Work:
    """The work of a stage of `misa_vllm.bench.kernels` on `case` (stock's whole indexer is stage "exact").

    Scores are 2 * 128 * heads FLOP per visible (query, key) pair; keys are 132 bytes each and counted once per
    request, page means 512 bytes per 64 keys, candidates 132 bytes each.
    """
    if stage == "page means":
        pages = case.pages_each - (case.keys - case.rows_each) // PAGE_TOKENS
        return Work(0, case.requests * pages * (STOCK_PAGE_BYTES + MEAN_BYTES))
    if stage == "route":
        return _route(case, options)
    if stage == "select":
        return Work(_scores(case, options.active_heads), _keys(case))
    if stage in ("scores", "exact"):
        return Work(_scores(case, case.heads), _keys(case))
    if stage == "gather":
        return Work(0, 2 * _keys(case))
    if stage == "top-k":
        return Work(0, _pairs(case) * torch.float32.itemsize)
    start = options.route_from if stage == "whole" else max(options.route_from, options.candidates + 1)
    scores = _scores(case, case.heads, visible_to=start) + _scores(case, options.active_heads, start)
    total = Work(scores, _keys(case)) + _route(case, options, start)
    if stage == "hierarchical":
        reranked = case.requests * sum(visible >= start for visible in case.visible) * options.candidates
        total += Work(DOT_FLOP * case.heads * reranked, KEY_BYTES * reranked)
    return total


class KeyPool:
    """Random index keys in pages, with the router's statistic: in our page layout and, equal, in stock vLLM's."""

    def __init__(
        self, num_pages: int, device: torch.device, seed: int = 0, statistic: str = STATISTICS[0]
    ) -> None:
        self.device, self.statistic = device, statistic
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.index_cache = torch.empty(num_pages, PAGE_BYTES, dtype=torch.uint8, device=device)
        for start in range(0, num_pages, PAGES_AT_ONCE):
            self._fill(self.index_cache[start : start + PAGES_AT_ONCE])
        self.stock_cache = self.index_cache[:, :STOCK_PAGE_BYTES].contiguous().unflatten(1, (PAGE_TOKENS, KEY_BYTES))
        self.order = torch.randperm(num_pages, generator=self.generator, device=device).to(torch.int32)

    def _fill(self, pages: torch.Tensor) -> None:
        keys = self.normal(pages.shape[0], PAGE_TOKENS, INDEX_HEAD_DIM)
        values, scales = reference.quantize_fp8(keys)
        keys_view(pages).view(torch.uint8).copy_(values.view(torch.uint8))
        scales_view(pages).copy_(scales)
        keys = values.float() * scales.unsqueeze(-1)
        if self.statistic == "mean_positive":
            signed_means_view(pages).copy_(torch.stack([keys.relu().mean(dim=1), (-keys).relu().mean(dim=1)], dim=1))
        else:
            means_view(pages).copy_(keys.mean(dim=1))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Inputs:
    """One set of inputs; shapes as in `misa_vllm.kernels.Kernels`."""

    q: torch.Tensor
    gates: torch.Tensor
    index_cache: torch.Tensor
    rows: QueryRows
    slots: torch.Tensor
    """[M] int64, where the step's own keys lie."""
    stock_cache: torch.Tensor
    """[pages, 64, 132] uint8."""


def make_inputs(case: Case, pool: KeyPool, number: int, max_visible: int, gate_scale: float = 1.0) -> Inputs:
    """The `number`-th set; sets of a case share no page of the pool while it has pages enough.

    Scores are in proportion to `gate_scale`; at 1 most of them are between 2^-10 and 2^2.

    Decode's rows tell the host what a captured graph knows: no lower bound, and `max_visible` as the upper one.
    """
    device = pool.device
    pages = case.requests * case.pages_each
    start = number * pages % (pool.order.shape[0] - pages + 1)
    block_table = pool.order[start : start + pages].view(case.requests, case.pages_each).clone()
    visible = torch.tensor(case.visible, dtype=torch.int32, device=device).repeat(case.requests)
    request = torch.arange(case.requests, dtype=torch.int32, device=device).repeat_interleave(case.rows_each)
    min_visible = case.visible[0] if case.phase == "prefill" else 0
    rows = QueryRows(block_table, request, visible, max_visible, min_visible)
    last = visible.long() - 1
    slots = block_table[request.long(), last // PAGE_TOKENS].long() * PAGE_TOKENS + last % PAGE_TOKENS
    q = pool.normal(case.rows, case.heads, INDEX_HEAD_DIM).to(torch.float8_e4m3fn)
    gates = pool.normal(case.rows, case.heads) * (gate_scale * (INDEX_HEAD_DIM * case.heads) ** -0.5)
    return Inputs(q, gates, pool.index_cache, rows, slots, pool.stock_cache)
