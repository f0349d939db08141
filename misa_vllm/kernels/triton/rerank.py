"""The k best of each row's candidate tokens by the score of all heads (hierarchical MISA's second stage)."""

import torch
import triton
import triton.language as tl

from misa_vllm.kernels.triton.fp8 import (
    DIM,
    PAGE,
    SCALES,
    fp8_argument,
    fp8_unit,
    has_fp8_dot,
    load_fp8,
    multiprocessors,
)
from misa_vllm.kernels.triton.scratch import TRANSIENT_BYTES, scratch
from misa_vllm.kernels.triton.select import NONE, UNBOUNDED, best_mask, ordered_bits
from misa_vllm.rows import QueryRows

CANDIDATE_TILE = 64
STAGES = 7  # three of them go into the chain from candidate to page id to key
PROGRAMS_PER_MULTIPROCESSOR = 4


def rerank_tokens(
    q: torch.Tensor,
    gates: torch.Tensor,
    candidates: torch.Tensor,
    index_cache: torch.Tensor,
    rows: QueryRows,
    k: int,
    out: torch.Tensor,
    visible_from: int = 0,
    visible_to: int | None = None,
) -> None:
    """See `misa_vllm.kernels.Kernels.rerank_tokens`."""
    visible_to = UNBOUNDED if visible_to is None else visible_to
    native = has_fp8_dot(q.device)
    count = candidates.shape[1]
    heads = q.shape[1]
    tile_rows = min(len(rows), max(1, TRANSIENT_BYTES // (4 * count)))
    splits = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device) // max(1, len(rows)))
    (scores,) = scratch(q.device, ((tile_rows, count), torch.float32))
    for start in range(0, len(rows), max(1, tile_rows)):
        tile = slice(start, start + tile_rows)
        part = rows[tile]
        _rerank_score_kernel[(min(splits, triton.cdiv(count, CANDIDATE_TILE)), len(part))](
            fp8_argument(q[tile], native),
            q.stride(0),
            q.stride(1),
            gates[tile],
            gates.stride(0),
            candidates[tile],
            candidates.stride(0),
            count,
            fp8_argument(index_cache, native),
            index_cache.stride(0),
            part.block_table,
            part.block_table.stride(0),
            part.request,
            part.visible,
            scores,
            visible_from,
            visible_to,
            heads,
            HEADS=max(16, triton.next_power_of_2(heads)),
            TILE=CANDIDATE_TILE,
            NATIVE=native,
            STAGES=STAGES,
            num_warps=4,
        )
        slots = triton.next_power_of_2(count)
        _rerank_best_kernel[(len(part),)](
            candidates[tile],
            candidates.stride(0),
            count,
            scores,
            part.visible,
            out[tile],
            out.stride(0),
            visible_from,
            visible_to,
            k,
            SLOTS=slots,
            num_warps=max(4, min(32, slots // 512)),
        )


@triton.jit
def _rerank_score_kernel(
    q, q_row_stride, q_head_stride, gates, gates_stride, candidates, candidates_stride, count,
    cache, page_stride, block_table, block_table_stride, request, visible, scores, visible_from, visible_to, heads,
    HEADS: tl.constexpr, TILE: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    row_visible = tl.load(visible + row)
    if (row_visible > 0) & (row_visible >= visible_from) & (row_visible < visible_to):
        dim = tl.arange(0, DIM)
        head = tl.arange(0, HEADS)
        start = q + row * q_row_stride + head * q_head_stride
        query = tl.trans(load_fp8(start[:, None] + dim[None, :], (head < heads)[:, None], NATIVE))
        gate = tl.load(gates + row * gates_stride + head, mask=head < heads, other=0.0)
        pages = block_table + tl.load(request + row).to(tl.int64) * block_table_stride
        for tile in tl.range(tl.program_id(0), tl.cdiv(count, TILE), tl.num_programs(0), num_stages=STAGES):
            index = tile * TILE + tl.arange(0, TILE)
            token = tl.load(candidates + row * candidates_stride + index, mask=index < count, other=NONE)
            live = token >= 0
            page = tl.load(pages + token // PAGE, mask=live, other=0).to(tl.int64)
            key_page = cache + page * page_stride
            slot = token % PAGE
            keys = load_fp8((key_page + slot * DIM)[:, None] + dim[None, :], live[:, None], NATIVE)
            scale = tl.load((key_page + SCALES).to(tl.pointer_type(tl.float32)) + slot, mask=live, other=0.0)
            score = tl.sum(tl.maximum(tl.dot(keys, query), 0.0) * gate[None, :], axis=1)
            score = score * (scale * (fp8_unit(NATIVE) * fp8_unit(NATIVE)))
            tl.store(scores + row * count + index, score, mask=live)


@triton.jit
def _rerank_best_kernel(
    candidates, candidates_stride, count, scores, visible, out, out_stride, visible_from, visible_to, k,
    SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_visible = tl.load(visible + row)
    if (row_visible >= visible_from) & (row_visible < visible_to):
        index = tl.arange(0, SLOTS)
        token = tl.load(candidates + row * candidates_stride + index, mask=index < count, other=NONE)
        token = tl.where(row_visible > 0, token, NONE)
        live = token >= 0
        score = tl.load(scores + row * count + index, mask=live, other=0.0)
        best = live
        found = tl.sum(live.to(tl.int32), axis=0)
        if found > k:
            best = best_mask(tl.where(live, ordered_bits(score), 0), token, k)
        target = out + row * out_stride
        tl.store(target + tl.cumsum(best.to(tl.int32), axis=0) - 1, token, mask=best)
        for start in range(found, k, SLOTS):
            tl.store(target + start + index, NONE, mask=start + index < k)
