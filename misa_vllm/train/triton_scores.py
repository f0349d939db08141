"""The indexer's scores on NVIDIA GPUs without the [queries, heads, keys] products that plain PyTorch has to store."""

import torch
import triton
import triton.language as tl

TILES = ((64, 128, 4), (64, 256, 8), (128, 128, 8))
"""(queries, keys, warps) of a tile that are worth trying; which is fastest depends on the GPU and on Triton."""


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, gates_ptr, out_ptr, queries, keys, first, out_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dim = tl.arange(0, DIM)
    has_query, has_key = query < queries, key < keys
    out = out_ptr + query.to(tl.int64)[:, None] * out_stride + key[None, :]
    written = has_query[:, None] & has_key[None, :]
    visible = key[None, :] <= first + query[:, None]
    total = tl.full((BLOCK_Q, BLOCK_K), 0.0, tl.float32)
    # tiles above the diagonal hold no visible pair
    if tl.program_id(0) * BLOCK_K <= first + tl.program_id(1) * BLOCK_Q + BLOCK_Q - 1:
        k = tl.load(k_ptr + key.to(tl.int64)[:, None] * DIM + dim[None, :], mask=has_key[:, None], other=0.0)
        rows = query.to(tl.int64) * HEADS
        for head in range(HEADS):
            q = tl.load(q_ptr + (rows + head)[:, None] * DIM + dim[None, :], mask=has_query[:, None], other=0.0)
            gate = tl.load(gates_ptr + rows + head, mask=has_query, other=0.0)
            total += gate[:, None] * tl.maximum(tl.dot(q, tl.trans(k)), 0.0)
    tl.store(out, tl.where(visible, total, float("-inf")), mask=written)


def index_scores(
    q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor, first: int, tile: tuple[int, int, int] = TILES[0]
) -> torch.Tensor:
    """See `misa_vllm.train.kernels.index_scores`; H * D is what a query's heads take in a row of q."""
    queries, heads, dim = q.shape
    q, k, gates = q.contiguous(), k.contiguous(), gates.contiguous().float()
    out = torch.empty(queries, k.shape[0], device=q.device, dtype=torch.float32)
    block_q, block_k, warps = tile
    grid = (triton.cdiv(k.shape[0], block_k), triton.cdiv(queries, block_q))
    _scores_kernel[grid](
        q, k, gates, out, queries, k.shape[0], first, out.stride(0),
        HEADS=heads, DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return out
