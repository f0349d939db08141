"""MISA: the routed heads score every visible token (arXiv 2605.07363)."""

import torch

from misa_vllm.policies.base import IndexerStep, Policy


class MISA(Policy):
    def select(self, step: IndexerStep, out: torch.Tensor) -> None:
        settings = self.settings
        step.select(None, settings.topk, out, visible_to=settings.route_from)
        if step.rows.max_visible >= settings.route_from:
            heads = step.route(settings.active_heads, settings.pool_block)
            step.select(heads, settings.topk, out, visible_from=settings.route_from)
