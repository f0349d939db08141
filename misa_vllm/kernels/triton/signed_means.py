"""The statistic mean_positive: S[t, j] = |w| * sum over complete pool blocks of relu(q) . p + relu(-q) . n.

p and n are a block's means of relu(k) and of relu(-k), so S needs their sums over the pages of a row's complete
blocks. Those sums are taken in whole numbers: float16 p and n are multiples of 2^-24 below 2^16, and so a million of
them add up in 64 bits without any rounding, in any order. However pages are shared among rows, a row gets the same
sums, and one kernel turns them into heads: the same heads in every batch.
"""

import torch
import triton
import triton.language as tl

from misa_vllm.index_cache import PAGE_TOKENS, signed_means_view
from misa_vllm.kernels.triton.fp8 import (
    DIM,
    MEAN,
    PAGE,
    fp8_argument,
    fp8_unit,
    has_fp8_dot,
    load_fp8,
)
from misa_vllm.kernels.triton.route import MIN_ROWS_TO_POOL, SCANNED_ROWS, _store_top_heads
from misa_vllm.kernels.triton.scratch import scratch, spec_bytes
from misa_vllm.rows import QueryRows

SUMS_BYTES = 32 << 20
"""Bounds the sums of page segments; segments grow until theirs fit."""
SEGMENT_PAGES = 16
SUMMED_PAGES, ROUTED_PAGES = tl.constexpr(16), tl.constexpr(32)
"""Pages, or segments, that a program of the one or the other kernel loads at a time."""


def _segments(requests: int, max_visible: int, shared: bool) -> tuple[int, int]:
    """(pages of a segment, how many of them a request has at most), so that all their sums fit SUMS_BYTES.

    A row that shares them reads one segment and the pages behind it. A row alone reads all of them, a tile at a time,
    but should not have more than a tile of pages behind the last where its context is short.
    """
    pages, size = max_visible // PAGE_TOKENS, SEGMENT_PAGES
    while spec_bytes(_spec(requests, pages // size)) > SUMS_BYTES or (not shared and 4 * size * size < pages):
        size *= 2
    return size, pages // size


def _spec(requests: int, segments: int):
    return (requests, segments, 2 * DIM.value), torch.int64


def signs_workspace_bytes(max_rows: int, max_visible: int) -> int:
    """See `misa_vllm.kernels.Kernels.signs_workspace_bytes`; a step has no more requests than rows."""
    return min(SUMS_BYTES, spec_bytes(_spec(max_rows, max_visible // PAGE_TOKENS // SEGMENT_PAGES)))


def route_heads_by_signs(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads_by_signs`."""
    signed_means_view(index_cache)  # refuses pages that hold no statistic
    count, heads = len(rows), q.shape[1]
    routed = torch.empty(count, active_heads, dtype=torch.int32, device=q.device)
    if count == 0:
        return routed
    requests = rows.block_table.shape[0]
    # rows that share a request read one running sum each; a row alone adds up its segments itself
    shared = count > MIN_ROWS_TO_POOL * requests
    segment_pages, segments = _segments(requests, rows.max_visible, shared)
    (sums,) = scratch(q.device, _spec(requests, segments))
    addressing = (
        index_cache,
        index_cache.stride(0),
        rows.block_table,
        rows.block_table.stride(0),
        rows.request,
        rows.visible,
        count,
        pool_block // PAGE_TOKENS,
        sums,
        segment_pages,
        segments,
    )
    scanned, columns = SCANNED_ROWS if shared else 1, 16
    # an empty grid runs nothing but compiles: a step that graphs are captured from later must not leave that to them
    _segment_sums_kernel[(triton.cdiv(count, scanned), segments)](*addressing, SCANNED=scanned, num_warps=4)
    if shared:
        _running_sums_kernel[(requests, 2 * DIM.value // columns)](
            sums, segments, ROWS=64, COLUMNS=columns, num_warps=4
        )
    native = has_fp8_dot(q.device)
    _route_by_signs_kernel[(count,)](
        *addressing,
        int(shared),
        fp8_argument(q, native),
        q.stride(0),
        q.stride(1),
        gates,
        gates.stride(0),
        routed,
        heads,
        active_heads,
        HEADS=max(16, triton.next_power_of_2(heads)),
        NATIVE=native,
        num_warps=8,
    )
    return routed


@triton.jit
def _page_sums(cache, page_stride, pages, first, end, HALF: tl.constexpr, TILE: tl.constexpr):
    """Sums [128] int64, in units of 2^-24, of half HALF (0: p, 1: n) of the statistics of pages[first .. end)."""
    dim = tl.arange(0, DIM)
    total = tl.zeros((DIM,), tl.int64)
    for start in range(first, end, TILE):
        number = start + tl.arange(0, TILE)
        live = number < end
        page = tl.load(pages + number, mask=live, other=0).to(tl.int64)
        signed = (cache + page * page_stride + MEAN).to(tl.pointer_type(tl.int16)) + HALF * DIM
        bits = tl.load(signed[:, None] + dim[None, :], mask=live[:, None], other=0).to(tl.int32)
        exponent = bits >> 10  # neither half has a sign
        mantissa = tl.where(exponent > 0, (bits & 0x3FF) | 0x400, bits)
        total += tl.sum(mantissa.to(tl.int64) << (tl.maximum(exponent, 1) - 1).to(tl.int64), axis=0)
    return total


@triton.jit(do_not_specialize=["rows", "segment_pages", "segments"])
def _segment_sums_kernel(
    cache, page_stride, block_table, block_table_stride, request, visible, rows, block_pages,
    sums, segment_pages, segments,
    SCANNED: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row = tl.program_id(0) * SCANNED + tl.arange(0, SCANNED)
    row_visible = tl.load(visible + row, mask=row < rows, other=0)
    row_request = tl.load(request + row, mask=row < rows, other=-1)
    next_visible = tl.load(visible + row + 1, mask=row + 1 < rows, other=0)
    next_request = tl.load(request + row + 1, mask=row + 1 < rows, other=-1)
    # a row leaves its pages to the next row if that one covers them: the last of such a chain sees the most
    covered = (row_request == next_request) & (next_visible >= row_visible)
    end = (segment + 1) * segment_pages
    reaches = row_visible // (block_pages * PAGE) * block_pages >= end
    owner = ((row < rows) & (covered == 0) & reaches).to(tl.int32)
    while tl.max(owner, axis=0) > 0:
        mine = tl.min(tl.where(owner > 0, row, rows), axis=0)
        current = tl.load(request + mine).to(tl.int64)
        pages = block_table + current * block_table_stride
        target = sums + (current * segments + segment) * (2 * DIM) + tl.arange(0, DIM)
        first = end - segment_pages
        tl.store(target, _page_sums(cache, page_stride, pages, first, end, 0, SUMMED_PAGES))
        tl.store(target + DIM, _page_sums(cache, page_stride, pages, first, end, 1, SUMMED_PAGES))
        owner = owner * (row_request != current).to(tl.int32)


@triton.jit(do_not_specialize=["segments"])
def _running_sums_kernel(sums, segments, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[r, s] becomes sums[r, 0] + .. + sums[r, s]; what lies behind a request's last segment is not read later."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), tl.int64)
    for start in range(0, segments, ROWS):
        segment = start + tl.arange(0, ROWS)
        live = (segment < segments)[:, None]
        line = tl.program_id(0).to(tl.int64) * segments + segment
        target = sums + line[:, None] * (2 * DIM) + column[None, :]
        own = tl.load(target, mask=live, other=0)
        tl.store(target, tl.cumsum(own, axis=0) + before[None, :], mask=live)
        before += tl.sum(own, axis=0)


@triton.jit
def _add_segments(sums, first, end, HALF: tl.constexpr, TILE: tl.constexpr):
    """The sum [128] int64 of lines first .. end of half HALF of `sums`."""
    dim = tl.arange(0, DIM)
    total = tl.zeros((DIM,), tl.int64)
    for start in range(first, end, TILE):
        segment = start + tl.arange(0, TILE)
        source = sums + segment[:, None] * (2 * DIM) + HALF * DIM + dim[None, :]
        total += tl.sum(tl.load(source, mask=(segment < end)[:, None], other=0), axis=0)
    return total


# shared is no constexpr: rows of a large and of a small batch must be added up by the same instructions
@triton.jit(do_not_specialize=["rows", "segment_pages", "segments", "shared"])
def _route_by_signs_kernel(
    cache, page_stride, block_table, block_table_stride, request, visible, rows, block_pages,
    sums, segment_pages, segments, shared, q, q_row_stride, q_head_stride, gates, gates_stride, routed,
    heads, active_heads,
    HEADS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    current = tl.load(request + row).to(tl.int64)
    end = tl.load(visible + row) // (block_pages * PAGE) * block_pages
    pages = block_table + current * block_table_stride
    end_segment = end // segment_pages
    # running sums: the last one holds those before it
    first_segment = tl.where(shared != 0, tl.maximum(end_segment - 1, 0), 0)
    whole = sums + current * segments * (2 * DIM)
    first = end_segment * segment_pages
    positive = _add_segments(whole, first_segment, end_segment, 0, ROUTED_PAGES)
    positive += _page_sums(cache, page_stride, pages, first, end, 0, ROUTED_PAGES)
    negative = _add_segments(whole, first_segment, end_segment, 1, ROUTED_PAGES)
    negative += _page_sums(cache, page_stride, pages, first, end, 1, ROUTED_PAGES)
    unit = 2.0**-24
    of_positive = (positive.to(tl.float32) * unit)[None, :]
    of_negative = (negative.to(tl.float32) * -unit)[None, :]

    head = tl.arange(0, HEADS)
    live = head < heads
    start = q + row.to(tl.int64) * q_row_stride + head * q_head_stride
    query = load_fp8(start[:, None] + tl.arange(0, DIM)[None, :], live[:, None], NATIVE).to(tl.float32)
    query *= fp8_unit(NATIVE)
    total = tl.sum(query * tl.where(query > 0, of_positive, of_negative), axis=1)
    gate = tl.load(gates + row.to(tl.int64) * gates_stride + head, mask=live, other=0.0)
    # no complete block: all heads are equal and the first win, whatever a padding row's query holds
    score = tl.where(end > 0, tl.abs(gate) * total, 0.0)
    line = row + tl.arange(0, 1)
    _store_top_heads(routed, line, line >= 0, score[None, :], active_heads, heads, HEADS)
