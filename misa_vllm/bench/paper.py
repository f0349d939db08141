"""MISA as the paper released it (arXiv 2605.07363), in plain torch, to compare its approach with ours.

Every step it dequantises the request's keys to bf16, recomputes the pooled keys from the whole context, writes the
routed scores to a (queries x keys) matrix and selects with `torch.topk`. The release does the scoring in TileLang;
here it is a bf16 matrix product followed by elementwise operations, so this is slower than the release.
"""

import torch

from misa_vllm.bench.workload import Case, Inputs, Options
from misa_vllm.index_cache import INDEX_HEAD_DIM, keys_view, scales_view

ROWS_AT_ONCE = 128
"""Bounds the products of single heads, which are written out: 128 rows x 8 heads x 131072 keys are 256 MiB."""


class PaperIndexer:
    """The step on each set of inputs, prefill of one request."""

    def __init__(self, case: Case, inputs: list[Inputs], options: Options) -> None:
        self.case, self.inputs, self.options = case, inputs, options

    def _keys(self, one: Inputs) -> torch.Tensor:
        """[N, 128] bfloat16."""
        pages = one.rows.block_table[0].long()
        values = keys_view(one.index_cache).view(torch.uint8)[pages].view(torch.float8_e4m3fn)
        keys = values.to(torch.bfloat16) * scales_view(one.index_cache)[pages].to(torch.bfloat16).unsqueeze(-1)
        return keys.view(-1, INDEX_HEAD_DIM)[: self.case.keys]

    def _heads(self, q: torch.Tensor, one: Inputs, keys: torch.Tensor) -> torch.Tensor:
        """[M, h] int64."""
        size = self.options.pool_block
        blocks = self.case.keys // size
        pooled = keys[: blocks * size].view(blocks, size, INDEX_HEAD_DIM).mean(dim=1)
        products = torch.einsum("mhd,bd->mhb", q, pooled).relu()
        complete = torch.arange(blocks, device=q.device) < (one.rows.visible // size).unsqueeze(1)
        scores = one.gates.abs() * (products * complete.unsqueeze(1)).sum(dim=2, dtype=torch.float32)
        return scores.topk(self.options.active_heads).indices

    def whole(self, number: int) -> torch.Tensor:
        """Route, score and select: [M, k] int32."""
        one = self.inputs[number]
        keys = self._keys(one)
        q = one.q.to(torch.bfloat16)
        heads = self._heads(q, one, keys)
        routed_q = q.gather(1, heads.unsqueeze(-1).expand(-1, -1, INDEX_HEAD_DIM))
        gates = one.gates.gather(1, heads)
        scores = torch.empty(self.case.rows, self.case.keys, device=q.device)
        for start in range(0, self.case.rows, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            products = (routed_q[part].flatten(0, 1) @ keys.T).relu_().unflatten(0, (-1, heads.shape[1]))
            scores[part] = torch.bmm(gates[part].to(torch.bfloat16).unsqueeze(1), products).squeeze(1)
        hidden = torch.arange(self.case.keys, device=q.device) >= one.rows.visible.unsqueeze(1)
        scores.masked_fill_(hidden, -torch.inf)
        return scores.topk(self.options.k).indices.to(torch.int32)
