"""One layer's indexer: keep the statistics current, let the policy select."""

import functools
from collections.abc import Callable

import torch

from misa_vllm import metrics
from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS
from misa_vllm.kernels import Kernels, choose_kernels
from misa_vllm.log import info_once
from misa_vllm.policies import DSA, IndexerStep, make_policy
from misa_vllm.rows import QueryRows
from misa_vllm.settings import IndexerSettings

ROWS_TO_COMPILE_FOR = 64
"""Of one request: a prefill, as far as any kernel can tell."""


class Indexer:
    """The indexer of one DSA layer under one set of options."""

    def __init__(self, settings: IndexerSettings, device_type: str) -> None:
        self.settings = settings
        self.kernels = choose_kernels(device_type)
        self.routes_by_signs = settings.routes_heads and settings.statistic == "mean_positive"
        if self.routes_by_signs:
            # who computes it need not be who computes the rest
            info_once(f"MISA router statistic mean_positive: {self.kernels.route_heads_by_signs.__module__}.")
        self.policy = make_policy(settings)
        self.exact_policy = DSA(settings)
        self.observer: Callable[[IndexerStep, torch.Tensor], None] | None = None
        """Called with every step and its selection; for tools that measure, unset in serving."""

    def write_keys(self, k: torch.Tensor, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Quantise index keys k [T, 128] into the cache (CPU; on GPUs vLLM's fused kernel has done it)."""
        self.kernels.write_index_keys(k, index_cache, slot_mapping)

    def update_statistics(self, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Recompute the statistic of every page this step wrote to; every step that writes keys must call it."""
        if self.routes_by_signs:
            self.kernels.update_signed_means(index_cache, slot_mapping)
        elif self.settings.routes_heads:
            self.kernels.update_page_means(index_cache, slot_mapping)

    def select(
        self,
        q: torch.Tensor,
        gates: torch.Tensor,
        index_cache: torch.Tensor,
        rows: QueryRows,
        out: torch.Tensor,
        exact: bool = False,
    ) -> None:
        """Write each row's selected positions into out [M, >= k] int32; shapes as in `IndexerStep`.

        exact: by all heads, whatever the policy (decoded rows under `exact_decode`).
        """
        step = IndexerStep(q, gates, index_cache, rows, self.kernels)
        (self.exact_policy if exact else self.policy).select(step, out)
        if self.settings.audit_every and not exact:
            metrics.audit(self.settings, step, out)
        if self.observer is not None:
            self.observer(step, out)

    def observe(
        self, q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, selected: torch.Tensor
    ) -> None:
        """Show the observer, if there is one, a selection that vLLM's own kernels made; arguments as in `select`."""
        if self.observer is not None:
            self.observer(IndexerStep(q, gates, index_cache, rows, self.kernels), selected)

    def reserve(self, max_rows: int, max_visible: int, device: torch.device) -> None:
        """Allocate and drop what a step of `max_rows` queries may need, so that memory profiling counts it."""
        size = self.kernels.workspace_bytes(max_rows, max_visible, self.policy.widest_selection)
        if self.routes_by_signs:  # released before anything is selected
            size = max(size, self.kernels.signs_workspace_bytes(max_rows, max_visible))
        size += self.policy.workspace_bytes(max_rows)
        if self.settings.audit_every:
            size += metrics.audit_bytes(self.settings)
        torch.empty(size, dtype=torch.uint8, device=device)
        if self.routes_by_signs:
            _compile_router(self.kernels, self.settings, max_visible, device)


@functools.cache
def _compile_router(kernels: Kernels, settings: IndexerSettings, max_visible: int, device: torch.device) -> None:
    """Route rows that see nothing: what Triton compiles at first use is then ready for the first long prompt.

    Once for all layers.
    """
    heads, width = settings.index_heads, -(-max_visible // PAGE_TOKENS)
    nothing = torch.zeros(ROWS_TO_COMPILE_FOR, dtype=torch.int32, device=device)
    q = torch.zeros(ROWS_TO_COMPILE_FOR, heads, INDEX_HEAD_DIM, dtype=torch.uint8, device=device)
    gates = torch.zeros(ROWS_TO_COMPILE_FOR, heads, device=device)
    pages = torch.zeros(1, PAGE_BYTES, dtype=torch.uint8, device=device)
    table = torch.zeros(1, width, dtype=torch.int32, device=device)
    rows = QueryRows(table, request=nothing, visible=nothing, max_visible=max_visible)
    step = IndexerStep(q.view(torch.float8_e4m3fn), gates, pages, rows, kernels)
    step.route(settings.active_heads, settings.pool_block, settings.statistic)
