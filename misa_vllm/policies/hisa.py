"""HISA: the blocks whose mean key scores best are kept whole, all heads score inside them (arXiv 2603.28458).

MISA's alternative, served for comparison: its block scores are plain torch, so its speed says nothing about HISA's.
"""

import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_TOKENS, means_view
from misa_vllm.policies.base import IndexerStep, Policy
from misa_vllm.policies.hierarchical import ROWS_AT_ONCE
from misa_vllm.settings import IndexerSettings, MISAConfigError

BLOCK = 128
"""Tokens in a block, the paper's size."""
PAGES = BLOCK // PAGE_TOKENS
WORKSPACE = 256 * 2**20
"""Bytes that the block scores of the rows taken at once may hold; a single row may need more."""


class HISA(Policy):
    @classmethod
    def check(cls, settings: IndexerSettings) -> None:
        if settings.statistic != "mean":
            raise MISAConfigError(
                f'policy hisa scores block means, which a cache of statistic "{settings.statistic}" does not hold: '
                'choose statistic "mean", or policy misa or hierarchical'
            )
        if settings.candidates % BLOCK or settings.candidates < 2 * BLOCK:
            raise MISAConfigError(
                f"candidates={settings.candidates} are not two or more whole blocks of {BLOCK} tokens, as policy hisa "
                f"keeps them: choose a multiple of {BLOCK} from {2 * BLOCK} on"
            )

    @property
    def blocks(self) -> int:
        """m: blocks a query keeps, 64 with the default of 8192 candidates."""
        return self.settings.candidates // BLOCK

    @property
    def filter_from(self) -> int:
        """Rows that see no more than the kept blocks hold are exact DSA: nothing would be left out."""
        return max(self.settings.min_context, self.settings.candidates + 1)

    @property
    def widest_selection(self) -> int:
        return self.settings.candidates

    def workspace_bytes(self, max_rows: int) -> int:
        # candidate positions are int64 while they are computed, int32 when they are handed on
        position_bytes = torch.int64.itemsize + torch.int32.itemsize
        return WORKSPACE + min(max_rows, ROWS_AT_ONCE) * self.settings.candidates * position_bytes

    def select(self, step: IndexerStep, out: torch.Tensor) -> None:
        step.select(None, self.settings.topk, out, visible_to=self.filter_from)
        if step.rows.max_visible < self.filter_from:
            return
        complete = min(step.rows.max_visible // BLOCK, step.rows.block_table.shape[1] // PAGES)
        row_bytes = torch.float32.itemsize * complete * ((PAGES + 1) * INDEX_HEAD_DIM + step.q.shape[1])
        at_once = min(ROWS_AT_ONCE, max(1, WORKSPACE // row_bytes))
        for start in range(0, len(step.rows), at_once):
            part = slice(start, start + at_once)
            self._select_part(
                IndexerStep(step.q[part], step.gates[part], step.index_cache, step.rows[part], step.kernels),
                complete,
                out[part],
            )

    def _select_part(self, step: IndexerStep, complete: int, out: torch.Tensor) -> None:
        kept = self._block_scores(step, complete).topk(self.blocks, sorted=False).indices
        tokens = torch.arange(BLOCK, device=out.device)
        candidates = (kept.unsqueeze(-1) * BLOCK + tokens).flatten(1).to(torch.int32)
        candidates.masked_fill_(candidates >= step.rows.visible.unsqueeze(1), -1)  # of the newest block
        step.kernels.rerank_tokens(
            step.q, step.gates, candidates, step.index_cache, step.rows, self.settings.topk, out, self.filter_from
        )

    @staticmethod
    def _block_scores(step: IndexerStep, complete: int) -> torch.Tensor:
        """What a row's blocks are ranked by, [M, complete + 1] float32.

        The first and the newest block have no score but the largest value; what lies behind the newest has the
        smallest. All others end before the row's position, so their page means are those of whole pages.
        """
        visible = step.rows.visible.long()
        newest = (visible - 1).clamp(min=0) // BLOCK
        pages = step.rows.block_table[step.rows.request.long(), : complete * PAGES]
        is_full = torch.arange(complete * PAGES, device=pages.device) < (visible // PAGE_TOKENS).unsqueeze(1)
        # page 0 stands in for what is not there: it may hold NaN, and its blocks are ruled out below
        means = means_view(step.index_cache)[pages.masked_fill(~is_full, 0).long()]
        kbar = means.unflatten(1, (complete, PAGES)).mean(dim=2)
        scores = (step.q.float() @ kbar.transpose(1, 2)).relu_().mul_(step.gates.unsqueeze(2)).sum(dim=1)
        block = torch.arange(complete + 1, device=scores.device)
        scores = torch.nn.functional.pad(scores, (0, 1)).masked_fill_(block > newest.unsqueeze(1), -torch.inf)
        return scores.masked_fill_((block == 0) | (block == newest.unsqueeze(1)), torch.inf)
