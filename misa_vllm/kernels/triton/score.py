"""Token scores sum_j gate_j * relu(q_j . k), read straight from the pages and filtered where they are made.

Keys are the rows of the matrix product and (query, head) its columns. The accumulator of a matrix unit gives
the thread of lane c (modulo 4) the columns 8i + 2c and 8i + 2c + 1, so `column_row` and `column_head` put all
heads of a query into columns of one thread: summing over heads needs no exchange, and it adds the same numbers
in the same order whatever the size of the tile. That makes a row's scores the same bits in prefill and decode.

Scores below a row's threshold are dropped; the others are appended to lists. A list belongs to one row, one share
of the row's pages and one quarter of each page, that is to one warp of one program, so that its order is fixed and
filling it takes three exchanges between lanes and no atomics.
"""

from typing import NamedTuple

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
MAX_ROW_TILE = 16  # four rows to a thread, one byte each of the word in which survivors are counted
COLUMNS = 128
MAX_SPLITS = 256
# two of them go into the chain from page id to key, the others keep pages in flight
PREFILL_STAGES = 5
DECODE_STAGES = 7
PROGRAMS_PER_MULTIPROCESSOR = {128: 3, 256: 2}  # by columns: what the registers of their accumulators allow
FEW_COLUMNS_PROGRAMS = 4
MAX_REGISTERS = {128: 168, 256: 255}
QUARTERS = tl.constexpr(4)  # lists per row and split: the warps of a program, 16 keys of a page each
LIST_KEYS = PAGE.value // QUARTERS.value


class Tiling(NamedTuple):
    """How the scores of M rows are divided among programs."""

    row_tile: int
    row_tiles: int
    splits: int
    """Programs per row tile; program i takes the pages i, i + splits, ..."""
    padded_heads: int

    @property
    def lists(self) -> int:
        """Lists of survivors of one row."""
        return self.splits * QUARTERS.value


def tile_rows(device: torch.device, rows: int, requests: int, pages: int, active_heads: int) -> Tiling:
    """The tiling for `rows` queries of `requests` requests with up to `pages` pages."""
    padded_heads = max(2, triton.next_power_of_2(active_heads))
    row_tile = min(MAX_ROW_TILE, max(MIN_ROW_TILE, COLUMNS // padded_heads))
    # rows of different requests share no keys: where requests have few rows, a wide tile would only idle
    if rows <= 4 * requests:
        row_tile = MIN_ROW_TILE if rows > requests else 1
    row_tiles = triton.cdiv(rows, row_tile)
    columns = max(MIN_ROW_TILE, row_tile) * padded_heads
    programs = PROGRAMS_PER_MULTIPROCESSOR.get(columns, FEW_COLUMNS_PROGRAMS) * multiprocessors(device)
    splits = max(1, programs // row_tiles)
    return Tiling(row_tile, row_tiles, min(splits, MAX_SPLITS, pages), padded_heads)


def score_arguments(q, gates, heads, index_cache, rows):
    """The leading arguments that all scoring kernels share."""
    native = has_fp8_dot(q.device)
    return (
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
        len(rows),
        q.shape[1] if heads is None else heads.shape[1],
    )


def score_options(q, heads, tiling):
    """The keyword arguments that all scoring kernels share."""
    padded_rows = max(MIN_ROW_TILE, tiling.row_tile)
    return {
        "ROUTED": heads is not None,
        "HEADS": tiling.padded_heads,
        "ROWS": tiling.row_tile,
        "PADDED_ROWS": padded_rows,
        "NATIVE": has_fp8_dot(q.device),
        "maxnreg": MAX_REGISTERS.get(padded_rows * tiling.padded_heads),
        "num_warps": 4,
    }


def sample_scores(
    q: torch.Tensor,
    gates: torch.Tensor,
    heads: torch.Tensor | None,
    index_cache: torch.Tensor,
    rows: QueryRows,
    tiling: Tiling,
    samples: torch.Tensor,
    stride: int,
    sampled_from: int,
    sampled_to: int,
) -> None:
    """Write the scores of the tokens `sampled_token(i, stride)` to samples [M, n] float32.

    Only rows with `sampled_from <= visible < sampled_to` are sampled, and only their visible tokens are written.
    """
    count = samples.shape[1]
    splits = min(triton.cdiv(count, PAGE.value), max(1, 2 * tiling.splits))
    _sample_kernel[(splits, tiling.row_tiles)](
        *score_arguments(q, gates, heads, index_cache, rows),
        samples,
        count,
        stride,
        sampled_from,
        sampled_to,
        **score_options(q, heads, tiling),
        num_stages=3,
    )


def collect_scores(
    q: torch.Tensor,
    gates: torch.Tensor,
    heads: torch.Tensor | None,
    index_cache: torch.Tensor,
    rows: QueryRows,
    tiling: Tiling,
    thresholds: torch.Tensor,
    filtered_from: int,
    lists: torch.Tensor,
    list_slots: int,
    list_counts: torch.Tensor,
    scored_from: int,
    scored_to: int,
) -> None:
    """Append the scores that are not below the row's threshold to the row's lists.

    Args:
        thresholds: float32 [M], read of rows with `visible >= filtered_from`; the others keep all scores.
        heads: [M, h] int32, the heads that count; None: all.
        lists: int64 [M, tiling.lists, list_slots]: (bits of the float32 score) << 32 | position.
        list_counts: int32 [M, tiling.lists], entries that a list should hold; above list_slots: it lacks some.
        scored_from, scored_to: rows with `scored_from <= visible < scored_to` are scored.
    """
    _collect_kernel[(tiling.splits, tiling.row_tiles)](
        *score_arguments(q, gates, heads, index_cache, rows),
        thresholds,
        filtered_from,
        lists,
        list_slots,
        list_counts,
        scored_from,
        scored_to,
        **score_options(q, heads, tiling),
        ASSEMBLY=q.device.type != "cpu",
        STAGES=PREFILL_STAGES if tiling.row_tile > MIN_ROW_TILE else DECODE_STAGES,
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
def sampled_token(index, stride):
    """Position of the sample `index`: one in every stretch of `stride` tokens, at a changing place within it."""
    # periodic contexts must not resonate with the sample
    return index * stride + (index * 7919) % stride


@triton.jit
def load_scales(page, token):
    """Scales of the keys `token` of a page (or of one page for each)."""
    return (page + SCALES).to(tl.pointer_type(tl.float32)) + token


@triton.jit
def store_entries(pointers, position, score, mask, ASSEMBLY: tl.constexpr):
    """Write (score, position) pairs of 8 bytes."""
    if ASSEMBLY:
        # `tl.store` would first move everything through shared memory into a layout for contiguous addresses
        tl.inline_asm_elementwise(
            "{ .reg .pred live; setp.ne.b32 live, $4, 0; @live st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
            "=r,l,r,f,r",
            [pointers.to(tl.int64), position, score, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(pointers, (bits << 32) | position.to(tl.int64), mask=mask)


@triton.jit
def _lanes_before(count):
    """Exclusive prefix sums over axis 1 (8 lanes) of [a, 8, b], and the totals [a, b]."""
    A: tl.constexpr = count.shape[0]
    B: tl.constexpr = count.shape[2]
    bits = tl.reshape(count, (A, 2, 2, 2, B))
    upper = tl.arange(0, 2)
    pairs = tl.sum(bits, axis=3)
    fours = tl.sum(pairs, axis=2)
    total = tl.sum(fours, axis=1)
    before = (pairs[:, :, :, None, :] - bits) * upper[None, None, None, :, None]
    before += ((fours[:, :, None, :] - pairs) * upper[None, None, :, None])[:, :, :, None, :]
    before += ((total[:, None, :] - fours) * upper[None, :, None])[:, :, None, None, :]
    return tl.reshape(before, (A, 8, B)), total


@triton.jit
def _sample_kernel(
    q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride,
    cache, page_stride, block_table, block_table_stride, request, visible, rows, active_heads,
    samples, sample_count, stride, sampled_from, sampled_to,
    ROUTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    row_end = tl.minimum(first_row + ROWS, rows)
    row = first_row + tl.arange(0, PADDED_ROWS)
    row_visible = tl.load(visible + row, mask=row < row_end, other=0)
    row_request = tl.load(request + row, mask=row < row_end, other=0)
    pending = ((row < row_end) & (row_visible >= sampled_from) & (row_visible < sampled_to)).to(tl.int32)
    if tl.max(row_visible * pending, axis=0) > split * PAGE * stride:
        query, gate = load_queries(
            q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride, first_row, row_end,
            active_heads, ROUTED, HEADS, PADDED_ROWS, NATIVE,
        )  # fmt: skip
        query = tl.trans(query)
        dim = tl.arange(0, DIM)
        while tl.max(pending, axis=0) > 0:
            first = tl.min(tl.where(pending > 0, row, rows), axis=0)
            current = tl.load(request + first)
            member = (pending > 0) & (row_request == current)
            count = tl.max(tl.where(member, row_visible, 0), axis=0)
            pages = block_table + current.to(tl.int64) * block_table_stride
            end = tl.minimum(sample_count, tl.cdiv(count, stride))
            for tile in range(split, tl.cdiv(end, PAGE), tl.num_programs(0)):
                index = tile * PAGE + tl.arange(0, PAGE)
                position = sampled_token(index, stride)
                live = (position < count) & (index < sample_count)
                page = cache + tl.load(pages + position // PAGE, mask=live, other=0).to(tl.int64) * page_stride
                token = position % PAGE
                keys = load_fp8((page + token * DIM)[:, None] + dim[None, :], live[:, None], NATIVE)
                scales = tl.load(load_scales(page, token), mask=live, other=0.0)
                score = sum_heads(tl.dot(keys, query), gate, HEADS, PADDED_ROWS)
                score = score * (scales * (fp8_unit(NATIVE) * fp8_unit(NATIVE)))[:, None]
                tl.store(
                    samples + row.to(tl.int64)[None, :] * sample_count + index[:, None],
                    score,
                    mask=member[None, :] & live[:, None] & (position[:, None] < row_visible[None, :]),
                )
            pending = pending * (row_request != current).to(tl.int32)


@triton.jit
def _collect_kernel(
    q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride,
    cache, page_stride, block_table, block_table_stride, request, visible, rows, active_heads,
    thresholds, filtered_from, lists, list_slots, list_counts, scored_from, scored_to,
    ROUTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    ASSEMBLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = PADDED_ROWS // 4
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    first_row = tl.program_id(1) * ROWS
    row_end = tl.minimum(first_row + ROWS, rows)
    row = first_row + tl.arange(0, PADDED_ROWS)
    row_visible = tl.load(visible + row, mask=row < row_end, other=0)
    row_request = tl.load(request + row, mask=row < row_end, other=0)
    filtered = (row < row_end) & (row_visible >= filtered_from)
    row_threshold = tl.load(thresholds + row, mask=filtered, other=float("-inf"))
    scored = (row < row_end) & (row_visible >= scored_from) & (row_visible < scored_to)
    pending = scored.to(tl.int32)
    # [quarter, group of rows, row of the group]: the rows of a group lie in neighbouring lanes
    quarter = tl.arange(0, QUARTERS)[:, None, None]
    row_of_list = first_row + tl.arange(0, GROUPS)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    list_id = (row_of_list.to(tl.int64) * splits + split) * QUARTERS + quarter
    list_start = (lists + list_id * list_slots)[:, None, None, :, :]
    filled = tl.zeros((QUARTERS, GROUPS, 4), tl.int32)
    byte = tl.arange(0, GROUPS) * 8
    if tl.max(row_visible * pending, axis=0) > split * PAGE:
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
            seen = tl.where(member, row_visible, 0)
            count = tl.max(seen, axis=0)
            pages = block_table + current.to(tl.int64) * block_table_stride
            for tile in tl.range(split, tl.cdiv(count, PAGE), splits, num_stages=STAGES):
                page = cache + tl.load(pages + tile).to(tl.int64) * page_stride
                keys = load_fp8(page + token[:, None] * DIM + dim[None, :], None, NATIVE)
                scales = tl.load(load_scales(page, token))
                score = sum_heads(tl.dot(keys, query), gate, HEADS, PADDED_ROWS)
                score = score * (scales * (fp8_unit(NATIVE) * fp8_unit(NATIVE)))[:, None]
                position = tile * PAGE + token
                # a NaN counts as the best, as in torch.sort
                survives = (position[:, None] < seen[None, :]) & ((score < row_threshold[None, :]) == 0)
                # axes: warp, the two keys of a thread, the lanes that hold other keys, group, row of the group
                live = tl.reshape(survives.to(tl.int32), (QUARTERS, 2, 8, GROUPS, 4))
                lower = live * (1 - tl.arange(0, 2))[None, :, None, None, None]
                own = tl.sum(live << byte[None, None, None, :, None], axis=3)
                before, total = _lanes_before(tl.sum(own, axis=1))
                slot = filled[:, None, :, :] + ((before[:, :, None, :] >> byte[None, None, :, None]) & 0xFF)
                behind = tl.sum(lower, axis=1)[:, None, :, :, :] * tl.arange(0, 2)[None, :, None, None, None]
                slot = slot[:, None, :, :, :] + behind
                store_entries(
                    list_start + slot,
                    tl.broadcast_to(tl.reshape(position, (QUARTERS, 2, 8))[:, :, :, None, None], slot.shape),
                    tl.reshape(score, (QUARTERS, 2, 8, GROUPS, 4)),
                    (live > 0) & (slot < list_slots),
                    ASSEMBLY,
                )
                filled += (total[:, None, :] >> byte[None, :, None]) & 0xFF
            pending = pending * (row_request != current).to(tl.int32)
    tl.store(
        list_counts + list_id, filled, mask=(row_of_list < row_end) & (quarter >= 0)
    )
