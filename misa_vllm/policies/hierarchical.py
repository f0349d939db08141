"""Hierarchical MISA: routed heads pick candidates, all heads re-rank them (MISA with a dagger in arXiv 2605.07363)."""

import torch

from misa_vllm.policies.base import IndexerStep, Policy
from misa_vllm.settings import STATISTICS

ROWS_AT_ONCE = 1024
"""Bounds the candidate lists: 1024 rows of 8192 int32 are 32 MiB."""


RERANK_COST = 296
"""Re-ranking a candidate takes as long as this many products of a head with a key in the exact kernel: from the times
of both at 32768 and 65536 keys, H = 64 and 32, on one H200. It hardly depends on H, as keys are gathered one by one."""


class HierarchicalMISA(Policy):
    statistics = STATISTICS

    @classmethod
    def default_min_context(cls, index_heads: int, candidates: int) -> int:
        return candidates * RERANK_COST // index_heads

    @property
    def route_from(self) -> int:
        """Rows that see no more than the candidates' number are exact DSA in one pass: nothing would be left out."""
        return max(self.settings.route_from, self.settings.candidates + 1)

    @property
    def widest_selection(self) -> int:
        return self.settings.candidates

    def workspace_bytes(self, max_rows: int) -> int:
        return min(max_rows, ROWS_AT_ONCE) * self.settings.candidates * torch.int32.itemsize

    def select(self, step: IndexerStep, out: torch.Tensor) -> None:
        settings = self.settings
        step.select(None, settings.topk, out, visible_to=self.route_from)
        if step.rows.max_visible < self.route_from:
            return
        # once for all rows: the pooled keys are the same
        heads = step.route(settings.active_heads, settings.pool_block, settings.statistic)
        for start in range(0, len(step.rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            self._select_part(
                IndexerStep(step.q[part], step.gates[part], step.index_cache, step.rows[part], step.kernels),
                heads[part],
                out[part],
            )

    def _select_part(self, step: IndexerStep, heads: torch.Tensor, out: torch.Tensor) -> None:
        settings = self.settings
        candidates = torch.empty(len(step.rows), settings.candidates, dtype=torch.int32, device=out.device)
        step.select(heads, settings.candidates, candidates, visible_from=self.route_from)
        step.kernels.rerank_tokens(
            step.q, step.gates, candidates, step.index_cache, step.rows, settings.topk, out, self.route_from
        )
