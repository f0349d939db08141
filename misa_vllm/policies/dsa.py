"""DSA: all heads score every visible token (DeepSeek-V3.2 report, eq. 1-2)."""

import torch

from misa_vllm.policies.base import IndexerStep, Policy


class DSA(Policy):
    routes_heads = False

    def select(self, step: IndexerStep, out: torch.Tensor) -> None:
        step.select(None, self.settings.topk, out)
