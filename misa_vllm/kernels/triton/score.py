"""Token scores sum_j gate_j * relu(q_j . k) of a tile of rows, read straight from the pages.

Keys are the rows of the matrix product and (query, head) its columns. The accumulator of a matrix unit gives
the thread of lane c (modulo 4) the columns 8i + 2c and 8i + 2c + 1, so `column_row` and `column_head` put all
heads of a query into columns of one thread: summing over heads needs no exchange, and it adds the same numbers
in the same order whatever the size of the tile. That makes a row's scores the same bits in prefill and decode.
"""

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
from misa_vllm.rows import QueryRows

MIN_ROW_TILE = 4  # the lanes that share a group of eight columns
MIN_HEADS = 4  # products of fewer than 16 columns take another matrix instruction on Hopper, which rounds differently
COLUMNS = 128
PROGRAMS_PER_MULTIPROCESSOR = 4


def score_tokens(
    q: torch.Tensor,
    gates: torch.Tensor,
    heads: torch.Tensor | None,
    index_cache: torch.Tensor,
    rows: QueryRows,
    scores: torch.Tensor,
    scored_from: int,
    scored_to: int,
) -> None:
    """Write the scores of rows with `scored_from <= visible < scored_to` to scores [M, >= max_visible] float32.

    Only the visible part of a row is written. heads [M, h] int32: the heads that count; None: all.
    """
    native = has_fp8_dot(q.device)
    active_heads = q.shape[1] if heads is None else heads.shape[1]
    padded_heads = max(MIN_HEADS, triton.next_power_of_2(active_heads))
    row_tile = max(MIN_ROW_TILE, COLUMNS // padded_heads)
    # rows of different requests share no keys: where requests have few rows, a wide tile would only idle
    if len(rows) <= 4 * rows.block_table.shape[0]:
        row_tile = MIN_ROW_TILE if len(rows) > rows.block_table.shape[0] else 1
    row_tiles = triton.cdiv(len(rows), row_tile)
    splits = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device) // row_tiles)
    splits = min(splits, triton.cdiv(min(rows.max_visible, scored_to - 1), PAGE.value))
    _score_kernel[(splits, row_tiles)](
        fp8_argument(q, native),
        q.stride(0),
        q.stride(1),
        gates,
        gates.stride(0),
        rows.request if heads is None else heads,
        0 if heads is None else heads.stride(0),
        fp8_argument(index_cache, native),
        index_cache.stride(0),
        rows.block_table,
        rows.block_table.stride(0),
        rows.request,
        rows.visible,
        scores,
        scores.stride(0),
        len(rows),
        scored_from,
        scored_to,
        active_heads,
        ROUTED=heads is not None,
        HEADS=padded_heads,
        ROWS=row_tile,
        PADDED_ROWS=max(MIN_ROW_TILE, row_tile),
        NATIVE=native,
        num_warps=4,
        num_stages=3,
    )


@triton.jit
def column_row(column, HEADS: tl.constexpr):
    """The row of the tile that a column of the product belongs to."""
    return column // (4 * HEADS) * 4 + column // 2 % 4


@triton.jit
def column_head(column, HEADS: tl.constexpr):
    """The position in its row's list of heads that a column of the product belongs to."""
    return column // 8 % (HEADS // 2) * 2 + column % 2


@triton.jit
def load_queries(
    q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride, first_row, row_live, active_heads,
    ROUTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Queries [columns, 128] and gates [columns] of a tile of rows, by columns; columns without a head are 0."""
    column = tl.arange(0, ROWS * HEADS)
    row = (first_row + column_row(column, HEADS)).to(tl.int64)
    head = column_head(column, HEADS)
    live = (row < row_live) & (head < active_heads)
    if ROUTED:
        head = tl.load(heads + row * heads_stride + head, mask=live, other=0)
    gate = tl.load(gates + row * gates_stride + head, mask=live, other=0.0)
    start = q + row * q_row_stride + head * q_head_stride
    return load_fp8(start[:, None] + tl.arange(0, DIM)[None, :], live[:, None], NATIVE), gate


@triton.jit
def sum_heads(products, gate, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """[keys, columns] dot products -> [keys, ROWS] sums over a row's heads of gate * relu(product)."""
    KEYS: tl.constexpr = products.shape[0]
    gated = tl.maximum(products, 0.0) * gate[None, :]
    by_head = tl.reshape(gated, (KEYS, ROWS // 4, HEADS // 2, 4, 2))
    return tl.reshape(tl.sum(tl.sum(by_head, axis=4), axis=2), (KEYS, ROWS))


@triton.jit
def _score_kernel(
    q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride,
    cache, page_stride, block_table, block_table_stride, request, visible, scores, scores_stride,
    rows, scored_from, scored_to, active_heads,
    ROUTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    first_row = tl.program_id(1) * ROWS
    row_end = tl.minimum(first_row + ROWS, rows)
    row = first_row + tl.arange(0, PADDED_ROWS)
    row_visible = tl.load(visible + row, mask=row < row_end, other=0)
    row_request = tl.load(request + row, mask=row < row_end, other=0)
    pending = (row < row_end) & (row_visible >= scored_from) & (row_visible < scored_to)
    pending = pending.to(tl.int32)
    count = tl.max(row_visible * pending, axis=0)
    if count > split * PAGE:
        query, gate = load_queries(
            q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride, first_row, row_end,
            active_heads, ROUTED, HEADS, PADDED_ROWS, NATIVE,
        )  # fmt: skip
        query = tl.trans(query)
        token = tl.arange(0, PAGE)
        dim = tl.arange(0, DIM)
        # one round per request that has rows in the tile: a tile spans several only at their borders
        while tl.max(pending, axis=0) > 0:
            first = tl.min(tl.where(pending > 0, row, rows), axis=0)
            current = tl.load(request + first)
            member = (pending > 0) & (row_request == current)
            count = tl.max(tl.where(member, row_visible, 0), axis=0)
            pages = block_table + current.to(tl.int64) * block_table_stride
            for tile in range(split, tl.cdiv(count, PAGE), splits):
                page = cache + tl.load(pages + tile).to(tl.int64) * page_stride
                keys = load_fp8(page + token[:, None] * DIM + dim[None, :], None, NATIVE)
                scales = tl.load((page + SCALES).to(tl.pointer_type(tl.float32)) + token)
                score = sum_heads(tl.dot(keys, query), gate, HEADS, PADDED_ROWS)
                score = score * (scales * (fp8_unit(NATIVE) * fp8_unit(NATIVE)))[:, None]
                position = tile * PAGE + token
                tl.store(
                    scores + row.to(tl.int64)[None, :] * scores_stride + position[:, None],
                    score,
                    mask=member[None, :] & (position[:, None] < row_visible[None, :]),
                )
            pending = pending * (row_request != current).to(tl.int32)
