"""MISA: the routed heads score every visible token (arXiv 2605.07363)."""

import torch

from misa_vllm.policies.base import IndexerStep, Policy
from misa_vllm.settings import STATISTICS


class MISA(Policy):
    statistics = STATISTICS

    def select(self, step: IndexerStep, out: torch.Tensor) -> None:
        settings = self.settings
        first_routed = settings.route_from
        if first_routed <= settings.topk + 1:
            first_routed = 0  # the rows below see at most k tokens: any selection takes them all, without scoring
        else:
            step.select(None, settings.topk, out, visible_to=first_routed)
        step.route_and_select(
            settings.active_heads,
            settings.pool_block,
            settings.topk,
            out,
            visible_from=first_routed,
            statistic=settings.statistic,
        )
